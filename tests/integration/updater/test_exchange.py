"""Imported adapters go through the gate and rollout like ours; an exported adapter imports as the same adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from peft import PeftModel
from typer.testing import CliRunner

from core.artifacts import Artifacts
from core.errors import AdapterCollected, AdapterError, RatchetError, TrainingError
from core.ledger import Ledger
from core.ledger.collection import COLLECT_LEASE
from core.settings import Settings
from ops.cli.main import app
from serving.engines.adapters import adapter_name
from serving.engines.clip import ClipEngine
from tests.integration.updater.home import add_samples, judged_as, made_by, make_home, release
from tests.support.tiny import tiny_adapter, tiny_base
from updater.recipes import load_recipe
from updater.service import triggers
from updater.service.exchange import Import, export_adapter, gate_import, import_adapter
from updater.service.process import only_one
from updater.service.update_loop import UpdaterService


@pytest.fixture(autouse=True)
def outcome(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    return judged_as("passed", monkeypatch)


@pytest.fixture
def foreign(settings: Settings, tmp_path: Path) -> Path:
    return foreign_adapter(settings, tmp_path / "foreign", seed=1)


@pytest.fixture
def ledger(settings: Settings) -> Ledger:
    return Ledger.open(settings.ledger)


def foreign_adapter(settings: Settings, folder: Path, seed: int) -> Path:
    tiny_adapter(tiny_base(settings.home), folder, seed=seed)
    (folder / "ratchet.json").unlink()
    return folder


def imported_from(settings: Settings, folder: Path, actor: str = "ada") -> Import:
    return import_adapter(settings, folder, actor=actor, base="tiny")


def test_an_imported_adapter_is_judged_and_proposed_by_the_updater(settings: Settings, foreign: Path) -> None:
    add_samples(settings, 8, split="fresh_eval")
    imported = imported_from(settings, foreign)
    assert not imported.known and imported.update.state == "trained"
    service = UpdaterService(settings)
    update = made_by(service)
    assert update.id == imported.update.id
    (proposal,) = service.ledger.pending_proposals()
    assert (proposal.kind, proposal.clip, proposal.update_id) == ("update", update.adapter, update.id)
    verdict = service.ledger.verdict_of(update.id)
    assert verdict is not None and "fresh.things" in verdict.summary["suites"]
    row = service.ledger.adapter(str(update.adapter))
    assert (row.meta["origin"], row.meta["by"], row.meta["from"]) == ("imported", "ada", str(foreign))
    (audited,) = service.ledger.audit_rows(subject=f"adapter {row.name}")
    assert (audited.actor, audited.action) == ("ada", "import adapter")


def test_the_same_adapter_again_is_known_unless_its_import_was_interrupted(
    settings: Settings, ledger: Ledger, foreign: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
        broken.setattr(Ledger, "begin_update", Mock(side_effect=KeyboardInterrupt))
        imported_from(settings, foreign)
    first = imported_from(settings, foreign)
    again = imported_from(settings, foreign, "bob")
    assert (first.known, again.known) == (False, True) and again.update == first.update
    gate_import(settings, first)
    judged = imported_from(settings, foreign, "bob")
    assert judged.known and judged.update.state == "done"
    update, verdict = gate_import(settings, judged)
    assert verdict is not None and update.state == "done"
    assert len(ledger.verdicts()) == 1 and len(ledger.pending_proposals()) == 1
    audited = ledger.audit_rows(subject=f"adapter {update.adapter}")
    assert [row.actor for row in audited] == ["ada", "ada"], "who only repeated what was done is not in it"


def test_an_import_has_learned_no_data_of_the_store(settings: Settings, foreign: Path) -> None:
    add_samples(settings, 12)
    service = UpdaterService(settings)
    own = made_by(service)
    assert own.data_to
    release(service.ledger)
    imported = imported_from(settings, foreign).update
    assert (imported.incumbent, imported.data_from, imported.data_to) == (own.adapter, own.data_to, {})
    service.step()
    assert service.step().update is None  # its proposal is open
    release(service.ledger)
    ready = triggers.decide(settings, service.ledger, service.store, service.recipes["clip"], retry=True)
    assert isinstance(ready, triggers.Ready)
    assert (ready.learned.incumbent, ready.learned.data_from, ready.new_samples) == (imported.adapter, {}, 12)
    # Nor does it hide that the recipe has tried these samples before.
    assert service.step().reason == "there are no new samples"
    add_samples(settings, 12)
    assert made_by(service).incumbent == imported.adapter


def test_it_is_compared_with_what_is_live_when_it_is_judged(settings: Settings, foreign: Path, tmp_path: Path) -> None:
    first = imported_from(settings, foreign).update
    second = imported_from(settings, foreign_adapter(settings, tmp_path / "2", 2)).update
    assert second.incumbent is None
    service = UpdaterService(settings)
    assert made_by(service).id == first.id  # in order of arrival
    assert "proposal" in service.step().reason  # the second waits for the outcome of the first
    with pytest.raises(TrainingError, match="cannot be judged now: proposal"):
        gate_import(settings, imported_from(settings, tmp_path / "2"))
    release(service.ledger)
    done = made_by(service)
    assert (done.id, done.incumbent) == (second.id, first.adapter)


def test_judging_at_once_leaves_the_work_of_an_updater_alone(
    settings: Settings, ledger: Ledger, foreign: Path, tmp_path: Path
) -> None:
    imported = imported_from(settings, foreign)
    with only_one(settings.home), pytest.raises(TrainingError, match="an updater works in"):
        gate_import(settings, imported)
    assert ledger.update(imported.update.id).state == "trained"
    recipe = load_recipe(settings.home / "naive.yaml")
    other = {"family": "clip", "recipe": recipe.model_dump(mode="json"), "seed": 1, "store_version": 0}
    ledger.begin_update("update-killed", **other, data_from={}, data_to={}, incumbent=None)
    update, _ = gate_import(settings, imported)  # it is the older one
    assert update.state == "done"
    later = imported_from(settings, foreign_adapter(settings, tmp_path / "later", 2))
    with pytest.raises(TrainingError, match="update-killed is not finished"):
        gate_import(settings, later)


def test_what_is_exported_comes_back_as_the_same_adapter_and_peft_computes_with_it_what_is_served(
    settings: Settings, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    add_samples(settings, 12)
    service = UpdaterService(settings)
    own = made_by(service)
    release(service.ledger)
    name, base = str(own.adapter), tiny_base(settings.home)
    folder = export_adapter(settings, name, tmp_path / "mine")
    assert adapter_name(folder) == name
    card = (folder / "README.md").read_text()
    facts = (name, own.id, "| verdict of the gate | passed |", "| releases | 1 |", base.digest)
    assert all(fact in card for fact in facts)
    assert import_adapter(settings, folder, actor="ada").known
    elsewhere = make_home(tmp_path / "elsewhere")
    imported = import_adapter(elsewhere, folder, actor="ada")
    assert not imported.known and imported.update.adapter == name
    again = export_adapter(elsewhere, name, tmp_path / "again")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (again / file).read_bytes() == (folder / file).read_bytes()
    with pytest.raises(AdapterError, match="exists already"):
        export_adapter(settings, name, folder)
    with pytest.raises(RatchetError, match="not in the ledger"):
        export_adapter(settings, "clip-000000000000", tmp_path / "nothing")

    model = PeftModel.from_pretrained(base.build_model(), folder).eval()
    assert not [str(w.message) for w in recwarn if "peft" in str(w.filename)]
    pixels = np.random.default_rng(1).integers(0, 255, (3, 32, 32, 3), dtype=np.uint8)
    with torch.inference_mode():
        vectors = torch.nn.functional.normalize(model.encode_image(base.preprocess.normalise(pixels)), dim=-1)
    engine = ClipEngine(base)
    engine.load(name, Artifacts(settings.artifacts).fetch(f"adapters/{name}"))
    np.testing.assert_allclose(vectors.numpy(), engine.encode_images(pixels, name), atol=1e-5)


def test_an_adapter_of_another_base_is_refused(settings: Settings, ledger: Ledger, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    tiny_adapter(tiny_base(settings.home), folder, seed=1)
    file = folder / "ratchet.json"
    about = json.loads(file.read_text())

    def refused(base: str | None, message: str) -> None:
        with pytest.raises(AdapterError, match=message) as caught:
            import_adapter(settings, folder, actor="ada", base=base)
        assert caught.value.fix

    spoilt: list[tuple[dict[str, Any], str | None, str]] = [
        ({"base_digest": "0" * 64}, None, "base_digest is 000000000000"),
        ({"base_digest": 5}, None, "base_digest is not text"),
        ({"family": "vlm"}, "tiny", "base 'tiny' is not served"),
        ({"name": "clip-000000000000"}, None, "they are damaged or changed"),
    ]
    for changes, base, message in spoilt:
        file.write_text(json.dumps(about | changes))
        refused(base, message)
    file.unlink()
    refused(None, "does not say which base")
    refused("unknown", "base 'unknown' is not served here")
    assert ledger.updates() == []


def test_the_commands_and_what_the_gate_rejects_is_not_proposed(
    settings: Settings, ledger: Ledger, foreign: Path, tmp_path: Path, outcome: dict[str, str]
) -> None:
    def ratchet(*words: str) -> Any:
        flags = [f"home={settings.home}", "base.clip=tiny", f"gate.suites=[{settings.home / 'suites'}]"]
        head = [word for flag in flags for word in ("--set", flag)]
        return CliRunner().invoke(app, [*head, "adapters", *words], env={"COLUMNS": "200"})

    outcome["outcome"] = "rejected"
    stored = ratchet("import", str(foreign), "--base", "tiny")
    assert stored.exit_code == 0 and "is stored: import-clip-" in stored.output and "--judge" in stored.output
    name = stored.output.split()[0]
    assert "is known" in ratchet("import", str(foreign), "--base", "tiny").output
    judged = ratchet("import", str(foreign), "--base", "tiny", "--judge")
    assert judged.exit_code == 1 and "rejected: " in judged.output
    assert ledger.verdict_on(name) is not None and ledger.pending_proposals() == []
    written = ratchet("export", name, str(tmp_path / "out"))
    assert written.exit_code == 0 and adapter_name(tmp_path / "out") == name


def test_importing_an_adapter_again_brings_its_collected_files_back(
    settings: Settings, ledger: Ledger, foreign: Path
) -> None:
    imported = imported_from(settings, foreign)
    name = str(imported.update.adapter)
    ledger.advance_update(imported.update.id, "done")
    epoch = ledger.acquire_lease(COLLECT_LEASE, "test", 60)
    assert epoch is not None
    assert ledger.begin_collection({name: "old"}, live=0, epoch=epoch, actor="test") == [name]
    Artifacts(settings.artifacts).delete(f"adapters/{name}")
    ledger.finish_collection({name: 1})
    with pytest.raises(AdapterCollected, match="adapters import"):
        export_adapter(settings, name, settings.home / "exported")
    assert imported_from(settings, foreign).known
    export_adapter(settings, name, settings.home / "exported")
    assert ledger.collected([name]) == {}
    assert ledger.audit_rows(subject=f"adapter {name}")[0].action == "bring back adapter"
