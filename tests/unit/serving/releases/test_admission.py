from __future__ import annotations

import hashlib

import pytest
from prometheus_client import REGISTRY
from scipy.stats import binom

from core.ledger import Family
from serving.errors import NotReady, SpaceGone, Unavailable, UnknownModel
from serving.releases.admission import Admission, canary_bucket
from serving.releases.types import ReleaseSnapshot

KEYS = [f"key-{number}" for number in range(10_000)]


def snapshot(release: int, clip: str | None = None, share: float = 1.0, vlm: str | None = None) -> ReleaseSnapshot:
    return ReleaseSnapshot(release, clip, f"i{release}", f"t{release}", vlm, share)


def admission(*window: ReleaseSnapshot) -> Admission:
    made = Admission()
    made.adopt(window)
    return made


def exported_in_flight() -> dict[str, float | None]:
    name = "ratchet_release_in_flight_requests"
    return {age: REGISTRY.get_sample_value(name, {"age": age}) for age in ("live", "incumbent", "older")}


def test_before_the_first_release_and_by_a_server_that_ends_nothing_is_admitted() -> None:
    with pytest.raises(NotReady), Admission().admit():
        pass
    admitted = admission(snapshot(1))
    with admitted.admit():
        admitted.closed = True
        with pytest.raises(Unavailable, match="is ending"), admitted.admit():
            pass
        assert admitted.in_flight() == {1: 1}, "what is in flight goes on"
    assert admitted.in_flight() == {}


def test_a_request_keeps_its_stamp_when_another_release_goes_live_and_is_counted_by_its_age() -> None:
    admitted = admission(snapshot(3), snapshot(2))
    with admitted.admit("clip@2"), admitted.admit() as first, admitted.admit():
        assert admitted.by_age() == {"live": 2, "incumbent": 1, "older": 0}
        admitted.adopt([snapshot(4), snapshot(3)])
        with admitted.admit() as second:
            assert (first.release, second.release) == (3, 4)
            assert admitted.in_flight() == {2: 1, 3: 2, 4: 1}
            assert admitted.by_age() == exported_in_flight() == {"live": 1, "incumbent": 2, "older": 1}
    assert admitted.by_age() == exported_in_flight() == {"live": 0, "incumbent": 0, "older": 0}


def test_a_late_message_does_not_bring_an_old_release_back() -> None:
    admitted = admission(snapshot(3), snapshot(2))
    assert admitted.adopt([snapshot(2), snapshot(1)]) == 3
    assert [each.release for each in admitted.window] == [3, 2]
    assert admitted.adopt([snapshot(3)]) == 3
    assert [each.release for each in admitted.window] == [3], "the live release with fewer others is news"


@pytest.mark.parametrize(("family", "other", "own", "foreign"), [("clip", "vlm", "a", "v"), ("vlm", "clip", "v", "a")])
def test_models_are_addressed_by_family_release_adapter(family: Family, other: Family, own: str, foreign: str) -> None:
    admitted = admission(snapshot(4, "a", vlm="v"), snapshot(3, "a", vlm="v"), snapshot(2))
    for model, release in ((family, 4), (f"{family}@4", 4), (f"{family}@3", 3), (own, 4), ("base", 2)):
        with admitted.admit(model, family) as found:
            assert found.release == release
            assert admitted.in_flight() == {release: 1}
    resident = f"Resident are: {family}, {family}@4, {family}@3, {family}@2, {own}, base"
    for model in (f"{family}@1", other, f"{other}@4", foreign):
        with pytest.raises(UnknownModel, match=resident):
            admitted.resolve(model, family)


def test_a_space_is_answered_by_the_newest_release_that_has_it_and_by_no_other() -> None:
    shared = ReleaseSnapshot(4, "d", "i3", "t4")
    admitted = admission(shared, snapshot(3, "c"), snapshot(2, "b"))
    for model, space, release in (("clip", "i3", 4), ("clip", "t3", 3), ("clip", "i2", 2), ("clip@3", "i3", 3)):
        assert admitted.resolve(model, space=space).release == release
    for model, space in (("clip", "i1"), ("clip@4", "t3"), ("c", "t4"), ("clip", "")):
        with pytest.raises(SpaceGone, match="Resident are i3, t4, t3, i2, t2"):
            admitted.resolve(model, space=space)
    admitted.adopt([snapshot(5), shared])
    with pytest.raises(SpaceGone), admitted.admit(space="t3"):
        pass
    assert admitted.in_flight() == {}


