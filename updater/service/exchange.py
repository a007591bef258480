"""Adapters from elsewhere and for elsewhere, as PEFT directories.

An imported adapter becomes an update that is trained already: the updater judges and proposes it as its own. The update
has learned no data of this store: ``data_to`` is empty, so that once it is live the next update begins with all of it.
What it is compared with is set when it is judged (:func:`compare`): another release may come before.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypedDict

from core.artifacts import Artifacts, directory_digest
from core.errors import AdapterError
from core.ledger import AdapterRow, Ledger, UpdateRow
from core.settings import Settings
from serving.engines.adapters import MAX_RANK, adapter_name, read_adapter
from serving.engines.lora import whole_weights
from streams.store.sample_store import SampleStore
from updater.adapters.recorded import fetch_recorded
from updater.families import FAMILIES, family_base, spaces_of
from updater.recipes import Family
from updater.service import triggers
from updater.service.kept_candidates import ONLY_LOOK
from updater.service.peft_files import convert, named
from updater.step.learner import Base

IMPORTED: Final = "imported"
"""Name in the place of a recipe's."""
CARD: Final = "README.md"
RELEASES: Final = 1000
"""Releases that are looked through for the adapter."""


class _Comparison(TypedDict):
    store_version: int
    data_from: dict[str, int]
    incumbent: str | None


@dataclass(frozen=True)
class Import:
    """An imported adapter: the update that it is, and whether the ledger had one of this adapter before."""

    update: UpdateRow
    known: bool


def is_import(update: UpdateRow) -> bool:
    """Whether an update's adapter came from elsewhere."""
    return update.recipe.get("name") == IMPORTED


def import_adapter(settings: Settings, directory: Path, *, actor: str, base: str | None = None) -> Import:
    """Check a PEFT directory, store its adapter, and record an update in the state ``trained``. Safe to repeat.

    Args:
        directory: ``adapter_config.json`` and ``adapter_model.safetensors``; with ``ratchet.json`` if it was exported.
        actor: who imports it, for the ledger.
        base: name of the base that it is an adapter of; needed where there is no ``ratchet.json``.

    Raises:
        AdapterError: it does not fit; says what and why.
        LedgerError, ArtifactsUnavailable: a store is away.
    """
    family, frozen = _base_of(settings, directory, base)
    artifacts, ledger = Artifacts(settings.artifacts), Ledger.open(settings.ledger)
    try:
        with tempfile.TemporaryDirectory() as folder:
            converted = Path(folder) / "adapter"
            name = convert(directory, frozen, settings.serve.vlm_max_rank if family == "vlm" else MAX_RANK, converted)
            _check_name(directory, name)
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
        update = ledger.begin_update(
            f"import-{name}",
            family=family,
            recipe={"name": IMPORTED, "family": family, "by": actor, "from": origin["from"]},
            seed=0,
            data_to={},
            adapter=name,
            cost={ONLY_LOOK: True},
            **_comparison(ledger, SampleStore(settings.lake), family),
        )
        return Import(update, known=False)
    finally:
        ledger.close()


def _bring_back(ledger: Ledger, artifacts: Artifacts, name: str, directory: Path, actor: str) -> None:
    """Store the files of a known adapter again, which the garbage collector had taken."""
    row, digest = ledger.adapter(name), directory_digest(directory)
    if row.digest not in (None, digest):
        raise AdapterError(f"{name} has other files than the one in the ledger.", "Restore it from a backup.")
    ledger.register_adapter(
        name, row.family, row.base, row.image_space, row.text_space, row.meta, digest=row.digest or digest
    )
    artifacts.put_directory(directory, f"adapters/{name}")
    ledger.audit(actor, "bring back adapter", f"adapter {name}", {"from": str(directory)})


def compare(ledger: Ledger, store: SampleStore, update: UpdateRow, family: Family) -> UpdateRow:
    """Let an import be judged against what is live now, on the fresh samples that this has not learned."""
    return ledger.compare_update(update.id, **_comparison(ledger, store, family))


def _comparison(ledger: Ledger, store: SampleStore, family: Family) -> _Comparison:
    incumbent = triggers.incumbent_of(ledger, family)
    data_from = triggers.learned(ledger.updates(triggers.HISTORY, family), incumbent)
    return {"store_version": store.version(), "data_from": data_from, "incumbent": incumbent}


def _base_of(settings: Settings, directory: Path, name: str | None) -> tuple[Family, Base]:
    """The base in the settings that an adapter belongs to, by its digest or by name."""
    if not directory.is_dir():
        raise AdapterError(f"{directory} is no directory.", "Name the directory that PEFT's `save_pretrained` wrote.")
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


def _check_name(directory: Path, name: str) -> None:
    claimed = named(directory).name
    if claimed is not None and claimed != name:
        raise AdapterError(
            f"{directory}: its name is {claimed[:40]!r}, and its files are {name}; they are damaged or were changed.",
            "Export it again; if it was changed on purpose, remove ratchet.json and give --base.",
        )


def export_adapter(settings: Settings, name: str, target: Path) -> Path:
    """Write an adapter of the ledger to the new directory ``target``; `ratchet adapters import` takes it back as the
    same adapter.

    Raises:
        LedgerError: there is no such adapter.
        AdapterError: its files are away or damaged, or ``target`` exists.
    """
    if target.exists():
        raise AdapterError(f"{target} exists already.", "Name a new directory.")
    ledger = Ledger.open(settings.ledger)
    try:
        row = ledger.adapter(name)
        source = fetch_recorded(Artifacts(settings.artifacts), ledger, name)
        card = model_card(ledger, row, source)
    finally:
        ledger.close()
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".export-", dir=target.parent))
    try:
        shutil.copytree(source, work, dirs_exist_ok=True)
        (work / CARD).write_text(card)
        work.chmod(0o755)
        work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def model_card(ledger: Ledger, row: AdapterRow, directory: Path) -> str:
    """A card in the form of the Hugging Face hub: what the adapter is of, where it came from, how it was judged."""
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
