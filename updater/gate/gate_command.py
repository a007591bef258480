"""The gate from a command line or a Python prompt: `ratchet gate run`, `pairs` and `calibrate`, and scores for `ratchet
tune`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from core.artifacts import Artifacts
from core.errors import AdapterError, GateError
from core.ledger import Ledger
from core.settings import Settings
from serving.engines.adapters import ABOUT, adapter_name, read_adapter
from serving.engines.calibration import Calibration
from serving.engines.clip import ClipEngine
from serving.engines.clip_base import ClipBase, load_base
from serving.engines.heads import read_heads
from serving.engines.processor import Precision
from serving.engines.vlm.vlm_base import VlmBase, load_vlm_base
from streams.store.sample_store import SampleStore
from updater.data.draw import HAVING
from updater.gate.calibration import FEWEST_QUERIES, calibrate, kept_lengths, store_calibration
from updater.gate.clip import live_clip
from updater.gate.diagnostics import HardPair, StoreCounts, hard_pairs
from updater.gate.interim_analyses import AnalysisPlan
from updater.gate.report import HTML_NAME, write_report
from updater.gate.run import open_evaluator, run_gate
from updater.gate.sample_suites import TEXT_COLUMNS, HeldOut, fresh_suites, head_suites
from updater.gate.score import Scorer
from updater.gate.suite_items import Seal
from updater.gate.suites import Family, Suite, load_suites
from updater.gate.verdict import Verdict

ITEMS: Final = 300
"""Maximum per suite: a minute or two for a ViT-B-32 on two cores."""


def gate_command(
    settings: Settings,
    candidate: str,
    incumbent: str | None = None,
    suites: Sequence[Path] | None = None,
    out: Path | None = None,
) -> tuple[Verdict, Path]:
    """Judge an adapter by hand; nothing is recorded or released. Returns the verdict and the report's HTML file.
    ``candidate``: an adapter's name, or its directory; ``incumbent``: the same, or "base"; by default the live one.
    ``suites``: YAML files or folders instead of the setting `gate.suites`. ``out``: folder of the report; by default
    `home/gate/<candidate>`. Raises GateError, AdapterError, BaseModelError."""
    artifacts = Artifacts(settings.artifacts)
    family = _family(candidate)
    base = _base(settings, family)
    paths = suites if suites is not None else settings.gate.suites
    with closing(Ledger.open(settings.ledger)) as ledger:
        stable, used, audited = ledger.stable(), ledger.judgements_of(family), ledger.audited_data(family)
    held_out, fresh = _fresh(settings, family, audited)
    seal = held_out.seal
    loaded = load_suites(paths, settings.home, family, settings.gate.max_items)
    loaded = [suite.part("judged", seal) for suite in loaded]
    counted = held_out.store, held_out.version, held_out.having
    before = None if incumbent == "base" else incumbent
    if incumbent is None:
        before = stable.adapter(family) if stable else None
    meta: dict[str, Any] = {"started_by": "ratchet gate run"}
    name = candidate
    with open_evaluator(settings, base) as evaluator:
        if before is not None:
            before, directory = _locate(artifacts, before)
            evaluator.load(before, directory)
        try:
            name, directory = _locate(artifacts, candidate)
            everything = HeldOut(held_out.store, held_out.version, None, seal)
            loaded += head_suites(settings, everything, read_heads(directory))
            evaluator.load(name, directory)
            size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
            meta |= {"rank": int(read_adapter(directory).config.get("r") or 0), "bytes": size}
        except AdapterError as error:
            if not Path(candidate).is_dir() and not artifacts.exists(f"adapters/{candidate}"):
                raise  # an unknown name is a typo; an adapter that does not load gets a verdict
            meta["load_error"] = error.message
        verdict = run_gate(
            evaluator=evaluator,
            candidate=name,
            incumbent=before,
            suites=loaded,
            fresh=fresh,
            used=used,
            counts=StoreCounts(*counted, settings.home / "cache" / "gate"),
            plan=AnalysisPlan.alone(settings.gate.alpha),
            settings=settings.gate,
            meta=meta,
        )
    folder = out or settings.home / "gate" / Path(name).name
    write_report(verdict, folder)
    return verdict, folder / HTML_NAME


def _family(candidate: str) -> Family:
    directory = Path(candidate)
    name = directory.name
    if directory.is_dir():
        with suppress(OSError, ValueError, AttributeError):  # the gate reports what is wrong with it
            name = str(json.loads((directory / ABOUT).read_text()).get("name"))
    return "vlm" if name.startswith("vlm-") else "clip"


def _base(settings: Settings, family: Family) -> ClipBase | VlmBase:
    if family == "clip":
        return load_base(settings.home, settings.base.clip)
    if not settings.base.vlm:
        raise GateError("base.vlm is empty: there is no VLM to judge an adapter of.", "Set it (`ratchet base list`).")
    return load_vlm_base(settings.home, settings.base.vlm)


def _locate(artifacts: Artifacts, adapter: str) -> tuple[str, Path]:
    directory = Path(adapter)
    if directory.is_dir():
        return adapter_name(directory), directory
    return adapter, artifacts.fetch(f"adapters/{adapter}")


def pairs_command(settings: Settings, name: str) -> list[HardPair]:
    """Pairs of a retrieval suite that the CLIP base cannot tell apart, the most similar first. ``name``: of a suite of
    `gate.suites`, or `fresh.<domain>` over all held-out samples of the store. Raises GateError: there is no such suite,
    or it cannot be read; BaseModelError: the base is not there."""
    suites = load_suites(settings.gate.suites, settings.home, "clip", settings.gate.max_items)
    known = [suite for suite in suites if suite.task == "retrieval"]
    if name not in {suite.name for suite in known}:
        known += _fresh(settings, "clip", {})[1]
    suite = next((suite for suite in known if suite.name == name), None)
    if suite is None:
        names = ", ".join(suite.name for suite in known) or "gate.suites"
        raise GateError(f"there is no retrieval suite {name[:64]!r}.", f"Name one of {names}, or fresh.DOMAIN.")
    engine = ClipEngine.of(settings, load_base(settings.home, settings.base.clip), threads=settings.updater.threads)
    return hard_pairs(Scorer(engine), suite)


def calibrate_command(settings: Settings) -> tuple[str, Calibration]:
    """Calibrate the live CLIP adapter, or the base alone, by the gate's suites and the held-out samples of the store,
    and store it in place of an earlier calibration. Returns what was calibrated, and how. Raises GateError: a
    suite cannot be read, or too few pairs are held out; AdapterError, BaseModelError."""
    scorer, adapter = live_clip(settings)
    with closing(Ledger.open(settings.ledger)) as ledger:
        audited = ledger.audited_data("clip")
    held_out, fresh = _fresh(settings, "clip", audited)
    loaded = load_suites(settings.gate.suites, settings.home, "clip", settings.gate.max_items)
    suites = [*(suite.part("judged", held_out.seal) for suite in loaded), *fresh]
    curves = calibrate(scorer, suites, adapter)
    if not curves:
        raise GateError(
            f"the suites have too few queries to calibrate by: {FEWEST_QUERIES} of a kind are needed.",
            "Add items to gate.suites, or publish samples with captions: one in five is held out.",
        )
    found = Calibration(curves, kept_lengths(scorer, suites, adapter, settings.gate))
    store_calibration(Artifacts(settings.artifacts), scorer, adapter, found)
    return adapter or f"base {scorer.engine.base.name}", found


def _fresh(settings: Settings, family: Family, audited: Mapping[str, int]) -> tuple[HeldOut, list[Suite]]:
    store, gate = SampleStore(settings.lake), settings.gate
    held_out = HeldOut(store, store.version(), HAVING[family], Seal.of(settings, store, audited))
    rows = held_out.rows(TEXT_COLUMNS)
    return held_out, fresh_suites(rows, held_out, family=family, min_items=gate.min_items, limit=gate.max_items)


@dataclass(frozen=True, slots=True)
class PrecisionScore:
    suite: str
    items: int
    float32: float
    served: float
    noise: float
    """Standard error of the float32 score over the sampled items; at least one item's worth."""

    @property
    def within_noise(self) -> bool:
        """True if the difference is within the variation of drawing other items."""
        return abs(self.served - self.float32) <= self.noise


def precision_scores(
    base: ClipBase, precision: Precision, suites: Sequence[Suite], threads: int
) -> list[PrecisionScore]:
    """Scores of the base in a precision and in float32. Raises GateError if a suite's image cannot be read."""
    limited = [suite.model_copy(update={"limit": min(suite.limit, ITEMS)}) for suite in suites]
    scores: list[list[tuple[int, float]]] = []
    for each in ("float32", precision):
        scorer = Scorer(ClipEngine(base, threads=threads, precision=each))
        outcomes = [scorer.score(suite, None, label=each) for suite in limited]
        scores.append([(len(outcome.ids), float(outcome.hits.mean())) for outcome in outcomes])
    return [
        PrecisionScore(suite.name, items, plain, served, max(math.sqrt(plain * (1 - plain) / items), 1 / items))
        for suite, (items, plain), (_, served) in zip(limited, *scores, strict=True)
    ]
