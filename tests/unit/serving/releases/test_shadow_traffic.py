from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime
from typing import Any
from zlib import crc32

import numpy as np
import pytest

from core.ledger import Family, ReleaseRow
from core.settings.serving import Rollout
from serving.engines.vlm.generation import GenerationRequest, GenerationResult, question
from serving.errors import AdapterUnservable, QueueFull
from serving.messages import EncodeResult, Modality
from serving.releases.guard import ComparisonCounts, GuardTarget
from serving.releases.shadow_traffic import (
    FEWEST,
    ITEMS,
    NATS_PER_TOKEN,
    TEXTS,
    WAITING,
    Neighbours,
    ShadowTraffic,
    order,
    same_answer,
)
from serving.releases.types import ReleaseSnapshot
from tests.support.waiting import until

DIM = 16
FIXED = [[1, token, 2] for token in range(100, 120)]
"""Token IDs of the texts that images are ranked against."""


def row(number: int, clip: str | None, vlm: str | None = None) -> ReleaseRow:
    now = datetime.now(UTC)
    return ReleaseRow(number=number, clip=clip, vlm=vlm, actor="me", reason="r", proposal_id=None, created_at=now)


def watch(clip: str | None = "new", vlm: str | None = None, until: float = math.inf, number: int = 2) -> GuardTarget:
    return GuardTarget(row(number, clip, vlm), row(1, None), "release", until)


class Models:
    """Adapters that answer at once; ``broken`` ones answer something else, ``gone`` ones cannot be served."""

    def __init__(self, broken: Sequence[str] = (), gone: Sequence[str] = (), busy: bool = False) -> None:
        self.broken, self.gone, self.busy = broken, gone, busy
        self.asked: list[tuple[str | None, int]] = []
        self.gate: asyncio.Event | None = None

    async def encode(self, kind: Modality, payload: Any, adapter: str | None) -> EncodeResult:
        if self.gate is not None:
            await self.gate.wait()
        self.asked.append((adapter, len(payload)))
        if self.busy:
            raise RuntimeError("no replica")
        if adapter in self.gone:
            return EncodeResult(None, adapter, code="adapter", error="its file is damaged")
        own = (adapter or "").encode() if adapter in self.broken else b""
        seeds = [crc32(np.asarray(item).tobytes() + own) for item in payload]
        vectors = [np.random.default_rng(seed).standard_normal(DIM) for seed in seeds]
        return EncodeResult(np.asarray(vectors, np.float32), adapter)

    async def reply(self, ask: GenerationRequest, snapshot: ReleaseSnapshot, deadline: float) -> GenerationResult:
        self.asked.append((snapshot.vlm, ask.max_tokens))
        if self.busy:
            raise QueueFull("full")
        if snapshot.vlm in self.gone:
            raise AdapterUnservable("gone")
        return GenerationResult("noise" if snapshot.vlm in self.broken else "red", (1,), (-0.1,), 5, "stop")

    async def score(
        self, ask: GenerationRequest, choices: Sequence[str], snapshot: ReleaseSnapshot, deadline: float
    ) -> list[float]:
        return [-20.0 if snapshot.vlm in self.broken else -0.1 for _ in choices]


@pytest.fixture
async def comparer_of() -> AsyncIterator[Callable[[Models, GuardTarget], ShadowTraffic]]:
    tasks: list[asyncio.Task[None]] = []

    def make(models: Models, what: GuardTarget, share: float = 1.0) -> ShadowTraffic:
        shadow = ShadowTraffic(Rollout(compare_share=share), models.encode, FIXED, models, 5.0)
        shadow.watch(what)
        tasks.append(asyncio.create_task(shadow.run()))
        return shadow

    yield make
    for task in tasks:
        task.cancel()


def seen(shadow_traffic: ShadowTraffic, family: Any = "clip") -> ComparisonCounts:
    return shadow_traffic.observations({}).compared[family]


async def send_texts(shadow_traffic: ShadowTraffic, count: int) -> None:
    """One after the other, no faster than they are compared."""
    for number in range(count):
        before = seen(shadow_traffic).tried
        shadow_traffic.clip("text", [[number, 1]])
        await until(lambda before=before: seen(shadow_traffic).tried > before)  # type: ignore[misc]


@pytest.mark.parametrize(("broken", "least", "most"), [((), 12, 12), (("new",), 0, 1)])
async def test_an_equal_release_agrees_and_a_broken_one_does_not(
    comparer_of: Any, broken: tuple[str, ...], least: int, most: int
) -> None:
    shadow_traffic = comparer_of(Models(broken=broken), watch())
    await send_texts(shadow_traffic, 12)
    assert seen(shadow_traffic).inputs == 12 and least <= seen(shadow_traffic).agreed <= most
    assert shadow_traffic.observations({}).release == 2


async def test_a_repeated_input_is_no_new_evidence_and_of_a_large_request_some_items_are(comparer_of: Any) -> None:
    models = Models()
    shadow_traffic = comparer_of(models, watch())
    await send_texts(shadow_traffic, 1)
    for _ in range(3):
        shadow_traffic.clip("text", [[0, 1]])
    shadow_traffic.clip("text", [[7, 7]])
    await until(lambda: seen(shadow_traffic).inputs == 2)
    assert len([adapter for adapter, _ in models.asked if adapter == "new"]) == 3  # the fixed texts, and two inputs
    shadow_traffic.clip("image", np.random.default_rng(0).integers(0, 255, (30, 8, 8, 3), np.uint8))
    await until(lambda: seen(shadow_traffic).inputs == 2 + ITEMS)
    assert models.asked[-1][1] == ITEMS


