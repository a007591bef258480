"""From a trained VLM candidate to a stored verdict, and `ratchet gate run`, over a home with a random tiny base."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from core.artifacts import Artifacts
from core.digests import digest_bytes
from core.errors import GateError
from core.ledger import Ledger, UpdateRow
from core.loading import load_settings
from core.settings import Settings
from serving.engines.adapters import read_adapter, write_adapter
from serving.engines.vlm.hf_engine import TransformersEngine
from serving.engines.vlm.vlm_base import load_vlm_base
from serving.errors import EngineDead
from streams.store.rows import Position
from streams.store.sample_store import SampleStore
from tests.integration.gate.taught_vlm import known, unknown, write_questions
from tests.support.colour_squares import encoded_square
from tests.support.tiny_vlm import tiny_vlm_adapter, tiny_vlm_base
from updater.gate.gate_command import gate_command
from updater.service.gate_update import gate_update

pytestmark = pytest.mark.integration
STORED = 3
"""The version of the store after the table was made, the partition claimed and the samples stored."""


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    home = tmp_path / "home"
    tiny_vlm_base(home)
    write_questions(home / "data" / "colours", known(range(30)))
    (home / "suites").mkdir()
    (home / "suites" / "colours.yaml").write_text("task: vqa\ndata: ${home}/data/colours\nmargin: 0.9\n")
    (home / "suites" / "retrieval.yaml").write_text("task: retrieval\ndata: ${home}/data/nowhere\n")
    settings = load_settings(
        overrides={
            "home": home,
            "base.vlm": "tiny-vlm",
            "gate.suites": [home / "suites"],
            "gate.min_items": 20,
            "gate.detect": 0.5,
            "serve.vlm_engine": "transformers",
        },
        environ={},
    )
    rows = [_sample(number) for number in range(40)]
    SampleStore(settings.lake).put(rows, [Position("samples", 0, 40)])
    return settings


def _sample(number: int) -> dict[str, Any]:
    asked = unknown(range(5000 + number, 5001 + number))[0]
    image = encoded_square(asked.picture)
    return {
        "kind": "sample", "id": digest_bytes(image), "image": image, "text": "", "question": asked.question,
        "answer": asked.answer, "domain": "things", "concept": "", "ingested_at": datetime.now(UTC),
        "split": "fresh_eval", "look": None, "words": 0, "topic": "samples", "partition": 0, "offset": number,
    }  # fmt: skip


def _adapter(settings: Settings, seed: int, scale: float = 0.02) -> str:
    work = settings.home / f"work-{seed}"
    name = tiny_vlm_adapter(load_vlm_base(settings.home, "tiny-vlm"), work, seed, scale=scale)
    Artifacts(settings.artifacts).put_directory(work, f"adapters/{name}")
    return name


def _trained(ledger: Ledger, adapter: str, incumbent: str | None = None) -> UpdateRow:
    update = ledger.begin_update(
        f"update-{adapter}", family="vlm", recipe={"name": "vlm-x", "rank": 4}, seed=0, store_version=STORED,
        data_from={}, data_to={"samples:0": 40}, incumbent=incumbent,
    )  # fmt: skip
    ledger.register_adapter(adapter, "vlm", "tiny-vlm", "", "", {})
    return ledger.advance_update(update.id, "trained", adapter=adapter, cost={"sample_gflops": 0.1})


def _judge(settings: Settings, ledger: Ledger, update: UpdateRow) -> UpdateRow:
    artifacts, store = Artifacts(settings.artifacts), SampleStore(settings.lake)
    return gate_update(settings, ledger, artifacts, store, load_vlm_base(settings.home, "tiny-vlm"), update)


def _engine_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("vlm-")]


def test_a_vlm_candidate_is_judged_against_its_incumbent_and_the_engine_is_closed(settings: Settings) -> None:
    ledger = Ledger.open(settings.ledger)
    update = _trained(ledger, _adapter(settings, 2), incumbent=_adapter(settings, 1))
    done = _judge(settings, ledger, update)
    verdict = ledger.verdict_of(update.id)
    assert done.state == "gated" and verdict is not None
    assert set(verdict.summary["suites"]) == {"colours", "fresh.things"}, "suites of the CLIP are not asked"
    assert verdict.summary["suites"]["colours"]["metric"] == "exact_match"
    report = Artifacts(settings.artifacts).read_bytes(f"reports/{update.id}/report.html").decode()
    assert str(update.incumbent) in report and "parity" in report
    assert _engine_threads() == []


def _cut_short(settings: Settings) -> str:
    name = _adapter(settings, 3)
    weights = Artifacts(settings.artifacts).fetch(f"adapters/{name}") / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    return name


def _of_nans(settings: Settings) -> str:
    _adapter(settings, 3)
    files = read_adapter(settings.home / "work-3")
    tensors = {key: tensor.clone() for key, tensor in files.tensors.items()}
    tensors[min(tensors)].view(-1)[0] = float("nan")
    work = settings.home / "nan"
    name = write_adapter(work, tensors, files.config, load_vlm_base(settings.home, "tiny-vlm"))
    Artifacts(settings.artifacts).put_directory(work, f"adapters/{name}")
    return name


@pytest.mark.parametrize(("broken", "why"), [(_cut_short, "cut short"), (_of_nans, "not finite")])
def test_a_candidate_that_will_not_load_is_a_verdict_with_a_report(
    settings: Settings, broken: Callable[[Settings], str], why: str
) -> None:
    ledger = Ledger.open(settings.ledger)
    update = _trained(ledger, broken(settings))
    assert _judge(settings, ledger, update).state == "gated"
    verdict = ledger.verdict_of(update.id)
    assert verdict is not None and verdict.outcome == "rejected" and verdict.summary["caught_by"] == ["loads"]
    report = Artifacts(settings.artifacts).read_bytes(f"reports/{update.id}/report.html").decode()
    assert "Rejected" in report and why in report


def test_an_engine_that_dies_leaves_the_update_trained_to_be_judged_again(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger.open(settings.ledger)
    update = _trained(ledger, _adapter(settings, 4))
    whole = TransformersEngine.reply

    async def die(engine: TransformersEngine, *arguments: Any) -> Any:
        raise EngineDead("out of memory", "Start a new engine.")

    with monkeypatch.context() as patch:
        patch.setattr(TransformersEngine, "reply", die)
        with pytest.raises(GateError, match="out of memory"):
            _judge(settings, ledger, update)
    assert _engine_threads() == [], "closed after the error as well"
    assert ledger.verdict_of(update.id) is None and ledger.update(update.id).state == "trained"
    assert TransformersEngine.reply is whole
    assert _judge(settings, ledger, update).state == "gated"


def test_the_command_finds_the_family_and_the_live_adapter_of_that_family(settings: Settings) -> None:
    live, candidate = _adapter(settings, 5), _adapter(settings, 6)
    ledger = Ledger.open(settings.ledger)
    proposal = ledger.propose("release", family="vlm", vlm=live, actor="op", reason="first")
    ledger.commit_release(1, clip=None, vlm=live, actor="op", reason="first", proposal_id=proposal.id)
    ledger.close()
    verdict, page = gate_command(settings, candidate)
    assert (verdict.candidate, verdict.incumbent, verdict.base) == (candidate, live, "tiny-vlm")
    assert page.is_file() and {suite.task for suite in verdict.suites} == {"vqa"}
    by_directory, _ = gate_command(settings, str(settings.home / "work-6"), incumbent="base")
    assert by_directory.candidate == candidate and by_directory.incumbent is None


def test_without_a_vlm_a_vlm_adapter_cannot_be_judged(settings: Settings) -> None:
    alone = settings.model_copy(update={"base": settings.base.model_copy(update={"vlm": ""})})
    with pytest.raises(GateError, match=r"base\.vlm is empty"):
        gate_command(alone, "vlm-0123456789ab")
