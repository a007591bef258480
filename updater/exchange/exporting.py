"""An adapter as a PEFT directory for elsewhere, with a model card."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Final

from core.artifacts import Artifacts
from core.errors import AdapterError
from core.ledger import AdapterRow, Ledger
from core.settings import Settings
from serving.engines.adapters import read_adapter
from serving.engines.lora import whole_weights
from updater.adapters.recorded import fetch_recorded

CARD: Final = "README.md"
RELEASES: Final = 1000
"""Releases that are looked through for the adapter."""


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
