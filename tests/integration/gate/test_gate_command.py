"""`ratchet gate run` and `ratchet gate report` as functions, and from a trained candidate to a stored verdict, over a
home with a tiny CLIP and a tiny VLM.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from core.artifacts import Artifacts
from core.digests import digest_bytes
from core.errors import AdapterError, GateError
from core.ledger import Family, Ledger, UpdateRow
from core.loading import load_settings
from core.settings import Settings
from serving.engines.adapters import read_adapter, write_adapter
from serving.engines.calibration import calibration_key, parse_calibration
from serving.engines.clip import ClipEngine
from serving.engines.vlm.hf_engine import TransformersEngine
from serving.engines.vlm.vlm_base import load_vlm_base
from serving.errors import EngineDead
from streams.store.rows import Position
from streams.store.sample_store import SampleStore
from tests.integration.gate.taught_vlm import known, unknown, write_questions
from tests.support.colour_squares import encoded_square
from tests.support.tiny import tiny_adapter, tiny_base
from tests.support.tiny_vlm import tiny_vlm_adapter, tiny_vlm_base
from tests.unit.updater.gate.builders import folder_dataset
from updater.gate.gate_command import calibrate_command, gate_command
from updater.gate.report import fetch_report
from updater.service.gate_update import gate_update

STORED = 3
"""The version of the store after the table was made, the partition claimed and the samples stored."""


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    home = tmp_path / "home"
    tiny_base(home)
    tiny_vlm_base(home)
    folder_dataset(home / "data" / "things", count=60)
    write_questions(home / "data" / "colours", known(range(30)))
    (home / "suites").mkdir()
    for name, task, margin in (("things", "retrieval", 0.2), ("colours", "vqa", 0.9)):
        (home / "suites" / f"{name}.yaml").write_text(f"task: {task}\ndata: ${{home}}/data/{name}\nmargin: {margin}\n")
    return load_settings(
        overrides={
            "home": home, "base.clip": "tiny", "base.vlm": "tiny-vlm", "updater.threads": 1,
            "gate.suites": [home / "suites"], "gate.min_items": 20, "gate.detect": 0.5,
            "serve.vlm_engine": "transformers",
        },
        environ={},
    )  # fmt: skip


def stored_adapter(settings: Settings, seed: int, family: Family = "clip") -> str:
    work = settings.home / f"work-{seed}"
    if family == "vlm":
        name = tiny_vlm_adapter(load_vlm_base(settings.home, "tiny-vlm"), work, seed, scale=0.02)
    else:
        name = tiny_adapter(tiny_base(settings.home), work, seed, scale=0.02)
    Artifacts(settings.artifacts).put_directory(work, f"adapters/{name}")
    return name


def cut_short(settings: Settings, family: Family = "vlm") -> str:
    name = stored_adapter(settings, 3, family)
    weights = Artifacts(settings.artifacts).fetch(f"adapters/{name}") / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    return name


def of_nans(settings: Settings) -> str:
    stored_adapter(settings, 3, "vlm")
    files = read_adapter(settings.home / "work-3")
    tensors = {key: tensor.clone() for key, tensor in files.tensors.items()}
    tensors[min(tensors)].view(-1)[0] = float("nan")
    work = settings.home / "nan"
    name = write_adapter(work, tensors, files.config, load_vlm_base(settings.home, "tiny-vlm"))
    Artifacts(settings.artifacts).put_directory(work, f"adapters/{name}")
    return name


@pytest.mark.parametrize(("family", "base", "suite"), [("clip", "tiny", "things"), ("vlm", "tiny-vlm", "colours")])
def test_a_candidate_is_judged_by_name_against_what_is_live_of_its_family_or_against_what_is_told(
    settings: Settings, family: Family, base: str, suite: str
) -> None:
    live, candidate = stored_adapter(settings, 1, family), stored_adapter(settings, 2, family)
    ledger = Ledger.open(settings.ledger)
    adapters: dict[str, Any] = {"clip": None, "vlm": None, family: live}
    proposal = ledger.propose("release", family=family, **adapters, actor="op", reason="first")
    ledger.commit_release(1, **adapters, actor="op", reason="first", proposal_id=proposal.id)
    ledger.close()
    verdict, page = gate_command(settings, candidate)
    assert (verdict.candidate, verdict.incumbent, verdict.base) == (candidate, live, base)
    assert page.is_file() and candidate in page.read_text()
    assert [each.name for each in verdict.suites] == [suite], "of its family alone"
    elsewhere = settings.home / "elsewhere"
    by_directory, _ = gate_command(settings, str(settings.home / "work-2"), incumbent="base", out=elsewhere)
    assert (by_directory.candidate, by_directory.incumbent) == (candidate, None)
    assert (elsewhere / "report.json").is_file()


def test_what_cannot_be_judged_is_named_and_an_adapter_that_will_not_load_is_rejected(settings: Settings) -> None:
    alone = settings.model_copy(update={"base": settings.base.model_copy(update={"vlm": ""})})
    with pytest.raises(GateError, match=r"base\.vlm is empty"):
        gate_command(alone, "vlm-0123456789ab")
    with pytest.raises(AdapterError):
        gate_command(settings, "clip-ffffffffffff")
    verdict, page = gate_command(settings, cut_short(settings, "clip"))
    assert verdict.outcome == "rejected" and verdict.caught_by == ("loads",)
    assert "Rejected" in page.read_text()


@pytest.fixture
def kinds(settings: Settings) -> Settings:
    """A suite with enough pictures to calibrate by."""
    folder_dataset(settings.home / "data" / "kinds", count=120)
    (settings.home / "suites" / "kinds.yaml").write_text("task: classification\ndata: ${home}/data/kinds\n")
    return settings


def stored(settings: Settings, adapter: str | None) -> set[str]:
    """Kinds of queries in the stored calibration of an adapter; empty without one."""
    engine = ClipEngine(tiny_base(settings.home), threads=1)
    artifacts = Artifacts(settings.artifacts)
    spaces = engine.load(adapter, artifacts.fetch(f"adapters/{adapter}")) if adapter else engine.spaces(None)
    key = calibration_key(spaces.image, spaces.text)
    return {*parse_calibration(artifacts.read_bytes(key)).curves} if artifacts.exists(key) else set()


def test_what_is_live_is_calibrated_by_hand_the_base_alone_before_the_first_release(kinds: Settings) -> None:
    name, found = calibrate_command(kinds)
    assert (name, {*found.curves}) == ("base tiny", {"label", "image"}) and stored(kinds, None) == {"label", "image"}
    adapter = stored_adapter(kinds, 1)
    assert stored(kinds, adapter) == set()
    ledger = Ledger.open(kinds.ledger)
    ledger.register_adapter(adapter, "clip", "tiny", "", "", {})
    ledger.commit_release(1, clip=adapter, vlm=None, actor="op", reason="first", proposal_id=None)
    ledger.close()
    assert calibrate_command(kinds)[0] == adapter and stored(kinds, adapter) == {"label", "image"}


def test_suites_with_too_few_queries_calibrate_nothing_and_say_so(settings: Settings) -> None:
    with pytest.raises(GateError, match="50 of a kind are needed"):
        calibrate_command(settings)


def test_the_gate_stores_the_calibration_of_the_candidate_and_of_the_base_that_had_none(kinds: Settings) -> None:
    adapter = stored_adapter(kinds, 1)
    ledger = Ledger.open(kinds.ledger)
    artifacts, store, base = Artifacts(kinds.artifacts), SampleStore(kinds.lake), tiny_base(kinds.home)
    update = ledger.begin_update(
        "update-a", family="clip", recipe={"name": "clip-x", "rank": 4}, seed=0, store_version=store.version(),
        data_from={}, data_to={"samples:0": 40}, incumbent=None,
    )  # fmt: skip
    ledger.register_adapter(adapter, "clip", base.digest, "", "", {})
    update = ledger.advance_update(update.id, "trained", adapter=adapter, cost={"sample_gflops": 0.1})
    gate_update(kinds, ledger, artifacts, store, base, update)
    verdict = ledger.verdict_of(update.id)
    ledger.close()
    assert verdict is not None
    told = verdict.summary["diagnostics"]["calibration"]
    assert {*told} == stored(kinds, adapter) == stored(kinds, None) == {"label", "image"}
    assert 0 <= told["label"]["ci_low"] <= told["label"]["error"] <= told["label"]["ci_high"]
    page = artifacts.read_bytes(f"reports/{update.id}/report.html").decode()
    assert "Probability of a match" in page


def trained(ledger: Ledger, adapter: str, incumbent: str | None = None) -> UpdateRow:
    update = ledger.begin_update(
        f"update-{adapter}", family="vlm", recipe={"name": "vlm-x", "rank": 4}, seed=0, store_version=STORED,
        data_from={}, data_to={"samples:0": 40}, incumbent=incumbent,
    )  # fmt: skip
    ledger.register_adapter(adapter, "vlm", "tiny-vlm", "", "", {})
    return ledger.advance_update(update.id, "trained", adapter=adapter, cost={"sample_gflops": 0.1})


def judge(settings: Settings, ledger: Ledger, update: UpdateRow) -> UpdateRow:
    artifacts, store = Artifacts(settings.artifacts), SampleStore(settings.lake)
    return gate_update(settings, ledger, artifacts, store, load_vlm_base(settings.home, "tiny-vlm"), update)


def engine_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("vlm-")]


@pytest.fixture
def asked(settings: Settings) -> Settings:
    """40 fresh questions are in the store."""
    rows = [
        {"kind": "sample", "id": digest_bytes(encoded_square(one.picture)), "image": encoded_square(one.picture),
         "text": "", "question": one.question, "answer": one.answer, "domain": "things", "concept": "",
         "ingested_at": datetime.now(UTC), "split": "fresh_eval", "look": None, "words": 0, "topic": "samples",
         "partition": 0, "offset": offset}
        for offset, one in enumerate(unknown(range(5000, 5040)))
    ]  # fmt: skip
    SampleStore(settings.lake).put(rows, [Position("samples", 0, 40)])
    return settings


def test_an_update_whose_engine_died_is_judged_again_and_every_engine_is_closed(
    asked: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger.open(asked.ledger)
    update = trained(ledger, stored_adapter(asked, 2, "vlm"), incumbent=stored_adapter(asked, 1, "vlm"))

    async def die(engine: TransformersEngine, *arguments: Any) -> Any:
        raise EngineDead("out of memory", "Start a new engine.")

    with pytest.raises(GateError, match="no verdict yet"):
        fetch_report(asked)
    with monkeypatch.context() as patch:
        patch.setattr(TransformersEngine, "reply", die)
        with pytest.raises(GateError, match="out of memory"):
            judge(asked, ledger, update)
    assert engine_threads() == []
    assert ledger.verdict_of(update.id) is None and ledger.update(update.id).state == "trained"

    assert judge(asked, ledger, update).state == "gated"
    assert engine_threads() == []
    verdict = ledger.verdict_of(update.id)
    assert verdict is not None
    assert set(verdict.summary["suites"]) == {"colours", "fresh.things"}, "suites of the CLIP are not asked"
    assert verdict.summary["suites"]["colours"]["metric"] == "exact_match"
    page = Artifacts(asked.artifacts).read_bytes(f"reports/{update.id}/report.html")
    assert str(update.incumbent) in page.decode() and "parity" in page.decode()
    brought = fetch_report(asked)
    assert brought.read_bytes() == page
    assert json.loads((brought.parent / "report.json").read_text())["candidate"] == update.adapter
    with pytest.raises(GateError, match="nobody"):
        fetch_report(asked, "nobody")


@pytest.mark.parametrize(("broken", "why"), [(cut_short, "cut short"), (of_nans, "not finite")])
def test_an_update_that_will_not_load_is_a_verdict_with_a_report(
    asked: Settings, broken: Callable[[Settings], str], why: str
) -> None:
    ledger = Ledger.open(asked.ledger)
    update = trained(ledger, broken(asked))
    assert judge(asked, ledger, update).state == "gated"
    verdict = ledger.verdict_of(update.id)
    assert verdict is not None and verdict.outcome == "rejected" and verdict.summary["caught_by"] == ["loads"]
    report = Artifacts(asked.artifacts).read_bytes(f"reports/{update.id}/report.html").decode()
    assert "Rejected" in report and why in report
