"""Admission: what a request is stamped with, and until when a release counts as used."""

from __future__ import annotations

import pytest
from prometheus_client import REGISTRY

from serving.errors import NotReady, Unavailable, UnknownModel
from serving.releases.admission import Admission
from serving.releases.types import ReleaseSnapshot


def snapshot(release: int, clip: str | None = None, vlm: str | None = None) -> ReleaseSnapshot:
    return ReleaseSnapshot(release, clip, f"i{release}", f"t{release}", vlm)


def test_before_the_first_release_nothing_is_admitted() -> None:
    with pytest.raises(NotReady), Admission().admit():
        pass


def test_a_request_keeps_its_stamp_when_another_release_goes_live() -> None:
    admission = Admission()
    admission.adopt([snapshot(1)])
    with admission.admit() as first:
        admission.adopt([snapshot(2, "a"), snapshot(1)])
        with admission.admit() as second:
            assert (first.release, second.release) == (1, 2)
            assert admission.in_flight() == {1: 1, 2: 1}
    assert admission.in_flight() == {}


def test_a_late_message_does_not_bring_an_old_release_back() -> None:
    admission = Admission()
    admission.adopt([snapshot(3), snapshot(2)])
    assert admission.adopt([snapshot(2), snapshot(1)]) == 3
    assert [each.release for each in admission.window] == [3, 2]


@pytest.mark.parametrize(("model", "release"), [("clip", 4), ("clip@4", 4), ("clip@3", 3), ("a", 4), ("base", 3)])
def test_models_are_addressed_by_family_number_and_adapter(model: str, release: int) -> None:
    admission = Admission()
    admission.adopt([snapshot(4, "a"), snapshot(3)])
    assert admission.resolve(model).release == release


def test_an_unknown_model_is_told_what_is_resident() -> None:
    admission = Admission()
    admission.adopt([snapshot(4, "a"), snapshot(3)])
    with pytest.raises(UnknownModel, match=r"clip, clip@4, clip@3, a, base"):
        admission.resolve("clip@1")


@pytest.mark.parametrize(("model", "release"), [("vlm", 4), ("vlm@4", 4), ("vlm@3", 3), ("v", 4), ("base", 2)])
def test_a_vlm_is_addressed_in_the_same_way(model: str, release: int) -> None:
    admission = Admission()
    admission.adopt([snapshot(4, "a", "v"), snapshot(3, "a", "v"), snapshot(2)])
    with admission.admit(model, "vlm") as found:
        assert found.release == release
        assert admission.in_flight() == {release: 1}


@pytest.mark.parametrize("model", ["clip", "clip@4", "a", "vlm@2"])
def test_a_name_of_the_other_family_is_unknown(model: str) -> None:
    admission = Admission()
    admission.adopt([snapshot(4, "a", "v"), snapshot(3, "a")])
    with pytest.raises(UnknownModel, match=r"Resident are: vlm, vlm@4, vlm@3, v, base"):
        admission.resolve(model, "vlm")


def test_a_failed_request_is_not_counted_for_ever() -> None:
    admission = Admission()
    admission.adopt([snapshot(1)])
    with pytest.raises(ZeroDivisionError), admission.admit():
        raise ZeroDivisionError
    assert admission.in_flight() == {}


def test_a_server_that_ends_admits_nothing_and_lets_go_on_what_is_in_flight() -> None:
    admission = Admission()
    admission.adopt([snapshot(1)])
    with admission.admit():
        admission.close()
        with pytest.raises(Unavailable, match="is ending"), admission.admit():
            pass
        assert admission.in_flight() == {1: 1}
    assert admission.in_flight() == {}


def test_requests_in_flight_are_told_by_how_far_their_release_is_behind() -> None:
    admission = Admission()
    admission.adopt([snapshot(3), snapshot(2)])
    with admission.admit("clip@2"), admission.admit(), admission.admit():
        assert admission.by_age() == {"live": 2, "incumbent": 1, "older": 0}
        admission.adopt([snapshot(4), snapshot(3)])
        assert admission.by_age() == {"live": 0, "incumbent": 2, "older": 1}
        assert exported_in_flight() == {"live": 0, "incumbent": 2, "older": 1}
    assert admission.by_age() == exported_in_flight() == {"live": 0, "incumbent": 0, "older": 0}


def exported_in_flight() -> dict[str, float | None]:
    name = "ratchet_release_in_flight_requests"
    return {age: REGISTRY.get_sample_value(name, {"age": age}) for age in ("live", "incumbent", "older")}
