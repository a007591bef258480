"""The split of a canary: who is answered by which side."""

from __future__ import annotations

import hashlib

import pytest
from scipy.stats import binom

from serving.releases.admission import Admission, canary_bucket
from serving.releases.types import ReleaseSnapshot

KEYS = [f"key-{number}" for number in range(10_000)]


def snapshot(release: int, clip: str | None = None, share: float = 1.0) -> ReleaseSnapshot:
    return ReleaseSnapshot(release, clip, f"i{release}", f"t{release}", share=share)


def admission(*window: ReleaseSnapshot) -> Admission:
    made = Admission()
    made.adopt(window)
    return made


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_a_share_of_the_keys_is_answered_by_the_canary(share: float) -> None:
    split = admission(snapshot(2, "new", share), snapshot(1, "old"))
    count = sum(split.resolve("clip", key=key).release == 2 for key in KEYS)
    assert binom.ppf(1e-6, len(KEYS), share) <= count <= binom.ppf(1 - 1e-6, len(KEYS), share)


def test_one_key_always_sees_one_side_in_every_process() -> None:
    one = admission(snapshot(2, "new", 0.1), snapshot(1, "old"))
    other = admission(snapshot(2, "new", 0.1), snapshot(1, "old"))
    assert [one.resolve("clip", key=key) for key in KEYS] == [other.resolve("clip", key=key) for key in KEYS]
    assert canary_bucket("new", None, "key-1") == int(hashlib.sha256(b"new\nNone\nkey-1").hexdigest()[:12], 16) / 2**48


def test_a_larger_share_of_the_same_adapters_only_adds_keys() -> None:
    sides = []
    for number, share in ((2, 0.05), (3, 0.1), (4, 0.5)):
        split = admission(snapshot(number, "new", share), snapshot(1, "old"))
        sides.append({key for key in KEYS if split.resolve("clip", key=key).release == number})
    assert sides[0] < sides[1] < sides[2]


def test_other_adapters_draw_other_keys() -> None:
    places = [[canary_bucket(clip, None, key) < 0.1 for key in KEYS] for clip in ("new", "newer")]
    both = sum(first and second for first, second in zip(*places, strict=True))
    assert both <= binom.ppf(1 - 1e-6, len(KEYS), 0.01)


def test_a_shadow_answers_nobody_and_a_request_without_a_key_is_answered_by_the_stable_side() -> None:
    shadow = admission(snapshot(2, "new", 0.0), snapshot(1, "old"))
    assert {shadow.resolve("clip", key=key).release for key in KEYS} == {1}
    canary = admission(snapshot(2, "new", 0.9), snapshot(1, "old"))
    assert canary.resolve("clip").release == 1


def test_whoever_names_a_release_gets_it() -> None:
    canary = admission(snapshot(3, "new", 0.1), snapshot(2, "old", 1.0), snapshot(1))
    assert {canary.resolve("clip@3", key=key).release for key in KEYS[:100]} == {3}
    assert {canary.resolve("old", key=key).release for key in KEYS[:100]} == {2}
    assert canary.live is not None
    assert canary.live.release == 3


def test_a_promotion_ends_the_split() -> None:
    canary = admission(snapshot(2, "new", 0.1), snapshot(1, "old"))
    assert canary.splits
    canary.adopt([snapshot(3, "new"), snapshot(1, "old")])
    assert not canary.splits
    assert {canary.resolve("clip", key=key).release for key in KEYS[:100]} == {3}


def test_requests_are_counted_by_the_release_that_answered_while_it_is_resident() -> None:
    counted = admission(snapshot(2, "new"), snapshot(1, "old"))
    with pytest.raises(ZeroDivisionError), counted.admit("clip@2"):
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), counted.admit("clip@2", is_fault=lambda error: False):
        raise ZeroDivisionError
    with counted.admit("clip@1"):
        counted.failed(1)  # a stream broke off, after its head was sent
        counted.failed(7)  # of a release that has left: nobody asks any more
    assert {n: (a.requests, a.failed) for n, a in counted.answered().items()} == {2: (2, 1), 1: (1, 1)}
    counted.adopt([snapshot(3, "newer"), snapshot(2, "new")])
    assert {n: a.requests for n, a in counted.answered().items()} == {3: 0, 2: 2}
