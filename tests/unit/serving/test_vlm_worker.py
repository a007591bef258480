"""One VLM replica without Ray: adapters, their users, deadlines and refusals."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from ops.artifacts import Artifacts
from serving.engines.vlm.generation import Ask, Message, Piece, Reply
from serving.errors import EngineDead
from serving.messages import Refusal
from serving.replicas.stream_coalescing import gathered, merged
from serving.replicas.vlm_worker import VlmLane
from tests.support.waiting import until
from tests.unit.serving.memory_vlm import MemoryVlm

ASK = Ask((Message("user", ("is it?",)),))
PLACES = 4


@pytest.fixture
def artifacts(tmp_path: Path) -> Artifacts:
    made = Artifacts(str(tmp_path / "artifacts"))
    for name in ("a", "b", "c", "d", "e", "f"):
        folder = tmp_path / "made" / name
        folder.mkdir(parents=True)
        (folder / "adapter_model.safetensors").write_bytes(name.encode())
        made.put_directory(folder, f"adapters/{name}")
    return made


@pytest.fixture
def engine() -> MemoryVlm:
    return MemoryVlm(most=PLACES)


@pytest.fixture
def lane(engine: MemoryVlm, artifacts: Artifacts) -> VlmLane:
    return VlmLane(engine, artifacts, "r1", PLACES, batch=2)


def soon() -> float:
    return time.time() + 60


async def words(lane: VlmLane, adapter: str | None, deadline: float | None = None) -> list[str]:
    return [
        piece.text if isinstance(piece, Piece) else piece.code
        async for piece in lane.stream(ASK, adapter, deadline or soon())
    ]


async def test_answers_come_from_the_adapter_that_was_asked_for(lane: VlmLane) -> None:
    for adapter in ("a", None):
        reply = await lane.reply(ASK, adapter, soon())
        assert isinstance(reply, Reply)
        assert reply.text == f"{adapter or 'base'} says yes"
        assert "".join(await words(lane, adapter)) == reply.text
    assert await lane.score(ASK, ["yes", "no"], "a", soon()) == [-3.0, -2.0]


async def test_prepare_loads_once_and_says_what_is_wrong(lane: VlmLane, engine: MemoryVlm) -> None:
    assert (await lane.prepare("a")).error == ""
    await lane.prepare("a")
    assert engine.loads == ["a"]
    engine.bad.add("b")
    assert "not finite" in (await lane.prepare("b")).error
    assert "nowhere" in (await lane.prepare("nowhere")).error
    assert engine.resident() == {"a"}


async def test_a_served_adapter_that_fails_its_golden_inputs_again_is_not_taken_away(
    lane: VlmLane, engine: MemoryVlm
) -> None:
    await lane.reply(ASK, "a", soon())
    lane.adopt(["a"])
    engine.bad.add("a")
    assert (await lane.prepare("a")).error
    assert "a" in engine.resident()


async def test_what_is_retired_goes_when_its_last_request_has_ended(lane: VlmLane, engine: MemoryVlm) -> None:
    await lane.prepare("a")
    await lane.prepare("b")
    engine.gate = asyncio.Event()
    asked = asyncio.create_task(lane.reply(ASK, "a", soon()))
    await until(engine.running)
    assert await lane.retire(["b"]) == []
    assert engine.resident() == {"a", "b"}
    engine.gate.set()
    reply = await asked
    assert isinstance(reply, Reply) and reply.text.startswith("a ")
    await until(lambda: engine.resident() == {"b"})


async def test_a_late_request_for_a_retired_adapter_loads_it_again(lane: VlmLane, engine: MemoryVlm) -> None:
    await lane.prepare("a")
    lane.adopt(["b"])
    await lane.retire(["b"])
    assert engine.resident() == frozenset()
    reply = await lane.reply(ASK, "a", soon())
    assert isinstance(reply, Reply) and reply.text.startswith("a ")
    await until(lambda: engine.resident() == frozenset())


async def test_what_is_being_prepared_is_not_swept_before_it_is_adopted(lane: VlmLane, engine: MemoryVlm) -> None:
    lane.adopt(["a"])
    await lane.prepare("a")
    await lane.prepare("b")
    await lane.reply(ASK, "c", soon())
    await until(lambda: engine.resident() == {"a", "b"})
    lane.adopt(["b", "a"])
    await lane.reply(ASK, "b", soon())
    await asyncio.sleep(0.01)
    assert engine.resident() == {"a", "b"}
    assert engine.loads == ["a", "b", "c"]  # none was swept and loaded again


async def test_a_full_engine_makes_room_of_idle_ones_and_waits_for_busy_ones(lane: VlmLane, engine: MemoryVlm) -> None:
    lane.adopt(["a", "b"])
    for name in ("a", "b"):
        await lane.prepare(name)
    engine.gate = asyncio.Event()
    busy = [asyncio.create_task(lane.reply(ASK, name, soon())) for name in ("c", "d")]
    await until(lambda: engine.running() == 2)
    assert engine.resident() == {"a", "b", "c", "d"}
    coming = asyncio.create_task(lane.prepare("e"))
    await asyncio.sleep(0.05)
    assert not coming.done()
    engine.gate.set()
    await asyncio.gather(*busy)
    assert (await coming).error == ""
    assert {"a", "b", "e"} <= engine.resident()


async def test_swaps_under_requests_never_answer_with_another_adapter(lane: VlmLane, engine: MemoryVlm) -> None:
    names = ["a", "b", "c", "d", "e", "f"]
    answers: list[tuple[str, Reply | Refusal]] = []

    async def ask(name: str) -> None:
        answers.append((name, await lane.reply(ASK, name, soon())))

    asked: list[asyncio.Task[None]] = []
    for number in range(20):
        now, before = names[number % 6], names[(number - 1) % 6]
        assert (await lane.prepare(now)).error == ""
        lane.adopt([now, before])
        asked += [asyncio.create_task(ask(name)) for name in (now, before, now)]
        await asyncio.sleep(0)
        await lane.retire([now, before])
    await asyncio.gather(*asked)
    assert len(answers) == 60
    for name, answer in answers:
        assert isinstance(answer, Reply) and answer.text == f"{name} says yes"
    assert len(engine.resident()) <= PLACES


async def test_expected_failures_are_values_and_a_dead_engine_is_raised(lane: VlmLane, engine: MemoryVlm) -> None:
    late = await lane.reply(ASK, None, time.time() - 1)
    assert isinstance(late, Refusal) and late.code == "late"
    too_long = await lane.reply(Ask(ASK.messages, max_tokens=1000), None, soon())
    assert too_long == Refusal("ask", "too many tokens.", "Ask for fewer.")
    missing = await lane.score(ASK, ["x"], "nowhere", soon())
    assert isinstance(missing, Refusal) and missing.code == "adapter"
    assert await words(lane, "nowhere") == ["adapter"]
    engine.dead = "killed"
    with pytest.raises(EngineDead):
        await lane.reply(ASK, None, soon())
    with pytest.raises(EngineDead):
        await words(lane, None)


async def test_an_answer_that_takes_too_long_is_late_and_leaves_the_engine(lane: VlmLane, engine: MemoryVlm) -> None:
    engine.gate = asyncio.Event()
    late = await lane.reply(ASK, None, time.time() + 0.05)
    assert isinstance(late, Refusal) and late.code == "late"
    assert await words(lane, None, time.time() + 0.05) == ["late"]
    assert (engine.running(), lane.status()["waiting"]) == (0, 0)


async def test_closing_a_stream_aborts_its_request(lane: VlmLane, engine: MemoryVlm) -> None:
    engine.gate = asyncio.Event()
    engine.gate.set()
    stream = lane.stream(ASK, None, soon())
    first = await anext(stream)
    assert isinstance(first, Piece)
    engine.gate.clear()
    await stream.aclose()  # type: ignore[attr-defined]
    assert engine.running() == 0


async def test_status_counts_what_waits_for_a_place_in_the_batch(lane: VlmLane, engine: MemoryVlm) -> None:
    engine.gate = asyncio.Event()
    asked = [asyncio.create_task(lane.reply(ASK, None, soon())) for _ in range(5)]
    await until(lambda: lane.status()["running"] == 5)
    told = lane.status()
    assert (told["running"], told["waiting"], told["engine"], told["base"]) == (5, 3, "transformers", "memory")
    engine.gate.set()
    await asyncio.gather(*asked)
    assert lane.status()["running"] == 0


def test_merged_pieces_are_one_piece() -> None:
    one, two = Piece("a", (1,), (-1.0,), 5, 1), Piece("b", (2, 3), (-2.0, -3.0), 5, 3, "stop")
    assert merged([one, two]) == Piece("ab", (1, 2, 3), (-1.0, -2.0, -3.0), 5, 3, "stop")


async def test_what_is_ready_at_the_same_moment_travels_as_one_piece() -> None:
    async def source() -> object:
        for index in range(6):
            yield Piece(str(index), (index,), (0.0,), 1, index + 1, "stop" if index == 5 else "")
            if index == 0:
                await asyncio.sleep(0.01)

    texts = []
    async for piece in gathered(source(), 5):  # type: ignore[arg-type]
        texts.append(piece.text)
        await asyncio.sleep(0.03)
    assert texts == ["0", "12345"]
