"""Imports and exports adapters as PEFT directories. An imported adapter becomes an update in the state ``trained``,
which the updater judges and proposes. It has learned no data of this store: ``data_to`` is empty, so once it is live
the next update begins with all of it. Its incumbent is set when it is judged, because another release may come before.
"""

from __future__ import annotations

import shutil
import tempfile
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from core.artifacts import Artifacts, directory_digest
from core.errors import AdapterError, TrainingError
from core.files import folder_next_to
from core.ledger import AdapterRow, Ledger, UpdateRow, VerdictRow
from core.recorded_adapters import fetch_recorded
from core.settings import Settings
from serving.engines.adapters import MAX_RANK, adapter_name, read_adapter
from serving.engines.lora import whole_weights
from streams.store.sample_store import SampleStore
from updater.families import FAMILIES, family_base, spaces_of
from updater.recipes import Family
from updater.service.peft_files import convert, named
from updater.service.process import only_one
from updater.service.triggers import IMPORTED, ONLY_LOOK, Learned
from updater.service.update_loop import UpdaterService
from updater.step.learner import Base

RELEASES: Final = 1000


@dataclass(frozen=True)
class Import:
    update: UpdateRow
    known: bool


def import_adapter(settings: Settings, directory: Path, *, actor: str, base: str | None = None) -> Import:
    """Check a PEFT directory, store its adapter, and record an update in the state ``trained``. Idempotent.
    ``directory``: ``adapter_config.json`` and ``adapter_model.safetensors``; with ``ratchet.json`` if it was exported.
    ``actor``: who imports it, for the ledger. ``base``: name of the adapter's base; required without ``ratchet.json``.
    Raises AdapterError: it does not fit; LedgerError, ArtifactsUnavailable: a store cannot be reached."""
    family, frozen = _base_of(settings, directory, base)
    artifacts = Artifacts(settings.artifacts)
    with closing(Ledger.open(settings.ledger)) as ledger, tempfile.TemporaryDirectory() as folder:
        converted = Path(folder) / "adapter"
        name = convert(directory, frozen, settings.serve.vlm_max_rank if family == "vlm" else MAX_RANK, converted)
        claimed = named(directory).name
        if claimed is not None and claimed != name:
            raise AdapterError(
                f"{directory}: its name is {claimed[:40]!r}, and its files are {name}; they are damaged or changed.",
                "Export it again; if it was changed on purpose, remove ratchet.json and give --base.",
            )
        known, key = ledger.update_of(name), f"adapters/{name}"
        if known is not None:
            if ledger.collected([name]):
                _bring_back(ledger, artifacts, name, converted, actor)
            return Import(known, known=True)
        if not artifacts.exists(key):  # an import that was interrupted may have stored it
            artifacts.put_directory(converted, key)
        stored = artifacts.fetch(key)
        if adapter_name(stored) != name:
            raise AdapterError(f"artifact {key!r} holds another adapter.", "Restore it from a backup.")
        image_space, text_space = spaces_of(frozen, stored)
        origin = {"origin": IMPORTED, "by": actor, "from": str(directory.resolve())}
        ledger.register_adapter(
            name, family, frozen.digest, image_space, text_space, origin, digest=directory_digest(stored)
        )
        ledger.audit(actor, "import adapter", f"adapter {name}", {**origin, "base": frozen.name})
        learned = Learned.of(ledger, SampleStore(settings.lake), family)
        update = ledger.begin_update(
            f"import-{name}",
            family=family,
            recipe={"name": IMPORTED, "family": family, "by": actor, "from": origin["from"]},
            seed=0,
            store_version=learned.store_version,
            data_from=learned.data_from,
            data_to={},
            incumbent=learned.incumbent,
            adapter=name,
            cost={ONLY_LOOK: True},
        )
        return Import(update, known=False)


def _bring_back(ledger: Ledger, artifacts: Artifacts, name: str, directory: Path, actor: str) -> None:
    row, digest = ledger.adapter(name), directory_digest(directory)
    if row.digest not in (None, digest):
        raise AdapterError(f"{name} has other files than the one in the ledger.", "Restore it from a backup.")
    ledger.register_adapter(
        name, row.family, row.base, row.image_space, row.text_space, row.meta, digest=row.digest or digest
    )
    artifacts.put_directory(directory, f"adapters/{name}")
    ledger.audit(actor, "bring back adapter", f"adapter {name}", {"from": str(directory)})


