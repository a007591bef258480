"""The CLIP part of the demo: captioned images arrive, become searchable, and are learned."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from core.progress import progress_log, step, track
from demo.story.stage import SOME_ANSWERS_SECONDS, Stage
from demo.story.summary import Lesson
from ratchet_client import Client
from streams.kafka.clients import connect_producer
from streams.publish.folders import read_folder

DOMAIN = "fluent3d"
SEARCHES_AT_ONCE = 4
BETTER, WORSE = 4, 2  # searches on the page: largest gains and largest losses
HITS = 6  # hits shown
DEPTH = 100  # hits searched for the right image; deeper counts as one more


@dataclass(frozen=True)
class Hit:
    id: str
    text: str
    score: float


@dataclass(frozen=True)
class Search:
    """A query under one release: the first hits, and the rank (from 1) of the image whose caption is the query."""

    query: str
    hits: tuple[Hit, ...]
    rank: int

    def right(self, hit: Hit) -> bool:
        return hit.text.strip().lower() == self.query.strip().lower()


@dataclass(frozen=True)
class Change:
    before: Search
    after: Search

    @property
    def gain(self) -> float:
        """Ratio of ranks: 2 -> 1 counts as much as 20 -> 10."""
        return self.before.rank / self.after.rank


@dataclass(frozen=True)
class Comparison:
    title: str
    changes: tuple[Change, ...]


def stream(stage: Stage, began: float) -> tuple[float, float]:
    """Stream the new domain. ``began``: start of the demo (monotonic). Returns the seconds from there to the first
    search with a result, and from publishing an image until a search finds it."""
    stage.stream(DOMAIN)
    text = stage.store.scan(columns=["text"], having="text").column("text").to_pylist()[0]
    with step("waiting for the first search that finds something"):
        stage.until(lambda: bool(stage.client.search(text=text)), "the first search", stage.embedded, pause=0.1)
    first = time.monotonic() - began
    progress_log.info(f"“{text}” found pictures {first:.1f} s after the start")
    counts = [stage.store.count(split=split, having="text") for split in ("train", "fresh_eval")]
    progress_log.info(f"{counts[0]} to train on, {counts[1]} kept for the gate")
    with step("embedding them for search"):
        stage.until(lambda: stage.client.status()["catalog"]["coverage"] >= 1.0, "the catalog", stage.embedded)
    seconds = _event_to_searchable(stage)
    progress_log.info(f"one more image could be found {seconds:.1f} s after it was published")
    return first, seconds


def learn(stage: Stage) -> tuple[Lesson, Comparison]:
    """Train both updates, release the one that passes, roll it back and forward, and compare it with the base."""
    with stage.screen.chapter("naive"):
        naive = stage.learn("naive")
    with stage.screen.chapter("default"):
        default = stage.learn("default")
        swap = stage.await_release("clip", default)
        time.sleep(SOME_ANSWERS_SECONDS)
    fresh = stage.store.scan(split="fresh_eval", columns=["text"], having="text").column("text").to_pylist()
    queries = sorted(set(fresh))
    with stage.screen.chapter("rollback"):
        rollback_seconds = stage.back_and_forth(
            "clip", default.adapter, lambda number: bool(search(stage.client, queries[0], f"clip@{number}").hits)
        )
    with stage.screen.chapter("compare"):  # last: hundreds of searches would distort the latencies of the swap
        comparison = _compare(stage, queries)
    return stage.lesson(naive, default, swap, rollback_seconds), comparison


def _event_to_searchable(stage: Stage) -> float:
    """Publish one image in its own domain, and search for that domain until it is found."""
    item = next(iter(read_folder(stage.settings.home / "data" / DOMAIN, split="test")))
    with connect_producer(stage.settings.kafka) as producer:
        began = time.monotonic()
        producer.send(image=item.bytes(), text=item.text, domain="late_arrival", source="demo")
    stage.published += 1
    found = lambda: bool(stage.client.search(text=item.text, domain=["late_arrival"]))  # noqa: E731
    stage.until(found, "a search for one more image", stage.embedded, pause=0.05)
    return time.monotonic() - began


def _compare(stage: Stage, queries: list[str]) -> Comparison:
    """Search for every held-out caption under both resident releases, and keep the largest changes."""
    live = stage.client.live()

    def change(query: str) -> Change:
        before, after = (search(stage.client, query, f"clip@{number}") for number in (live - 1, live))
        return Change(before, after)

    with ThreadPoolExecutor(SEARCHES_AT_ONCE) as pool:
        changes = list(track(pool.map(change, queries), "searching before and after", total=len(queries)))
    better = sum(change.gain > 1 for change in changes)
    worse = sum(change.gain < 1 for change in changes)
    tops = [
        sum(side.rank == 1 for side in sides) for sides in zip(*((c.before, c.after) for c in changes), strict=True)
    ]
    title = (
        f"{len(changes)} searches for held-out captions among {stage.store.count(having='text')} images: "
        f"{better} better, {worse} worse; right image first {tops[0]} → {tops[1]} times. "
        f"Shown: the {BETTER} largest gains and the {WORSE} largest losses."
    )
    progress_log.info(title)
    ordered = sorted(changes, key=lambda change: change.gain)
    return Comparison(title, (*reversed(ordered[-BETTER:]), *reversed(ordered[:WORSE])))


def search(client: Client, query: str, model: str) -> Search:
    """Search the catalog by text under a resident release (``clip@1``)."""
    hits = [Hit(hit["id"], hit["text"] or "", hit["score"]) for hit in client.search(text=query, k=DEPTH, model=model)]
    found = Search(query, tuple(hits[:HITS]), DEPTH + 1)
    return replace(found, rank=next((place for place, hit in enumerate(hits, 1) if found.right(hit)), DEPTH + 1))