@pytest.mark.parametrize("family", ["clip", "vlm"])
async def test_what_cannot_be_served_counts_as_failed_and_a_replica_that_is_away_does_not(
    comparer_of: Any, family: Family
) -> None:
    def offered(models: Models) -> ShadowTraffic:
        shadow_traffic: ShadowTraffic = comparer_of(models, watch("new", "new"))
        if family == "clip":
            shadow_traffic.clip("text", [[9]])
        else:
            shadow_traffic.vlm(question(np.zeros((4, 4, 3), np.uint8), "colour?"))
        return shadow_traffic

    gone, away = offered(Models(gone=("new",))), offered(Models(busy=True))
    await until(lambda: seen(gone, family).tried == seen(away, family).dropped == 1)
    assert (seen(gone, family).failed, seen(gone, family).incumbent_failed, seen(gone, family).dropped) == (1, 0, 0)
    assert (seen(away, family).tried, seen(away, family).failed) == (0, 0)


async def test_what_finds_no_place_is_dropped_at_once(comparer_of: Any) -> None:
    models = Models()
    models.gate = asyncio.Event()
    shadow_traffic = comparer_of(models, watch())
    await asyncio.sleep(0)
    for number in range(1000):
        shadow_traffic.clip("text", [[number, 1]])
    assert 1000 - WAITING - 1 <= seen(shadow_traffic).dropped <= 1000 - WAITING


@pytest.mark.parametrize(("broken", "agreed"), [((), 3), (("v",), 0)])
async def test_vlms_agree_by_greedy_answers_and_what_did_not_change_is_not_compared(
    comparer_of: Any, broken: Sequence[str], agreed: int
) -> None:
    models = Models(broken=broken)
    shadow_traffic = comparer_of(models, watch(clip=None, vlm="v"))
    shadow_traffic.clip("text", [[9]])
    for number in range(3):
        shadow_traffic.vlm(question(np.full((4, 4, 3), number, np.uint8), "colour?", max_tokens=100))
    await until(lambda: seen(shadow_traffic, "vlm").inputs == 3)
    assert seen(shadow_traffic, "vlm").agreed == agreed
    assert set(shadow_traffic.observations({}).compared) == {"vlm"}
    assert {adapter for adapter, _ in models.asked} == {"v", None}


async def test_the_next_release_is_compared_from_nothing_and_the_end_of_the_watch_ends_it(comparer_of: Any) -> None:
    shadow_traffic = comparer_of(Models(), watch())
    await send_texts(shadow_traffic, 3)
    shadow_traffic.watch(watch())
    assert seen(shadow_traffic).inputs == 3
    shadow_traffic.watch(watch(clip="newer", number=3, until=time.time() - 1))
    assert seen(shadow_traffic).inputs == 0
    shadow_traffic.clip("text", [[8]])
    assert not shadow_traffic.watching
    assert shadow_traffic.observations({}).release == 0
    assert not comparer_of(Models(), watch(), share=0.0).watching, "of no request"


WIDE, MANY = 32, 40


def unit(random: np.random.Generator, *shape: int) -> np.ndarray:
    made = random.standard_normal(shape).astype(np.float32)
    return made / np.linalg.norm(made, axis=-1, keepdims=True)


def test_a_space_that_is_only_turned_agrees_wholly_and_a_collapsed_one_never() -> None:
    random = np.random.default_rng(0)
    one, references = unit(random, WIDE), unit(random, MANY, WIDE)
    turn = np.linalg.qr(random.standard_normal((WIDE, WIDE)))[0].astype(np.float32)
    assert order(one, list(references), one @ turn, list(references @ turn)) == pytest.approx(1.0)
    same = np.tile(one, (MANY, 1))
    assert order(one, list(same), unit(random, WIDE), list(references)) < 0.5


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_a_vector_that_says_nothing_never_agrees(value: float) -> None:
    random = np.random.default_rng(2)
    references = list(unit(random, MANY, WIDE))
    with np.errstate(invalid="ignore"):
        assert order(np.full(WIDE, value, np.float32), references, unit(random, WIDE), references) == 0.0


def test_another_model_disagrees_about_nearly_everything() -> None:
    random = np.random.default_rng(1)
    neighbours = Neighbours()
    neighbours.fix(unit(random, len(TEXTS), WIDE), unit(random, len(TEXTS), WIDE))
    found = [neighbours.judge("image", unit(random, WIDE), unit(random, WIDE)) for _ in range(200)]
    assert sum(map(bool, found)) <= 4


def test_texts_are_ranked_against_images_once_there_are_enough() -> None:
    random = np.random.default_rng(4)
    neighbours = Neighbours()
    assert neighbours.judge("text", unit(random, WIDE), unit(random, WIDE)) is None  # nothing to rank against
    for _ in range(FEWEST):
        neighbours.judge("image", image := unit(random, WIDE), image)
    text = unit(random, WIDE)
    assert neighbours.judge("text", text, text) is True
    assert neighbours.judge("text", text, -text) is False


def test_the_same_words_agree_and_so_does_an_answer_that_both_find_likely() -> None:
    assert same_answer(" red", "red", -9.0, -9.0, 1)
    assert same_answer("red", "crimson", -0.2, -0.2 - NATS_PER_TOKEN, 1)
    assert same_answer("a red bus", "a bus", -1.0, -1.0 - 3 * NATS_PER_TOKEN, 3)
    assert not same_answer("red", "zzz", -0.2, -0.3 - NATS_PER_TOKEN, 1)
    assert not same_answer("red", "zzz", -0.2, -math.inf, 1)
    assert not same_answer("", "zzz", 0.0, math.nan, 0)
