"""The records of a chaos run: good, bad and repeated ones, produced at a steady rate, and their positions."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import numpy as np
from kafka import KafkaProducer
from kafka.errors import KafkaError
from PIL import Image

from core.errors import RatchetError
from core.settings.streams import Kafka
from ratchet_client.producer import BATCH_BYTES
from ratchet_client.records import Sample

BAD_SHARE = 0.05
REPEAT_SHARE = 0.01
REPEATS_WITHIN = 100
"""A repetition is of one of this many samples before it."""
GROUP = 20
RecordKind = Literal["good", "bad"]
Headers = list[tuple[str, bytes]]


@dataclass(frozen=True, slots=True)
class Made:
    """A record to send."""

    kind: RecordKind
    value: bytes
    headers: Headers
    id: str = ""
    """Of the sample; a repetition has the ID of the first."""


def make_records(count: int, seed: int) -> Iterator[Made]:
    """Records of which 5% are invalid, each for one of several reasons, and 1% repeat an earlier sample."""
    generator = np.random.default_rng(seed)
    recent: list[Made] = []
    for number in range(count):
        chance = generator.random()
        if chance < BAD_SHARE:
            yield _bad(number, generator)
        elif chance < BAD_SHARE + REPEAT_SHARE and recent:
            yield recent[generator.integers(len(recent))]
        else:
            record = _good(number, generator)
            recent = [*recent[1 - REPEATS_WITHIN :], record]
            yield record


def _good(number: int, generator: np.random.Generator) -> Made:
    image, text = _png(generator), f"picture {number}"
    return Made("good", image, [("ratchet_text", text.encode())], Sample(image=image, text=text).id)


def _bad(number: int, generator: np.random.Generator) -> Made:
    image, text = _png(generator), [("ratchet_text", f"picture {number}".encode())]
    values: list[tuple[bytes, Headers]] = [
        (b"", text),
        (b"not JSON", []),
        (b'{"schema": "ratchet.sample.v9"}', []),
        (generator.bytes(200), text),
        (image[: len(image) // 2], text),
        (image, []),
        (image, [("ratchet_text", b"x" * 3000)]),
    ]
    return Made("bad", *values[generator.integers(len(values))])


def _png(generator: np.random.Generator) -> bytes:
    blocks = generator.integers(0, 256, (6, 6, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(blocks).resize((24, 24), Image.Resampling.NEAREST).save(out, "PNG")
    return out.getvalue()


class SteadyProducer(threading.Thread):
    """Sends records at a steady rate, and records their positions in :attr:`places`."""

    def __init__(self, kafka: Kafka, count: int, seconds: float, seed: int) -> None:
        super().__init__(name="producer", daemon=True)
        self.kafka = kafka
        self.count = count
        self.seconds = seconds
        self.seed = seed
        self.places: dict[tuple[int, int], Made] = {}
        """By partition and offset."""
        self.problem = ""
        self._sending = threading.Lock()
        """Held while records are on their way."""

    def pause(self) -> None:
        self._sending.acquire()

    def resume(self) -> None:
        self._sending.release()

    def run(self) -> None:
        producer = KafkaProducer(bootstrap_servers=self.kafka.bootstrap, batch_size=BATCH_BYTES)
        try:
            began = time.monotonic()
            records = make_records(self.count, self.seed)
            for start in range(0, self.count, GROUP):
                time.sleep(max(0.0, began + start * self.seconds / self.count - time.monotonic()))
                with self._sending:
                    self._send(producer, list(islice(records, GROUP)))
        except KafkaError as error:
            self.problem = f"{type(error).__name__}: {error}"
        finally:
            producer.close(5)

    def finish(self) -> None:
        """Wait for the end. Raises RatchetError when not all was sent."""
        self.join()
        if self.problem or len(self.places) != self.count:
            raise RatchetError(
                f"{len(self.places)} of {self.count} records were produced: {self.problem or 'offsets repeat'}.",
                "Run it again.",
            )

    def _send(self, producer: Any, records: list[Made]) -> None:
        waiting = []
        for number, record in enumerate(records):
            partition = number % self.kafka.partitions
            topic, headers = self.kafka.topic, record.headers
            waiting.append(producer.send(topic, record.value, key=b"chaos", headers=headers, partition=partition))
        producer.flush(60)
        for sent, record in zip(waiting, records, strict=True):
            place = sent.get(timeout=1)
            self.places[place.partition, place.offset] = record
