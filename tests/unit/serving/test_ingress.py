"""An ingress replica: when it is ready, its part of the bounds of all, and the texts of tokens."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from core.settings.section import MIB
from core.settings.serving import Serve
from serving.app import encoder_calls, encoder_scale, ingress_scale, vlm_scale
from serving.http import ingress as module
from serving.http.client_address import RateLimiter
from serving.http.ingress import SHARED, Ingress, share_of, token_texts
from serving.messages import IMAGE_COST, IMAGES_PER_REQUEST, PROMPTS_PER_TEXT, TEXTS_PER_REQUEST

SCALES = {"ingress": (ingress_scale, 32), "encoder": (encoder_scale, 48), "vlm": (vlm_scale, 5)}


class Idle:
    """Shadow traffic that never compares, and probes that never ask."""

    async def run(self) -> None:
        await asyncio.Event().wait()

    watch = run

    @property
    def probes(self) -> Idle:
        return self

    state = probes


def starting(monkeypatch: pytest.MonkeyPatch, refresh: Any) -> Any:
    replica: Any = object.__new__(Ingress)
    replica._tasks, replica.vlms = {}, None
    replica.shadow_traffic, replica.http_app = Idle(), Idle()
    monkeypatch.setattr(replica, "refresh", refresh)
    for name in ("_follow", "_read_keys"):
        monkeypatch.setattr(replica, name, Idle().run)
    return replica


async def test_it_is_not_healthy_before_it_knows_what_is_live(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answered = asyncio.Event(), asyncio.Event()
    count = 0

    async def refresh() -> None:
        nonlocal count
        count += 1
        asked.set()
        await answered.wait()

    replica = starting(monkeypatch, refresh)
    health = asyncio.create_task(replica.check_health())
    await asked.wait()
    assert not health.done()
    answered.set()
    await health
    await replica.check_health()
    assert count == 1  # from now on it follows


async def test_it_starts_without_that_where_nobody_can_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_SECONDS", 0.0)
    replica = starting(monkeypatch, asyncio.Event().wait)
    await replica.check_health()
    assert "follow" in replica._tasks


def test_what_all_requests_share_is_divided_and_what_one_may_have_is_not() -> None:
    settings = Serve(ingress_replicas=3)
    share = share_of(settings)
    for name in SHARED:
        whole, part = getattr(settings, name), getattr(share, name)
        assert whole <= 3 * part < whole + 3
    assert (share.max_body_bytes, share.deadline_seconds) == (16 * MIB, 30.0)


def test_the_largest_body_always_finds_room() -> None:
    settings = Serve(ingress_replicas=64, body_budget_bytes=64 * MIB)
    assert share_of(settings).body_budget_bytes == settings.max_body_bytes


def test_one_process_has_all_of_it() -> None:
    assert share_of(Serve()) == Serve()


def test_callers_have_their_rate_over_all_processes() -> None:
    now = 0.0
    limiters = [RateLimiter(lambda: now, replicas=2) for _ in range(2)]
    granted = sum(limiter.take("ann", 10) == 0 for limiter in limiters for _ in range(10))
    assert granted == 10


@pytest.mark.parametrize(("batch", "pieces"), [(16, 32), (1, 512), (64, 8)])
def test_no_piece_of_a_request_waits_in_front_of_the_encoders(batch: int, pieces: int) -> None:
    assert pieces == -(-TEXTS_PER_REQUEST * PROMPTS_PER_TEXT // (batch * IMAGE_COST)) >= IMAGES_PER_REQUEST / batch
    assert encoder_calls(Serve(queue=10, max_batch=batch)) > 10 * pieces


@pytest.mark.parametrize("most", [0, 1, 2])
@pytest.mark.parametrize("kind", SCALES)
def test_without_a_larger_most_the_number_of_processes_is_fixed(kind: str, most: int) -> None:
    settings = Serve.model_validate({f"{kind}_replicas": 2, f"{kind}_max_replicas": most})
    assert SCALES[kind][0](settings) == {"num_replicas": 2}


@pytest.mark.parametrize("kind", SCALES)
def test_with_one_it_follows_the_requests_in_flight(kind: str) -> None:
    found, busy = SCALES[kind]
    numbers = {f"{kind}_replicas": 2, f"{kind}_max_replicas": 8, "queue": 256, "max_batch": 24, "vlm_batch": 5}
    (scale,) = found(Serve.model_validate(numbers)).values()
    assert (scale["min_replicas"], scale["initial_replicas"], scale["max_replicas"]) == (2, 2, 8)
    assert scale["target_ongoing_requests"] == busy


def test_tokens_put_together_are_the_text(tmp_path: Path) -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.save(str(tmp_path / "tokenizer.json"))
    text_of = token_texts(tmp_path)
    assert "".join(text_of(token) for token in made.encode("a red bus").ids) == "a red bus"
    assert [text_of(token) for token in made.encode("é").ids] == ["\ufffd", "\ufffd"]
    assert text_of(10_000) == "token_id:10000"


def test_a_space_before_a_word_stays(tmp_path: Path) -> None:
    made = Tokenizer(models.WordLevel({"\u2581red": 0, "\u2581bus": 1, "es": 2}, unk_token="es"))
    made.decoder = decoders.Metaspace()
    made.save(str(tmp_path / "tokenizer.json"))
    assert "".join(token_texts(tmp_path)(token) for token in (0, 1, 2)) == " red buses"


def test_without_a_tokenizer_tokens_are_numbers(tmp_path: Path) -> None:
    assert token_texts(tmp_path)(7) == token_texts(None)(7) == "token_id:7"
