"""`ratchet gate run` and `ratchet gate report`, as functions that a Python prompt can call too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ops.artifacts import Artifacts
from ops.errors import AdapterError, GateError
from ops.ledger import Ledger
from ops.settings import Settings
from serving.engines.adapters import adapter_name, read_adapter
from serving.engines.base import load_base
from serving.engines.clip import ClipEngine
from streams.store import SampleStore
from updater.gate.report import HTML_NAME, JSON_NAME, write_report
from updater.gate.run import run_gate
from updater.gate.suites import fresh_suites, load_suites
from updater.gate.verdict import Verdict


def gate_command(
    settings: Settings,
    candidate: str,
    incumbent: str | None = None,
    suites: Sequence[Path] | None = None,
    out: Path | None = None,
) -> tuple[Verdict, Path]:
    """Judge an adapter by hand; nothing is recorded or released.

    Args:
        candidate: an adapter's name, or its directory.
        incumbent: an adapter's name or directory, or "base"; by default what is live.
        suites: YAML files or folders instead of the setting `gate.suites`.
        out: folder of the report; by default `home/gate/<candidate>`.

    Returns:
        the verdict, and the report's HTML file.

    Raises:
        GateError, AdapterError, BaseModelError: the suites, the incumbent or the base cannot be used.
    """
    asked = load_suites(suites if suites is not None else settings.gate.suites, settings.home)
    fresh = fresh_suites(SampleStore(settings.lake).scan(split="fresh_eval"), min_items=settings.gate.min_items)
    engine = ClipEngine(load_base(settings.home, settings.base.clip), threads=settings.updater.threads)
    artifacts = Artifacts(settings.artifacts)
    before = _live(settings) if incumbent is None else None if incumbent == "base" else incumbent
    if before is not None:
        name, directory = _locate(artifacts, before)
        engine.load(name, directory)
        before = name
    meta: dict[str, Any] = {"started_by": "ratchet gate run"}
    name = candidate
    try:
        name, directory = _locate(artifacts, candidate)
        engine.load(name, directory)
        meta |= _about(directory)
    except AdapterError as error:
        if not Path(candidate).is_dir() and not artifacts.exists(f"adapters/{candidate}"):
            raise  # a name that is nowhere is a typing error; an adapter that will not load is a verdict
        meta["load_error"] = error.message
    verdict = run_gate(
        engine=engine,
        candidate=name,
        incumbent=before,
        suites=asked,
        fresh=fresh,
        looks=0,
        settings=settings.gate,
        meta=meta,
    )
    folder = out or settings.home / "gate" / Path(name).name
    write_report(verdict, folder)
    return verdict, folder / HTML_NAME


def report_command(settings: Settings, update: str | None = None, out: Path | None = None) -> Path:
    """Bring the report of an update (the last judged one by default) into a local folder; returns the HTML file.

    Raises:
        GateError: there is no verdict yet, or none for this update.
    """
    ledger = Ledger.open(settings.ledger)
    try:
        verdicts = ledger.verdicts(limit=1) if update is None else [ledger.verdict_of(update)]
    finally:
        ledger.close()
    if not verdicts or verdicts[0] is None:
        what = f"of update {update}" if update else "yet"
        raise GateError(f"there is no verdict {what}.", "See `ratchet status` for updates.")
    update_id = verdicts[0].update_id
    artifacts = Artifacts(settings.artifacts)
    folder = out or settings.home / "gate" / update_id
    folder.mkdir(parents=True, exist_ok=True)
    for name in (JSON_NAME, HTML_NAME):
        (folder / name).write_bytes(artifacts.read_bytes(f"reports/{update_id}/{name}"))
    return folder / HTML_NAME


def _live(settings: Settings) -> str | None:
    ledger = Ledger.open(settings.ledger)
    try:
        live = ledger.live()
    finally:
        ledger.close()
    return live.clip if live else None


def _locate(artifacts: Artifacts, adapter: str) -> tuple[str, Path]:
    """Name and directory of an adapter given by either."""
    directory = Path(adapter)
    if directory.is_dir():
        return adapter_name(directory), directory
    return adapter, artifacts.fetch(f"adapters/{adapter}")


def _about(directory: Path) -> dict[str, Any]:
    files = read_adapter(directory)
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    return {"rank": int(files.config.get("r") or 0), "bytes": size}