def gate_import(settings: Settings, imported: Import) -> tuple[UpdateRow, VerdictRow | None]:
    """Judge and propose an imported adapter, unless that was done before. Raises TrainingError: an updater runs here,
    an older update is unfinished, or the incumbent is undecided: the updater judges it later."""
    update = imported.update
    with closing(Ledger.open(settings.ledger)) as ledger:
        if not ledger.is_finished(update.id):
            with only_one(settings.home, wait=False):
                oldest = ledger.unfinished_update(update.family)
                if oldest is not None and oldest.id != update.id:
                    raise TrainingError(
                        f"{oldest.id} is not finished.", "Start the updater: it finishes both, one after the other."
                    )
                outcome = UpdaterService(settings, family=update.family).step()
            if outcome.update is None:
                raise TrainingError(
                    f"{update.id} cannot be judged now: {outcome.reason}.", "The updater does it later."
                )
        return ledger.update(update.id), ledger.verdict_of(update.id)


def _base_of(settings: Settings, directory: Path, name: str | None) -> tuple[Family, Base]:
    if not directory.is_dir():
        raise AdapterError(f"{directory} is not a directory.", "Name the one that PEFT's `save_pretrained` wrote.")
    about = named(directory)
    names: dict[Family, str] = {"clip": settings.base.clip, "vlm": settings.base.vlm}
    listed = f"base.clip is {names['clip']!r}, base.vlm is {names['vlm']!r}."
    if about.base_digest is None and name is None:
        raise AdapterError(
            f"{directory} does not say which base it is an adapter of.", f"Confirm it with --base NAME: {listed}"
        )
    families: list[Family] = [
        each for each in FAMILIES if names[each] and about.family in (None, each) and name in (None, names[each])
    ]
    if not families:
        what = f"base {name!r}" if name is not None else f"a base of the family {str(about.family)[:40]!r}"
        raise AdapterError(f"{what} is not served here.", f"{listed[0].upper()}{listed[1:]}")
    base = family_base(settings, families[0])
    if about.base_digest is not None and base.digest != about.base_digest:
        raise AdapterError(
            f"{directory}: base_digest is {about.base_digest[:12]}, and base {base.name!r} has {base.digest[:12]}.",
            "Import it where that base is served.",
        )
    return families[0], base


def export_adapter(settings: Settings, name: str, target: Path) -> Path:
    """Write an adapter of the ledger to the new directory ``target``; `ratchet adapters import` reads it as the same
    adapter. Raises LedgerError: there is no such adapter; AdapterError: its files are missing or damaged, or ``target``
    exists."""
    if target.exists():
        raise AdapterError(f"{target} exists already.", "Name a new directory.")
    with closing(Ledger.open(settings.ledger)) as ledger:
        row = ledger.adapter(name)
        source = fetch_recorded(Artifacts(settings.artifacts), ledger, name)
        card = model_card(ledger, row, source)
    with folder_next_to(target, ".export-") as work:
        shutil.copytree(source, work, dirs_exist_ok=True)
        (work / "README.md").write_text(card)
        work.chmod(0o755)
        work.rename(target)
    return target


def model_card(ledger: Ledger, row: AdapterRow, directory: Path) -> str:
    files = read_adapter(directory)
    update, verdict = ledger.update_of(row.name), ledger.verdict_on(row.name)
    releases = [str(r.number) for r in ledger.releases(RELEASES) if row.name in (r.clip, r.vlm)]
    facts = {
        "family": row.family,
        "base digest (SHA-256)": row.base,
        "rank": files.config["r"],
        "parameters replaced as a whole": len(whole_weights(files)),
        "update": update.id if update else "none",
        "recipe": update.recipe.get("name", "") if update else "none",
        "verdict of the gate": verdict.outcome if verdict else "none",
        "releases": ", ".join(reversed(releases)) or "none",
        "withdrawn": "yes" if row.withdrawn else "no",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    note = (
        "PEFT reads the low-rank part alone; the parameters that are replaced as a whole are in the file under "
        "their own names.\n\n"
        if whole_weights(files)
        else ""
    )
    return (
        f"---\nlibrary_name: peft\ntags:\n- lora\n- ratchet\n---\n\n# {row.name}\n\n| | |\n|---|---|\n{table}\n\n{note}"
        "`ratchet adapters import` takes this directory back, where the same base is served.\n"
    )
