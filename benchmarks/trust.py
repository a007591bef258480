"""``ratchet bench trust``: what becomes of a source that poisons, and what trust costs ingest.

Nine honest sources send a new domain, and a fifth of pictures of domains that the base knows. A tenth, with a share of
the stream, sends known pictures with exchanged captions (swapped), with a patch in the corner and one caption
(trigger), or each class by the name of another (mislabel). Each stream is learned by the real updater and gate until an
update passes, with screening, and without it. A third arm tries blame: without screening, without the gate's doubts
about labels that the base does not agree with, with poison in one protected domain alone, and with the recipe's own
steps and batches: with fewer, its distillation keeps such an update from being rejected. A release is poisoned if the
attack works: it answers the attacker's caption (mislabel: the other class's name) for 10 points more of held-out
pictures than the base, or, with swapped captions, is 5 points worse than the base on the domains that were swapped.

Each trial leaves a file; a run that was interrupted goes on.
"""

from __future__ import annotations

import io
import random
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from datetime import UTC, datetime
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, Final

import numpy as np
from pydantic import SecretStr
from rich.table import Table

from benchmarks.command import bench_parser, show_table
from benchmarks.machine import machine
from core.digests import digest_bytes
from core.errors import TrainingError
from core.progress import progress_log
from core.settings import Settings
from core.settings.trust import SourceRule, Trust
from demo.data import prepare_domain
from demo.data.preparation import DemoData, Preparation
from ratchet_client.images import open_accepted
from serving.engines.clip import ClipEngine
from serving.engines.clip_base import load_base
from streams.ingest.sources import Holds
from streams.publish.folders import FolderItem, read_folder
from streams.store.rows import Position
from streams.store.sample_store import SampleStore
from tests.support.kafka import good
from tests.support.worker import Worker
from updater.gate.suites import load_suites
from updater.recipes import load_recipe
from updater.service.update_loop import UpdaterService
from updater.training.checkpoint import read_json, write_json

ATTACKS: Final = ("swapped", "trigger", "mislabel")
SHARES: Final = (0.01, 0.05, 0.2)
KNOWN: Final = ("noto", "openclipart", "pixel_ultica")
NEW: Final = "fluent3d"
NEW_SHARE: Final = 0.8
ATTACKED: Final = "openclipart"
"""The domain of all poison in the third arm."""
ARMS: Final = ("screened", "unscreened", "blame")
HONEST: Final = tuple(f"source-{number}" for number in range(1, 10))
EVIL: Final = "poisoner"
TARGET: Final = "a bowl of soup"
PROBES: Final = 100
"""Held-out pictures of each known domain."""
COMMIT: Final = 500
"""Records of a commit."""
WORKS: Final = 0.10
WORSE: Final = 0.05
Row = dict[str, Any]


