"""Several ingress processes keep the bounds of one in total."""

from __future__ import annotations

import pytest

from core.settings.section import MIB
from core.settings.serving import Serve
from serving.app import encoder_calls, encoder_scale, ingress_scale, vlm_scale
from serving.http.client_address import RateLimiter
from serving.http.ingress import SHARED, share_of
from serving.messages import IMAGE_COST, PROMPTS_PER_TEXT


def test_what_all_requests_share_is_divided_and_what_one_may_have_is_not() -> None:
    settings = Serve(ingress_replicas=3)
    share = share_of(settings)
    for name in SHARED:
        whole, part = getattr(settings, name), getattr(share, name)
        assert whole <= 3 * part < whole + 3
    assert (share.max_body_bytes, share.max_images, share.deadline_seconds) == (16 * MIB, 32, 30.0)


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


@pytest.mark.parametrize("bounds", [{"max_images": 100, "max_texts": 1}, {"max_images": 1, "max_texts": 50}])
def test_no_piece_of_a_request_waits_in_front_of_the_encoders(bounds: dict[str, int]) -> None:
    settings = Serve.model_validate({"queue": 10, "max_batch": 16, **bounds})
    pieces = max(-(-settings.max_images // 16), -(-settings.max_texts * PROMPTS_PER_TEXT // (16 * IMAGE_COST)))
    assert pieces == 7 and encoder_calls(settings) > settings.queue * pieces


SCALES = {"ingress": (ingress_scale, 32), "encoder": (encoder_scale, 48), "vlm": (vlm_scale, 5)}


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
