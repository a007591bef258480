"""``ratchet bench calibration``: whether a client's threshold keeps its meaning over eight releases.

The real updater learns a stream of a new domain (four fifths) and of domains that the base knows, in as many updates as
asked for; each candidate is released whatever the gate says, since a change of the embedding space is what is measured.
A client has pictures that no gate and no calibration asks for. It searches by their captions (kind *text*): the sealed
quarter of the known suites' items, among as many pictures as the gate's, and the new domain's test split. It also
classifies the sealed quarter of the suites of classes (kind *label*). At the base it fixes one threshold for each kind
by a false-match rate (the share of the false pairs among the first ten hits of its queries that reach it), as a score,
and as the probability that the base's calibration gives for it. Both stay: how far does the false-match rate move with
each release? ``false`` is the share of false hits among those that reach the threshold, ``ece`` the expected
calibration error on the client's pairs.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from itertools import product
from pathlib import Path
from typing import Any, Final

import numpy as np
from pydantic import SecretStr
from rich.table import Table

from benchmarks.command import bench_parser, show_table
from benchmarks.machine import machine
from benchmarks.trust import KNOWN, NEW, World
from core.errors import TrainingError
from core.progress import progress_log
from core.settings import Settings
from demo.data import prepare_domain
from serving.engines.calibration import Calibration, Kind, calibration_key, parse_calibration
from streams.store.rows import Position
from updater.gate.calibration import Pairs, calibration_error, first_hits, pairs_of
from updater.gate.score import Scorer
from updater.gate.statistics import Floats
from updater.gate.suite_items import Item, Seal, of_part
from updater.gate.suites import Suite, load_suites
from updater.recipes import load_recipe
from updater.service.update_loop import UpdaterService
from updater.training.checkpoint import write_json

Row = dict[str, Any]
KINDS: Final[tuple[Kind, ...]] = ("text", "label")


def own_settings(settings: Settings, folder: Path) -> Settings:
    return settings.model_copy(
        update={
            "ledger_url": f"sqlite:///{folder / 'ledger.db'}", "lake_url": str(folder / "lake"),
            "artifacts_url": str(folder / "artifacts"),
            "ingest": settings.ingest.model_copy(update={"split_key": SecretStr("calibration")}),
            "updater": settings.updater.model_copy(update={"wait_for_items": False, "metrics_port": 0, "threads": 1}),
            "budget": settings.budget.model_copy(update={"gflops_per_day": 1e9}),
            "trust": settings.trust.model_copy(update={"hold_below": 0.0}),
            "gate": settings.gate.model_copy(update={"audit_every": 1000}),
        }
    )  # fmt: skip


class Client:
    """With one threshold for each kind, on queries of its own."""

    def __init__(self, settings: Settings, scorer: Scorer, seal: Seal, rate: float) -> None:
        self.scorer = scorer
        self.suites = load_suites(settings.gate.suites, settings.home, "clip", settings.gate.max_items)
        self.seal = seal
        self.new = Suite(name="client", task="retrieval", data=str(prepare_domain(NEW, settings.home)), split="test")
        self.score: dict[Kind, float] = {}
        for kind in KINDS:
            pairs = self.pairs(kind, None)
            self.score[kind] = float(np.quantile(pairs.similarity[~pairs.match], 1.0 - rate))

    def pairs(self, kind: Kind, adapter: str | None) -> Pairs:
        if kind == "label":
            sealed = [suite.part("sealed", self.seal) for suite in self.suites if suite.task == "classification"]
            return Pairs.joined([dict(pairs_of(self.scorer, suite, adapter))[kind] for suite in sealed])
        return Pairs.joined([self.search(*each, adapter) for each in self.searches()])

    def searches(self) -> Iterator[tuple[Sequence[Item], Sequence[Item]]]:
        """Items whose captions are asked, and those among which they are searched."""
        for suite in self.suites:
            if suite.task == "retrieval" and suite.folder.name in KNOWN:
                sealed, judged = (of_part(suite.items(), part, self.seal) for part in ("sealed", "judged"))
                yield sealed, [*sealed, *judged[: len(judged) - len(sealed)]]
        yield self.new.items(), self.new.items()

    def search(self, asked: Sequence[Item], pool: Sequence[Item], adapter: str | None) -> Pairs:
        captions = sorted({item.text for item in asked})
        images = self.scorer.images(pool, adapter, "client")
        right = np.array([[item.text == text for item in pool] for text in captions])
        return first_hits(self.scorer.texts(captions, adapter, "client") @ images.T, right)

    def figures(self, adapter: str | None, calibration: Calibration, least: Mapping[Kind, float]) -> Row:
        """``least``: the probability thresholds."""
        row: Row = {}
        for kind in KINDS:
            pairs, curve = self.pairs(kind, adapter), calibration.curves[kind]
            given = curve(pairs.similarity)
            ece, low, high = calibration_error(pairs, given)
            row[kind] = {
                "hits": int(pairs.match.sum()), "pairs": len(pairs.match), "ece": ece, "ece_ci": [low, high],
                "gate_ece": curve.error, "gate_ece_high": curve.ci_high,
                "by_score": told(pairs, pairs.similarity, self.score[kind]),
                "by_probability": told(pairs, given, least[kind]),
            }  # fmt: skip
        return row


def told(pairs: Pairs, values: Floats, least: float) -> Row:
    got = values >= least
    false = got & ~pairs.match
    return {
        "got": int(got.sum()), "false": float(false.sum() / max(got.sum(), 1)),
        "fmr": float(false.sum() / max((~pairs.match).sum(), 1)),
        "found": float(pairs.match[got].sum() / pairs.match.sum()),
    }  # fmt: skip


def run(settings: Settings, out: Path, updates: int, steps: int, samples: int, rate: float) -> Row:
    """Measure and return the figures. Raises TrainingError if an update fails."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    own, world = own_settings(settings, out), World(settings)
    rows = list(world.stream("none", 0.0, samples, 0, KNOWN))
    recipe = load_recipe("default").model_copy(update={"max_steps": steps, "batch_size": 48})
    service = UpdaterService(own, recipe)
    measured: list[Row] = []
    began = time.monotonic()
    with closing(service.ledger):
        service.ledger.commit_release(1, clip=None, vlm=None, actor="bench", reason="base", proposal_id=None)
        seal = Seal.of(own, service.store, {})
        client = Client(own, Scorer(world.engine), seal, rate)

        def calibration(adapter: str | None) -> Calibration:
            spaces = world.engine.spaces(adapter)
            return parse_calibration(service.artifacts.read_bytes(calibration_key(spaces.image, spaces.text)))

        for number in range(updates):
            start, end = (len(rows) * each // updates for each in (number, number + 1))
            service.store.put(rows[start:end], [Position("samples", 0, end)])
            outcome = service.step(now=True)
            if outcome.update is None or outcome.update.adapter is None or outcome.update.state != "done":
                raise TrainingError(f"update {number + 1} was not trained: {outcome.reason}.", "See the log.")
            adapter = outcome.update.adapter
            verdict = service.ledger.verdict_of(outcome.update.id)
            world.engine.load(adapter, service.artifacts.fetch(f"adapters/{adapter}"))
            if not measured:  # the first gate has calibrated the base, too
                first = calibration(None)
                least = {kind: float(first.curves[kind](client.score[kind])) for kind in KINDS}
                measured.append({"release": "base", "verdict": "", **client.figures(None, first, least)})
            row = client.figures(adapter, calibration(adapter), least)
            said = verdict.outcome if verdict else ""
            measured.append({"release": str(number + 2), "verdict": said, "adapter": adapter, **row})
            write_json(out / "rows.json", {"rows": measured})
            progress_log.info(f"release {number + 2} of {updates + 1} measured")
            service.ledger.commit_release(
                number + 2, clip=adapter, vlm=None, actor="bench", reason="forced", proposal_id=None
            )
            world.engine.unload(adapter)
    return {
        **figures_of(measured), "score": client.score, "probability": least, "steps": steps, "samples": len(rows),
        "seconds": round(time.monotonic() - began), "machine": machine(),
    }  # fmt: skip


def figures_of(rows: Sequence[Row]) -> Row:
    """By kind, the largest relative moves of the base's rates, with a threshold of probability and one of score."""

    def moved(threshold: str, rate: str) -> dict[str, float]:
        rates = {kind: [float(row[kind][threshold][rate]) for row in rows] for kind in KINDS}
        return {kind: max(abs(each / first - 1.0) for each in later) for kind, (first, *later) in rates.items()}

    return {
        "moved_with": moved("by_probability", "fmr"), "moved_without": moved("by_score", "fmr"),
        "false_moved_with": moved("by_probability", "false"), "false_moved_without": moved("by_score", "false"),
        "ece": {kind: [row[kind]["ece"] for row in rows] for kind in KINDS}, "rows": list(rows),
    }  # fmt: skip


def show(figures: Mapping[str, Any]) -> None:
    least = ", ".join(f"{kind} {figures['score'][kind]:.3f} or {figures['probability'][kind]:.2f}" for kind in KINDS)
    table = Table(
        "release", "verdict", "kind", "false-match rate, by score", "by probability", "false hits, by score",
        "by probability ", "calibration error", title=f"Thresholds of score, or probability: {least}",
    )  # fmt: skip
    for row, kind in product(figures["rows"], KINDS):
        score, probability = row[kind]["by_score"], row[kind]["by_probability"]
        shown = (score["fmr"], probability["fmr"], score["false"], probability["false"], row[kind]["ece"])
        table.add_row(row["release"], row["verdict"], kind, *(f"{each:.2%}" for each in shown))
    show_table(table, figures)


def main(settings: Settings, arguments: Sequence[str]) -> None:
    parser = bench_parser("calibration", __doc__)
    parser.add_argument("--out", type=Path, default=None, help="folder of the run; default: bench-calibration in home")
    parser.add_argument("--updates", type=int, default=8)
    parser.add_argument("--steps", type=int, default=30, help="maximum of an update, of 48 pairs each")
    parser.add_argument("--samples", type=int, default=1900, help="of the stream")
    parser.add_argument("--rate", type=float, default=0.03, help="of false matches, at the base's threshold")
    options = parser.parse_args(arguments)
    out = (options.out or settings.home / "bench-calibration").resolve()
    show(run(settings, out, options.updates, options.steps, options.samples, options.rate))
