from __future__ import annotations

from datetime import UTC, date, datetime
from typing import Any

import pytest

from core.settings.streams import Ingest, Kafka
from ratchet_client import Limits, RecordError, Sample
from ratchet_client.records import TOPIC, make_sample
from streams.kafka.clients import producer_limits
from tests.support.kafka import picture

PNG = picture(1)


@pytest.mark.parametrize(
    "time",
    ["2026-01-02T03:04:05Z", "2026-01-02t03:04:05z", "2026-01-02 05:04:05+02:00", "2026-01-02T03:04:05.000000999Z",
     1767323045, 1767323045.0, 1767323045000, "1767323045", datetime(2026, 1, 2, 3, 4, 5)],
)  # fmt: skip
def test_times_may_be_written_in_many_ways(time: Any) -> None:
    assert Sample(image=PNG, time=time).time == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    for day in (date(2026, 1, 2), "2026-01-02"):
        assert Sample(image=PNG, time=day).time == datetime(2026, 1, 2, tzinfo=UTC)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [("image", "text"), ("text", 7), ("text", None), ("text", b"\xff"), ("answer", "\ud800"), ("domain", "x" * 257),
     ("source", "x" * 2049), ("concept", "x" * 257), ("label", ["x"]), ("time", "yesterday"),
     ("time", "0001-01-01T00:00:00+14:00"), ("time", True),
     ("time", "nan"), ("time", 1e300), ("time", float("inf")), ("tags", 7), ("tags", {"a": 1}), ("tags", ["a;b"]),
     ("tags", [""]), ("tags", ["x" * 65]), ("tags", ["a"] * 33), ("tags", [1]), ("extra", 7), ("extra", {"": 1})],
)  # fmt: skip
def test_a_field_that_is_not_valid_is_named(name: str, value: Any) -> None:
    with pytest.raises(RecordError, match=f"field '{name}'") as caught:
        make_sample({"image": PNG, "text": "t", name: value})
    assert caught.value.reason == "schema" and "image_uri" in caught.value.fix
    str(caught.value).encode()


def test_the_defaults_of_a_producer_are_those_of_ingest() -> None:
    assert producer_limits(Ingest()) == Limits()
    assert Kafka().topic == TOPIC
