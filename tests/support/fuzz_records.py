"""Records mutated at every level, among good ones, and what must become of each.

>>> sent = publish_mutated(settings.kafka, 20_000, seed=1)  # doctest: +SKIP
>>> set(sent.records) == {(row["partition"], row["offset"]) for row in rows}  # doctest: +SKIP
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Literal

from core.settings.streams import Kafka
from ratchet_client.encoding import Encoding, encode
from ratchet_client.records import Sample
from tests.support.kafka import picture
from tests.support.mutations import (
    DAMAGES,
    DOUBTS,
    MILLIS,
    MUTATIONS,
    TIMES,
    UNREADABLE,
    expands_too_far,
)
from tests.support.raw_batches import RawBatch, RawMessage, RawProducer

Expected = Literal["valid", "corrupt", "maybe"]
ENCODINGS: tuple[Encoding, ...] = ("json", "raw", "cloudevents", "cloudevents-binary")
#: Pictures of the records that are mutated, all different from those of the good ones.
VICTIMS = 50
FIRST_VICTIM = 10_000_000
#: Batches of 65 MiB: each takes 0.1 s to look at.
MAX_BOMBS = 3


@dataclass(frozen=True)
class RawRecord:
    """One record, and what must become of it."""

    message: RawMessage
    expected: Expected
    """``valid``: stored as a sample. ``corrupt``: a row of that kind. ``maybe``: one row of any kind."""
    kind: str
    """What was done to it; of a good one its encoding."""
    id: str = ""
    """Of the sample that a valid one is."""


@dataclass
class Sent:
    """What is in the topic, by partition and offset."""

    topic: str
    records: dict[tuple[int, int], RawRecord] = field(default_factory=dict)
    refused: list[RawRecord] = field(default_factory=list)
    """Records of batches that the broker did not take (the embedded one takes all)."""

    @property
    def valid(self) -> dict[str, tuple[int, int]]:
        """Where each good sample is, by its id."""
        return {each.id: at for at, each in self.records.items() if each.expected == "valid"}

    @property
    def corrupt(self) -> set[tuple[int, int]]:
        """What cannot be read."""
        return {at for at, each in self.records.items() if each.expected == "corrupt"}

    @property
    def kinds(self) -> Counter[str]:
        """How many there are of each kind."""
        return Counter(each.kind for each in self.records.values())


def mutated(count: int, seed: int, valid_share: float = 0.25) -> Iterator[RawRecord]:
    """So many records, the same for the same seed; about ``valid_share`` of them good."""
    chance = Random(seed)
    victims = [_message(_sample(FIRST_VICTIM + n, chance), ENCODINGS[n % 4], chance) for n in range(VICTIMS)]
    for number in range(count):
        if chance.random() < valid_share:
            yield _good(seed * 1_000_000 % FIRST_VICTIM + number, chance)
        else:
            yield _mutant(chance.choice(victims), chance)


def publish_mutated(kafka: Kafka, count: int, seed: int, valid_share: float = 0.25) -> Sent:
    """Write them to ``kafka.topic``, in batches of one to eight of all codecs, some batches damaged as well.

    Good records share batches with mutated ones, but not with damage: what is around them is wrong, they are not.
    """
    chance = Random(seed + 1)
    sent = Sent(kafka.topic)
    bombs = 0
    with RawProducer(kafka.bootstrap.split(",")[0].strip()) as producer:
        for group in _groups(mutated(count, seed, valid_share), chance):
            batch = RawBatch([each.message for each in group], chance.randrange(5))
            fate = chance.random() if all(each.expected == "maybe" for each in group) else 1.0
            if fate < 0.2:
                damage = expands_too_far if bombs < MAX_BOMBS and chance.random() < 0.01 else chance.choice(DAMAGES)
                bombs += damage is expands_too_far
                data = damage(batch, chance)
                group = [replace(each, expected="corrupt", kind=damage.__name__) for each in group]
            elif fate < 0.35:
                damage = chance.choice(DOUBTS)
                data = damage(batch, chance)
                group = [replace(each, kind=damage.__name__) for each in group]
            else:
                data = batch.encode()
            _send(producer, sent, chance.randrange(kafka.partitions), data, group)
    return sent


def _send(producer: RawProducer, sent: Sent, partition: int, data: bytearray, group: Sequence[RawRecord]) -> None:
    code, base = producer.send(sent.topic, partition, bytes(data))
    if code == 0:
        sent.records |= {(partition, base + n): each for n, each in enumerate(group)}
    else:
        sent.refused += group


def _groups(records: Iterator[RawRecord], chance: Random) -> Iterator[list[RawRecord]]:
    group: list[RawRecord] = []
    size = 1
    for each in records:
        group.append(each)
        if len(group) >= size:
            yield group
            group, size = [], chance.choice((1, 1, 2, 4, 8))
    if group:
        yield group


def _good(number: int, chance: Random) -> RawRecord:
    encoding = chance.choice(ENCODINGS)
    sample = _sample(number, chance)
    message = _message(sample, encoding, chance)
    if chance.random() < 0.3:
        message = replace(message, timestamp=chance.choice(TIMES))
    if chance.random() < 0.2:  # headers of other systems
        message = replace(message, headers=[*message.headers, (b"trace", None), (b"trace", b"\xff\x00"), (b"", b"")])
    return RawRecord(message, "valid", encoding, sample.id)


def _mutant(victim: RawMessage, chance: Random) -> RawRecord:
    if chance.random() < 0.05:
        unreadable = chance.choice(UNREADABLE)
        return RawRecord(unreadable(victim, chance), "corrupt", unreadable.__name__)
    mutations = [chance.choice(MUTATIONS) for _ in range(chance.choice((1, 1, 1, 2, 3)))]
    for mutate in mutations:
        victim = mutate(victim, chance)
    return RawRecord(victim, "maybe", mutations[0].__name__)


def _sample(number: int, chance: Random) -> Sample:
    kind = chance.choice(("PNG", "PNG", "WEBP", "GIF"))
    return Sample(image=picture(number, 16, kind), text=f"picture {number}", domain="fuzz")


def _message(sample: Sample, encoding: Encoding, chance: Random) -> RawMessage:
    encoded = encode(sample, encoding)
    headers = [(name.encode(), value) for name, value in encoded.headers]
    return RawMessage(encoded.value, encoded.key, headers, MILLIS + chance.randrange(10**9))
