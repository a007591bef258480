"""A home with tiny bases, a filled sample store and small recipes, for tests that run the whole updater."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from core.artifacts import Artifacts
from core.digests import digest_bytes
from core.ledger import Ledger, UpdateRow
from core.loading import load_settings
from core.settings import Settings
from streams.publish.folders import FolderItem, write_folder
from streams.store.rows import Position
from streams.store.sample_store import SampleStore
from tests.support.tiny import tiny_base
from tests.support.tiny_vlm import tiny_vlm_base
from tests.unit.updater.builders import COLOURS, picture, recipe
from tests.unit.updater.gate.builders import folder_dataset
from updater.gate.run import run_gate
from updater.gate.verdict import Verdict
from updater.service import gate_update
from updater.service.update_loop import UpdaterService

TOPIC = "samples"


def make_home(home: Path, **overrides: Any) -> Settings:
    """Make a home in which an update takes a second, unless it exists."""
    tiny_base(home)
    if not (home / "suites").exists():
        folder_dataset(home / "data" / "things", count=30)
        for name in ("default", "naive"):
            (home / f"{name}.yaml").write_text(recipe(name, max_steps=6, reference_limit=20).to_yaml())
        (home / "suites").mkdir()
        (home / "suites" / "things.yaml").write_text("task: retrieval\ndata: ${home}/data/things\nmargin: 0.9\n")
    return load_settings(
        overrides={
            "home": home,
            "base.clip": "tiny",
            "serve.vlm_engine": "transformers",
            "serve.port": 1,  # an unused port: the trainer asks the server for its load
            "updater.recipe": str(home / "default.yaml"),
            "updater.reference": [home / "data" / "things"],
            "updater.min_new_samples": 10,
            "updater.wait_for_items": False,
            "updater.threads": 1,
            "updater.checkpoint_steps": 2,
            "updater.metrics_port": 0,
            "gate.suites": [home / "suites"],
            "gate.min_items": 5,
            "ingest.split_key": "tests",  # a random key would seal another number of items in each run
            **overrides,
        },
        environ={},
    )


def make_vlm_home(home: Path, **overrides: Any) -> Settings:
    make_home(home)
    tiny_vlm_base(home)
    folder = home / "data" / "asked"
    if not folder.exists():
        pictures = [FolderItem(Path(f"{i}.png"), "", inline=picture(900 + i), **_asked(i)) for i in range(24)]
        write_folder(folder, pictures)
        (home / "vlm-default.yaml").write_text(recipe("vlm-default", max_steps=6, reference_limit=16).to_yaml())
        (home / "suites" / "asked.yaml").write_text("task: vqa\ndata: ${home}/data/asked\nmargin: 0.9\n")
    both = {
        "base.vlm": "tiny-vlm",
        "updater.vlm_recipe": str(home / "vlm-default.yaml"),
        "updater.reference": [home / "data" / "things", folder],
        "serve.vlm_engine": "transformers",
    }
    return make_home(home, **both, **overrides)


def judged_as(outcome: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the real gate, then replace its outcome, which is random with random weights, by ``["outcome"]`` of the
    returned mapping. ``["verdict"]`` is the last verdict.
    """
    wanted: dict[str, Any] = {"outcome": outcome}

    def decided(**arguments: Any) -> Verdict:
        wanted["verdict"] = replace(run_gate(**arguments), outcome=wanted["outcome"])
        return wanted["verdict"]  # type: ignore[no-any-return]

    monkeypatch.setattr(gate_update, "run_gate", decided)
    return wanted


def add_samples(
    settings: Settings, count: int, split: str = "train", partition: int = 0,
    asked: Callable[[int], bool] = lambda offset: False, words: Callable[[int], dict[str, str]] = lambda offset: {},
) -> int:  # fmt: skip
    """Append samples to the store as ingest would and return the new version. ``asked``: offsets that have a question
    instead of a text. ``words``: further columns by offset, such as labels.
    """
    store = SampleStore(settings.lake)
    first = store.offsets().get(f"{TOPIC}:{partition}", 0)
    rows = [_row(partition, offset, split, asked(offset)) | words(offset) for offset in range(first, first + count)]
    return store.put(rows, [Position(TOPIC, partition, first + count)])


def _row(partition: int, offset: int, split: str, asked: bool) -> dict[str, Any]:
    image = picture(partition * 10_000 + offset + 7)
    words = _asked(offset) if asked else {"text": f"a {COLOURS[offset % 6]} thing number {offset % 9}"}
    empty = dict.fromkeys(("text", "question", "answer", "label"), "")
    return empty | {
        "kind": "sample", "id": digest_bytes(image), "image": image, "domain": "things",
        "concept": COLOURS[offset % 6], "ingested_at": datetime.now(UTC), "split": split, "look": None, "words": 0,
        "topic": TOPIC, "partition": partition, "offset": offset, **words,
    }  # fmt: skip


def _asked(number: int) -> dict[str, Any]:
    if number % 2:
        return {"label": "number", "question": "which number is it?", "answer": str(number % 9)}
    return {"label": "colour", "question": "which colour is it?", "answer": COLOURS[number % 6]}


def changed(settings: Settings, section: str, **values: Any) -> Settings:
    return settings.model_copy(update={section: getattr(settings, section).model_copy(update=values)})


def made_by(service: UpdaterService, state: str = "done", **how: bool) -> UpdateRow:
    """Run a step and return its update, which must then be in this state."""
    update = service.step(**how).update
    assert update is not None and update.state == state, update
    return update


def report_of(settings: Settings, update: UpdateRow) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(Artifacts(settings.artifacts).read_bytes(f"reports/{update.id}/report.json"))
    return report


def release(ledger: Ledger) -> None:
    (proposal,) = ledger.pending_proposals()
    commit(ledger, clip=proposal.clip, vlm=proposal.vlm, proposal_id=proposal.id)


def commit(ledger: Ledger, clip: str | None = None, vlm: str | None = None, proposal_id: int | None = None) -> None:
    """Commit the next release; where it names no adapter of a family, that of the live one stays."""
    live = ledger.live()
    number, clip, vlm = (live.number + 1, clip or live.clip, vlm or live.vlm) if live else (1, clip, vlm)
    ledger.commit_release(number, clip=clip, vlm=vlm, actor="updater", reason="passed", proposal_id=proposal_id)
