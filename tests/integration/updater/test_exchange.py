"""Imported adapters go through the gate and rollout like ours; an exported adapter imports as the same adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
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
from core.ledger import Ledger, UpdateRow
from core.ledger.collection import COLLECT_LEASE
from core.settings import Settings
from ops.cli.main import app
from serving.engines.adapters import adapter_name
from serving.engines.clip import ClipEngine
from tests.integration.updater.home import add_samples, judged_as, made_by, make_home, make_vlm_home, release
from tests.support.tiny import tiny_adapter, tiny_base
from tests.support.tiny_vlm import tiny_vlm_adapter, tiny_vlm_base
from updater.recipes import load_recipe
from updater.service import triggers
from updater.service.exchange import export_adapter, gate_import, import_adapter
from updater.service.process import only_one
from updater.service.update_loop import UpdaterService

pytestmark = pytest.mark.integration


@pytest.fixture
def outcome(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    return judged_as("passed", monkeypatch)


@pytest.fixture
def foreign(settings: Settings, tmp_path: Path) -> Path:
    return foreign_adapter(settings, tmp_path / "foreign", seed=1)


def foreign_adapter(settings: Settings, folder: Path, seed: int) -> Path:
    tiny_adapter(tiny_base(settings.home), folder, seed=seed)
    (folder / "ratchet.json").unlink()
    return folder


def test_an_imported_adapter_is_judged_and_proposed_by_the_updater(
    settings: Settings, foreign: Path, outcome: dict[str, str]
) -> None:
    add_samples(settings, 8, split="fresh_eval")
    imported = import_adapter(settings, foreign, actor="ada", base="tiny")
    assert not imported.known and imported.update.state == "trained"
    service = UpdaterService(settings)
    update = made_by(service)
    assert (update.id, update.state) == (imported.update.id, "done")
    (proposal,) = service.ledger.pending_proposals()
    assert (proposal.kind, proposal.clip, proposal.update_id) == ("update", update.adapter, update.id)
    verdict = service.ledger.verdict_of(update.id)
    assert verdict is not None and "fresh.things" in verdict.summary["suites"]
    row = service.ledger.adapter(str(update.adapter))
    assert (row.meta["origin"], row.meta["by"], row.meta["from"]) == ("imported", "ada", str(foreign))
    (audited,) = service.ledger.audit_rows(subject=f"adapter {row.name}")
    assert (audited.actor, audited.action) == ("ada", "import adapter")


def test_what_the_gate_rejects_is_not_proposed(settings: Settings, foreign: Path, outcome: dict[str, str]) -> None:
    outcome["outcome"] = "rejected"
    update, verdict = gate_import(settings, import_adapter(settings, foreign, actor="ada", base="tiny"))
    assert verdict is not None and (update.state, verdict.outcome) == ("done", "rejected")
    ledger = Ledger.open(settings.ledger)
    assert ledger.pending_proposals() == []


def test_the_same_adapter_again_is_known(settings: Settings, foreign: Path, outcome: dict[str, str]) -> None:
    first = import_adapter(settings, foreign, actor="ada", base="tiny")
    again = import_adapter(settings, foreign, actor="bob", base="tiny")
    assert again.known and again.update == first.update
    gate_import(settings, first)
    judged = import_adapter(settings, foreign, actor="bob", base="tiny")
    assert judged.known and judged.update.state == "done"
    update, verdict = gate_import(settings, judged)
    assert verdict is not None and update.state == "done"
    ledger = Ledger.open(settings.ledger)
    assert len(ledger.verdicts()) == 1 and len(ledger.pending_proposals()) == 1
    assert len(ledger.audit_rows(subject=f"adapter {update.adapter}")) == 1


def test_an_import_that_was_interrupted_is_completed(
    settings: Settings, foreign: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
        broken.setattr(Ledger, "begin_update", Mock(side_effect=KeyboardInterrupt))
        import_adapter(settings, foreign, actor="ada", base="tiny")
    assert not import_adapter(settings, foreign, actor="ada", base="tiny").known


def test_an_import_has_learned_no_data_of_the_store(settings: Settings, foreign: Path, outcome: dict[str, str]) -> None:
    add_samples(settings, 12)
    service = UpdaterService(settings)
    own = made_by(service)
    assert own.data_to
    release(service.ledger)
    imported = import_adapter(settings, foreign, actor="ada", base="tiny").update
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
    following = made_by(service)
    assert (following.state, following.incumbent) == ("done", imported.adapter)


def test_it_is_compared_with_what_is_live_when_it_is_judged(
    settings: Settings, foreign: Path, tmp_path: Path, outcome: dict[str, str]
) -> None:
    first = import_adapter(settings, foreign, actor="ada", base="tiny").update
    second = import_adapter(settings, foreign_adapter(settings, tmp_path / "2", 2), actor="ada", base="tiny").update
    assert second.incumbent is None
    service = UpdaterService(settings)
    done = made_by(service)
    assert done.id == first.id  # in order of arrival
    assert "proposal" in service.step().reason  # the second waits for the outcome of the first
    with pytest.raises(TrainingError, match="cannot be judged now: proposal"):
        gate_import(settings, import_adapter(settings, tmp_path / "2", actor="ada", base="tiny"))
    release(service.ledger)
    done = made_by(service)
    assert (done.id, done.incumbent) == (second.id, first.adapter)


def test_judging_at_once_leaves_the_work_of_an_updater_alone(
    settings: Settings, foreign: Path, tmp_path: Path, outcome: dict[str, str]
) -> None:
    imported = import_adapter(settings, foreign, actor="ada", base="tiny")
    with only_one(settings.home), pytest.raises(TrainingError, match="an updater works in"):
        gate_import(settings, imported)
    ledger = Ledger.open(settings.ledger)
    assert ledger.update(imported.update.id).state == "trained"
    recipe = load_recipe(settings.home / "naive.yaml")
    other = {"family": "clip", "recipe": recipe.model_dump(mode="json"), "seed": 1, "store_version": 0}
    ledger.begin_update("update-killed", **other, data_from={}, data_to={}, incumbent=None)
    update, _ = gate_import(settings, imported)  # it is the older one
    assert update.state == "done"
    later = import_adapter(settings, foreign_adapter(settings, tmp_path / "later", 2), actor="ada", base="tiny")
    with pytest.raises(TrainingError, match="update-killed is not finished"):
        gate_import(settings, later)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, UpdateRow, Path]:
    folder = tmp_path_factory.mktemp("exported")
    settings = make_home(folder / "home")
    add_samples(settings, 12)
    with pytest.MonkeyPatch.context() as patch:
        judged_as("passed", patch)
        service = UpdaterService(settings)
        own = made_by(service)
    release(service.ledger)
    return settings, own, export_adapter(settings, str(own.adapter), folder / "out" / "mine")


def test_what_is_exported_comes_back_as_the_same_adapter(
    exported: tuple[Settings, UpdateRow, Path], tmp_path: Path
) -> None:
    settings, own, folder = exported
    name = str(own.adapter)
    assert adapter_name(folder) == name
    card = (folder / "README.md").read_text()
    facts = (name, own.id, "| verdict of the gate | passed |", "| releases | 1 |", tiny_base(settings.home).digest)
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


def test_peft_reads_what_is_exported_and_computes_what_is_served(
    exported: tuple[Settings, UpdateRow, Path], recwarn: pytest.WarningsRecorder
) -> None:
    settings, own, folder = exported
    base, engine = tiny_base(settings.home), ClipEngine(tiny_base(settings.home))
    model = PeftModel.from_pretrained(base.build_model(), folder).eval()
    assert not [str(w.message) for w in recwarn if "peft" in str(w.filename)]
    pixels = np.random.default_rng(1).integers(0, 255, (3, 32, 32, 3), dtype=np.uint8)
    with torch.inference_mode():
        vectors = torch.nn.functional.normalize(model.encode_image(base.preprocess.normalise(pixels)), dim=-1)
    engine.load(str(own.adapter), Artifacts(settings.artifacts).fetch(f"adapters/{own.adapter}"))
    np.testing.assert_allclose(vectors.numpy(), engine.encode_images(pixels, str(own.adapter)), atol=1e-5)


@pytest.mark.parametrize(
    ("spoil", "base", "message"),
    [
        (lambda about: None, None, "does not say which base"),
        (lambda about: None, "unknown", "base 'unknown' is not served here"),
        (lambda about: about | {"base_digest": "0" * 64}, None, "base_digest is 000000000000"),
        (lambda about: about | {"base_digest": 5}, None, "base_digest is no text"),
        (lambda about: about | {"family": "vlm"}, "tiny", "base 'tiny' is not served"),
        (lambda about: about | {"name": "clip-000000000000"}, None, "they are damaged or changed"),
    ],
)
def test_an_adapter_of_another_base_is_refused(
    settings: Settings, tmp_path: Path, spoil: Callable[[dict[str, Any]], Any], base: str | None, message: str
) -> None:
    folder = tmp_path / "adapter"
    tiny_adapter(tiny_base(settings.home), folder, seed=1)
    about = spoil(json.loads((folder / "ratchet.json").read_text()))
    (folder / "ratchet.json").unlink() if about is None else (folder / "ratchet.json").write_text(json.dumps(about))
    with pytest.raises(AdapterError, match=message) as caught:
        import_adapter(settings, folder, actor="ada", base=base)
    assert caught.value.fix
    ledger = Ledger.open(settings.ledger)
    assert ledger.updates() == []


def test_a_vlm_adapter_takes_the_same_way(tmp_path: Path, outcome: dict[str, str]) -> None:
    settings = make_vlm_home(tmp_path / "home")
    tiny_vlm_adapter(tiny_vlm_base(settings.home), tmp_path / "vlm", seed=1)
    (tmp_path / "vlm" / "ratchet.json").unlink()
    imported = import_adapter(settings, tmp_path / "vlm", actor="ada", base="tiny-vlm")
    update, verdict = gate_import(settings, imported)
    assert verdict is not None and (update.family, update.state) == ("vlm", "done")
    ledger = Ledger.open(settings.ledger)
    (proposal,) = ledger.pending_proposals()
    assert (proposal.family, proposal.vlm) == ("vlm", update.adapter)
    ledger.close()
    tiny_vlm_adapter(tiny_vlm_base(settings.home), tmp_path / "wide", seed=1, rank=16)
    narrow = make_vlm_home(tmp_path / "home", **{"serve.vlm_max_rank": 8})
    with pytest.raises(AdapterError, match="rank 16; 8 is served"):
        import_adapter(narrow, tmp_path / "wide", actor="ada")


def test_the_commands(settings: Settings, foreign: Path, tmp_path: Path) -> None:
    def ratchet(*words: str) -> Any:
        flags = [f"home={settings.home}", "base.clip=tiny", f"gate.suites=[{settings.home / 'suites'}]"]
        head = [word for flag in flags for word in ("--set", flag)]
        return CliRunner().invoke(app, [*head, "adapters", *words], env={"COLUMNS": "200"})

    stored = ratchet("import", str(foreign), "--base", "tiny")
    assert stored.exit_code == 0 and "is stored: import-clip-" in stored.output and "--judge" in stored.output
    name = stored.output.split()[0]
    assert "is known" in ratchet("import", str(foreign), "--base", "tiny").output
    judged = ratchet("import", str(foreign), "--base", "tiny", "--judge")
    verdict = Ledger.open(settings.ledger).verdict_on(name)
    assert verdict is not None and f"{verdict.outcome}: " in judged.output
    assert judged.exit_code == (0 if verdict.outcome == "passed" else 1)
    written = ratchet("export", name, str(tmp_path / "out"))
    assert written.exit_code == 0 and adapter_name(tmp_path / "out") == name


def test_importing_an_adapter_again_brings_its_collected_files_back(settings: Settings, foreign: Path) -> None:
    imported = import_adapter(settings, foreign, actor="ada", base="tiny")
    ledger, artifacts, name = Ledger.open(settings.ledger), Artifacts(settings.artifacts), str(imported.update.adapter)
    ledger.advance_update(imported.update.id, "done")
    epoch = ledger.acquire_lease(COLLECT_LEASE, "test", 60)
    assert epoch is not None
    assert ledger.begin_collection({name: "old"}, live=0, epoch=epoch, actor="test") == [name]
    artifacts.delete(f"adapters/{name}")
    ledger.finish_collection({name: 1})
    with pytest.raises(AdapterCollected, match="adapters import"):
        export_adapter(settings, name, settings.home / "exported")
    assert import_adapter(settings, foreign, actor="ada", base="tiny").known
    export_adapter(settings, name, settings.home / "exported")
    assert ledger.collected([name]) == {}
    assert ledger.audit_rows(subject=f"adapter {name}")[0].action == "bring back adapter"
