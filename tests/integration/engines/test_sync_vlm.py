"""The blocking facade of an engine, and the server of vLLM that Ratchet is compared with."""

from __future__ import annotations

import pytest

from benchmarks.vllm_server import flags
from core.settings.serving import Serve
from serving.engines.vlm.open import SyncVlm, open_engine
from serving.engines.vlm.vllm_start import import_vllm
from tests.integration.engines.conftest import VlmCases

pytestmark = pytest.mark.integration


def test_a_blocking_facade_gives_replies_and_scores_in_order(cases: VlmCases) -> None:
    name = cases.names[1]
    with SyncVlm(open_engine(cases.base, Serve(), kind="transformers")) as vlm:
        vlm.load(name, cases.directories[name])
        replies = vlm.replies(cases.asks, name, label="answers")
        assert [reply.tokens for reply in replies] == [one.tokens for one in cases.references[name]]
        scores = vlm.scores(cases.asks[:2], [["yes", "no"], ["red"]], name)
        wanted = [[cases.models[name].score(cases.asks[0], one) for one in ("yes", "no")]]
        wanted.append([cases.models[name].score(cases.asks[1], "red")])
        assert scores == [pytest.approx(one, abs=1e-4) for one in wanted]
        assert vlm.golden(name) != vlm.golden(None)
        vlm.unload(name)
        assert vlm.engine.resident() == frozenset()
    assert vlm.engine.last_error() == "The engine was closed."


def test_vllms_own_server_knows_every_flag_and_the_engine_is_the_same(cases: VlmCases) -> None:
    import_vllm()
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    (name, *_), serve = cases.names, Serve(vlm_max_rank=8)
    given = flags(cases.base, serve, name, cases.directories[name], 1)
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(given)
    assert [(module.name, module.path) for module in parsed.lora_modules] == [(name, str(cases.directories[name]))]
    assert (parsed.max_lora_rank, parsed.disable_log_stats) == (8, False)
