"""The server that Ratchet is compared with starts from the same settings."""

from __future__ import annotations

import pytest

from benchmarks.vllm_server import flags
from core.settings.serving import Serve
from serving.engines.vlm.vllm_start import import_vllm
from tests.integration.engines.conftest import VlmCases


@pytest.mark.integration
def test_vllms_own_server_knows_every_flag_and_the_engine_is_the_same(cases: VlmCases) -> None:
    import_vllm()
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    (name, *_), serve = cases.names, Serve(vlm_max_rank=8)
    given = flags(cases.base, serve, name, cases.directories[name], 1)
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(given)
    assert [(module.name, module.path) for module in parsed.lora_modules] == [(name, str(cases.directories[name]))]
    assert (parsed.max_lora_rank, parsed.disable_log_stats) == (8, False)