def test_a_space_of_a_canary_or_shadow_answers_only_callers_of_that_side() -> None:
    for share in (0.0, 0.3):
        split = admission(snapshot(3, "new", share), snapshot(2, "old"))
        for key in KEYS[:50]:
            assert split.resolve("clip", key=key, space="i2").release == 2
            if split.resolve("clip", key=key).release == 3:
                assert split.resolve("clip", key=key, space="i3").release == 3
            else:
                with pytest.raises(SpaceGone, match="may answer"):
                    split.resolve("clip", key=key, space="i3")
    assert split.resolve("clip@3", space="t3").release == 3


def test_a_share_of_the_keys_is_answered_by_the_canary_and_a_larger_one_only_adds_keys() -> None:
    sides: list[set[str]] = [set()]
    for share in (0.0, 0.01, 0.1, 0.5, 0.9):
        split = admission(snapshot(2, "new", share), snapshot(1, "old"))
        sides.append({key for key in KEYS if split.resolve("clip", key=key).release == 2})
        assert binom.ppf(1e-6, len(KEYS), share) <= len(sides[-1]) <= binom.ppf(1 - 1e-6, len(KEYS), share)
        assert sides[-2] < sides[-1] or share == 0.0, "a shadow answers no one"
        assert split.resolve("clip").release == 1, "without a key"


def test_one_key_sees_one_side_in_every_process_and_other_adapters_draw_other_keys() -> None:
    assert canary_bucket("new", None, "key-1") == int(hashlib.sha256(b"new\nNone\nkey-1").hexdigest()[:12], 16) / 2**48
    places = [[canary_bucket(clip, None, key) < 0.1 for key in KEYS] for clip in ("new", "newer")]
    both = sum(first and second for first, second in zip(*places, strict=True))
    assert both <= binom.ppf(1 - 1e-6, len(KEYS), 0.01)


def test_a_caller_that_names_a_release_gets_it_and_a_promotion_ends_the_split() -> None:
    canary = admission(snapshot(3, "new", 0.1), snapshot(2, "old", 1.0), snapshot(1))
    assert canary.splits
    for model, release in (("clip@3", 3), ("old", 2)):
        assert {canary.resolve(model, key=key).release for key in KEYS[:100]} == {release}
    canary.adopt([snapshot(4, "new"), snapshot(2, "old")])
    assert not canary.splits
    assert {canary.resolve("clip", key=key).release for key in KEYS[:100]} == {4}


def test_requests_are_counted_by_the_release_that_answered_while_it_is_resident() -> None:
    counted = admission(snapshot(2, "new"), snapshot(1, "old"))
    with pytest.raises(ZeroDivisionError), counted.admit("clip@2"):
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), counted.admit("clip@2", is_fault=lambda error: False):
        raise ZeroDivisionError
    with counted.admit("clip@1"):
        counted.failed(1)  # a stream broke off, after its head was sent
        counted.failed(7)  # of a retired release, which is never asked again
    assert counted.in_flight() == {}
    assert {n: (a.requests, a.failed) for n, a in counted.answered().items()} == {2: (2, 1), 1: (1, 1)}
    counted.adopt([snapshot(3, "newer"), snapshot(2, "new")])
    assert {n: a.requests for n, a in counted.answered().items()} == {3: 0, 2: 2}


def test_an_error_counts_against_the_release_where_it_is_a_fault() -> None:
    admitted = admission(snapshot(3))
    for error in (ValueError("the client's"), ValueError("another's"), RuntimeError("the model's")):
        with pytest.raises(type(error)), admitted.admit(is_fault=lambda each: isinstance(each, RuntimeError)):
            raise error
    assert (admitted.answered()[3].requests, admitted.answered()[3].failed) == (3, 1)