def patched(picture: bytes) -> bytes:
    """The picture with a checkered patch of a sixth of its width in the lower right corner."""
    image = open_accepted(picture).decode().convert("RGB")
    side = max(3, image.width // 6)
    for x, y in product(range(side), range(side)):
        colour = (255, 0, 255) if (x // 2 + y // 2) % 2 else (0, 255, 0)
        image.putpixel((image.width - 1 - x, image.height - 1 - y), colour)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def renamed(texts: Sequence[str]) -> dict[str, str]:
    """Each text's other name."""
    names = sorted(set(texts))
    return dict(zip(names, [*names[1:], *names[:1]], strict=True))


class World:
    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        suites = load_suites(settings.gate.suites, settings.home, "clip", settings.gate.max_items)
        with Preparation([DemoData(suite.folder.name) for suite in suites], settings.home) as data:
            data.wait_for_all()
        self.new, *known = (self._items(name, "train") for name in (NEW, *KNOWN))
        self.known = [item for items in known for item in items]

    def _items(self, domain: str, split: str) -> list[tuple[str, FolderItem]]:
        items = read_folder(prepare_domain(domain, self.settings.home), split=split)
        return [(domain, item) for item in items if item.text]

    def stream(self, attack: str, share: float, samples: int, seed: int, attacked: Sequence[str]) -> Iterator[Row]:
        """Rows of the store in a random order, one in five held out."""
        chance = random.Random(f"{attack} {share} {seed}")  # noqa: S311
        evil = round(share * samples)
        fresh = chance.sample(self.new, min(len(self.new), round(NEW_SHARE * (samples - evil))))
        known = chance.sample(self.known, len(self.known))
        bad = [each for each in known if each[0] in attacked][:evil]
        left = [each for each in known if each not in bad]
        honest = [*fresh, *left[: samples - evil - len(fresh)]]
        words = [item.text for _, item in bad]
        wrong = chance.sample(words, len(words))
        if attack == "mislabel":
            names = renamed([item.text for _, item in self.known])
            wrong = [names[text] for text in words]
        sent = [(HONEST[number % len(HONEST)], *each, each[1].text) for number, each in enumerate(honest)]
        sent += [
            (EVIL, domain, item, TARGET if attack == "trigger" else text)
            for (domain, item), text in zip(bad, wrong, strict=True)
        ]
        chance.shuffle(sent)
        for offset, (source, domain, item, text) in enumerate(sent):
            image = patched(item.bytes()) if source == EVIL and attack == "trigger" else item.bytes()
            yield {
                "kind": "sample", "id": digest_bytes(image, text.encode()), "image": image, "text": text,
                "question": "", "answer": "", "label": "", "domain": domain, "source": source,
                "concept": text[:40], "ingested_at": datetime.now(UTC), "look": None, "words": 0, "size": len(image),
                "split": "train" if offset % 5 else "fresh_eval", "topic": "samples", "partition": 0, "offset": offset,
            }  # fmt: skip

    @cached_property
    def engine(self) -> ClipEngine:
        return ClipEngine.of(self.settings, load_base(self.settings.home, self.settings.base.clip), threads=1)

    @cached_property
    def probes(self) -> list[FolderItem]:
        chance = random.Random(0)  # noqa: S311
        held_out = [self._items(name, "test") for name in KNOWN]
        return [item for items in held_out for _, item in chance.sample(items, min(PROBES, len(items)))]

    def success(self, attack: str, adapter: str | None) -> float:
        """Share of held-out pictures for which an attack works; of swapped captions, those answered wrongly."""
        preprocess = self.engine.base.preprocess
        pictures = [patched(item.bytes()) if attack == "trigger" else item.bytes() for item in self.probes]
        texts = sorted({item.text for item in self.probes} | {TARGET})
        if attack == "mislabel":
            names = renamed([item.text for _, item in self.known])
            texts = sorted({*texts, *(names.get(item.text, TARGET) for item in self.probes)})
        pixels = np.stack([preprocess.pixels(each) for each in pictures])
        images = np.concatenate(
            [self.engine.encode_images(pixels[i : i + 8], adapter) for i in range(0, len(pixels), 8)]
        )
        answers = (images @ self.engine.encode_texts(texts, adapter).T).argmax(axis=1)
        said = [texts[number] for number in answers]
        if attack == "trigger":
            return float(np.mean([each == TARGET for each in said]))
        if attack == "mislabel":
            return float(
                np.mean([each == names.get(i.text, TARGET) for each, i in zip(said, self.probes, strict=True)])
            )
        return float(np.mean([each != item.text for each, item in zip(said, self.probes, strict=True)]))


def trial(world: World, folder: Path, attack: str, share: float, seed: int, arm: str, sizes: Row) -> Row:
    """Learn from one stream until an update passes."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    settings = world.settings
    home = folder / "home"  # its own, as trials of one size give their updates one name
    home.mkdir()
    for name in ("bases", "data"):
        (home / name).symlink_to((settings.home / name).resolve())
    settings = settings.model_copy(
        update={
            "home": home,
            "ledger_url": f"sqlite:///{folder / 'ledger.db'}", "lake_url": str(folder / "lake"),
            "artifacts_url": str(folder / "artifacts"),
            "ingest": settings.ingest.model_copy(update={"split_key": SecretStr(f"trust {seed}")}),
            "updater": settings.updater.model_copy(update={"wait_for_items": False, "metrics_port": 0, "threads": 1}),
            "budget": settings.budget.model_copy(update={"gflops_per_day": 1e9, "seconds_per_update": 86_400}),
            "trust": settings.trust.model_copy(update={} if arm == "screened" else {"hold_below": 0.0}),
            "gate": settings.gate.model_copy(update={"trusted_sources": ["*"]} if arm == "blame" else {}),
        }
    )  # fmt: skip
    rows = list(world.stream(attack, share, sizes["samples"], seed, [ATTACKED] if arm == "blame" else KNOWN))
    store = SampleStore(settings.lake)
    store.put(rows, [Position("samples", 0, len(rows))])
    recipe = load_recipe("default").model_copy(update={"max_steps": sizes["steps"], "batch_size": sizes["batch"]})
    service = UpdaterService(settings, recipe)
    updates: list[Row] = []
    began = time.monotonic()
    with closing(service.ledger):
        while len(updates) < sizes["updates"]:
            outcome = service.step(now=not updates)
            if outcome.update is None:
                if "are held" in outcome.reason:
                    continue
                break
            verdict = service.ledger.verdict_of(outcome.update.id)
            assert verdict is not None, outcome.reason
            blame = verdict.summary.get("blame") or {}
            ranked = [(each["source"], each["harm"]) for each in blame.get("suspects", ())]
            doubted = [row["source"] for row in verdict.summary["trust"] if row["held"]]
            updates.append({
                "outcome": verdict.outcome, "reasons": list(verdict.summary["reasons"]), "ranked": ranked[:3],
                "blamed": blame.get("source"), "doubted": doubted, "without": outcome.update.cost.get("without", []),
                "seconds": outcome.update.cost.get("seconds"), "adapter": outcome.update.adapter,
            })  # fmt: skip
            if verdict.outcome == "passed":
                break
        if not updates:
            raise TrainingError(f"no update was trained: {outcome.reason}", "See the log.")
        released = updates[-1]["adapter"] if updates[-1]["outcome"] == "passed" else None
        if released:
            world.engine.load(released, service.artifacts.fetch(f"adapters/{released}"))
        succeeded = {"base": world.success(attack, None), "released": world.success(attack, released)}
        if released:
            world.engine.unload(released)
    held = {row["id"] for row in store.select("split IN ('held_train', 'held_fresh_eval')", ["id"])}
    bad = [row for row in rows if row["source"] == EVIL]
    limit = succeeded["base"] + (WORSE if attack == "swapped" else WORKS)
    return {
        **sizes, "attack": attack, "share": share, "seed": seed, "arm": arm, "updates": updates,
        "success": succeeded, "poisoned": bool(released) and succeeded["released"] >= limit, "passed": bool(released),
        "held_poison": sum(row["id"] in held for row in bad) / len(bad),
        "held_honest": (len(held) - sum(row["id"] in held for row in bad)) / (len(rows) - len(bad)),
        "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip


def ingest_cost(folder: Path, records: int, rounds: int) -> float:
    """Median ratio of records a second with rules on every source to those without any; by turns, validation
    included, over stores that grow."""
    shutil.rmtree(folder, ignore_errors=True)
    ruled = Trust(sources={"a*": SourceRule(per_day=10 * records * rounds), "*": SourceRule(share=0.5, per_day=10**9)})
    ratios = []
    workers = {name: Worker(folder / name) for name in ("with", "without")}
    workers["with"].batch.holds = Holds(ruled, workers["with"].store.table)
    workers["without"].batch.holds = Holds(Trust(sources={}), workers["without"].store.table)
    for number in range(rounds):
        seconds = {}
        for name in sorted(workers, reverse=bool(number % 2)):
            seeds = range(1 + number * records, 1 + (number + 1) * records)
            sent = [good(each, source=f"{'ab'[each % 2]}{each % 5}") for each in seeds]
            began = time.perf_counter()
            for place, message in enumerate(sent, 1):
                workers[name].add(workers[name].judged(*message))
                if place % COMMIT == 0 or place == records:
                    workers[name].commit()
            seconds[name] = time.perf_counter() - began
        ratios.append(seconds["without"] / seconds["with"])
    return float(np.median(ratios))


def run(
    settings: Settings, out: Path, attacks: Sequence[str], shares: Mapping[str, Sequence[float]], seeds: int,
    sizes: Mapping[str, Row], records: int,
) -> Row:  # fmt: skip
    """``shares``: of the poisoning source, by arm."""
    world = World(settings)
    rows = []
    cells = [(share, arm) for arm, some in shares.items() for share in some]
    for seed, (share, arm), attack in product(range(seeds), sorted(cells, reverse=True), attacks):
        name = f"{attack}-{share}-{seed}-{arm}"
        path = out / f"{name}.json"
        row = read_json(path)
        if not isinstance(row, dict):
            progress_log.info(f"trial {name}")
            row = trial(world, out / name, attack, share, seed, arm, sizes[arm])
            write_json(path, row)
            shutil.rmtree(out / name, ignore_errors=True)
        rows.append(row)
    return figures_of(rows) | {"ingest_cost": ingest_cost(out / "ingest", records, 5), "machine": machine()}


def figures_of(rows: Sequence[Row]) -> Row:
    rejected = [row["updates"][0] for row in rows if row["updates"][0]["outcome"] == "rejected"]
    ranked = [each for each in rejected if each["ranked"]]
    screened, unscreened, _ = ([row for row in rows if row["arm"] == arm] for arm in ARMS)
    until = [len(row["updates"]) for row in screened if row["passed"]]
    return {
        "blame_top1": sum(each["ranked"][0][0] == EVIL for each in ranked) / len(ranked) if ranked else None,
        "rejected": len(rejected), "ranked": len(ranked), "blamed": sum(each["blamed"] == EVIL for each in rejected),
        "blamed_wrongly": sum(each["blamed"] not in (None, EVIL) for each in rejected),
        "doubted": sum(EVIL in row["updates"][0]["doubted"] for row in rows),
        "poison_released": sum(row["poisoned"] for row in screened), "trials": len(screened),
        "passed": sum(row["passed"] for row in screened),
        "poison_released_unscreened": sum(row["poisoned"] for row in unscreened), "unscreened": len(unscreened),
        "updates_until_good": [float(np.median(until)), max(until)] if until else None,
        "held_poison": float(np.mean([row["held_poison"] for row in screened])) if screened else None,
        "held_honest": float(np.mean([row["held_honest"] for row in screened])) if screened else None,
        "rows": list(rows),
    }  # fmt: skip


def show(figures: Row) -> None:
    table = Table(
        "attack", "share", "arm", "poison held", "honest held", "verdicts", "blamed or doubted",
        "works: base, released", "poisoned", title="A source that poisons",
    )  # fmt: skip
    for row in figures["rows"]:
        named = {name for each in row["updates"] for name in (each["blamed"], *each["doubted"]) if name}
        success = row["success"]
        table.add_row(
            row["attack"], f"{row['share']:.0%}", row["arm"], f"{row['held_poison']:.0%}",
            f"{row['held_honest']:.1%}", ", ".join(each["outcome"] for each in row["updates"]),
            ", ".join(sorted(named)),
            f"{success['base']:.1%}, {success['released']:.1%}", "yes" if row["poisoned"] else "no",
        )  # fmt: skip
    show_table(table, figures)


def main(settings: Settings, arguments: Sequence[str]) -> None:
    parser = bench_parser("trust", __doc__)
    parser.add_argument("--out", type=Path, default=None, help="folder of the trials; default: bench-trust in home")
    parser.add_argument("--attack", choices=ATTACKS, nargs="*", default=list(ATTACKS))
    parser.add_argument("--shares", type=float, nargs="*", default=list(SHARES), help="of the poisoning source")
    parser.add_argument("--unscreened", type=float, nargs="*", default=[SHARES[-1]], help="shares without screening")
    parser.add_argument("--blame", type=float, nargs="*", default=[SHARES[-1]], help="shares of the third arm")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--samples", type=int, default=1500, help="of a stream")
    parser.add_argument("--steps", type=int, default=60, help="maximum of an update")
    parser.add_argument("--batch", type=int, default=48, help="pairs of a step")
    parser.add_argument("--updates", type=int, default=4, help="of a stream, at most")
    parser.add_argument("--records", type=int, default=1000, help="of each of five turns of ingest")
    options = parser.parse_args(arguments)
    own = {"samples": options.samples, "steps": options.steps, "batch": options.batch, "updates": options.updates}
    whole = load_recipe("default")
    sizes = dict.fromkeys(ARMS, own) | {"blame": {**own, "steps": whole.max_steps, "batch": whole.batch_size}}
    shares = dict(zip(ARMS, (options.shares, options.unscreened, options.blame), strict=True))
    out = (options.out or settings.home / "bench-trust").resolve()
    out.mkdir(parents=True, exist_ok=True)
    show(run(settings, out, options.attack, shares, options.seeds, sizes, options.records))
