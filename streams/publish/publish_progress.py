"""How far a publication has come: rows in flight, a small file from which a run goes on, and what ingest has stored.

Rows are numbered from 1 in the order of reading. All up to some number are done (acknowledged, or refused), and that
number is in the file; at most `MAX_ROWS` behind it are in flight. The file is written whenever `SAVE_ROWS` more are
done, so after a kill at most these, and what was in flight, are sent again.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Final

from core.errors import BrokerError, ConfigError, StoreUnavailable
from core.files import replace_file
from core.progress import meter
from core.settings import Settings
from streams.kafka.clients import Admin
from streams.store.rows import newest_of_topic
from streams.store.sample_store import SampleStore

MAX_ROWS: Final = 256
"""Rows in flight. With `SAVE_ROWS` no more than the sender itself lets wait for acknowledgements (512)."""
MAX_BYTES: Final = 32 * 2**20
"""Bytes of the images in flight; one larger image alone is let through."""
SAVE_ROWS: Final = 256
MAX_STATE_BYTES: Final = 64 * 1024


class InFlight:
    """Rows that were sent and are not acknowledged, bounded by count and bytes. Thread safe."""

    def __init__(self, done: int = 0) -> None:
        """``done`` rows were dealt with before."""
        self._change = threading.Condition()
        self._sizes: dict[int, int] = {}
        self._bytes = 0
        self._failed: BaseException | None = None
        self._last = done

    def add(self, number: int, size: int) -> None:
        """Take a row in, in the order of numbers; waits for room. Raises what a delivery failed with."""
        with self._change:
            self._change.wait_for(lambda: self._has_room(size) or self._failed is not None)
            if self._failed is not None:
                raise self._failed
            self._sizes[number] = size
            self._bytes += size
            self._last = number

    def pass_over(self, number: int) -> None:
        """A row that is not sent."""
        with self._change:
            self._last = number

    def acknowledged(self, number: int) -> None:
        """The broker has a row."""
        with self._change:
            self._bytes -= self._sizes.pop(number)
            self._change.notify()

    def failed(self, error: BaseException) -> None:
        """A row was not delivered. It stays in the window, so that neither it nor what follows counts as done."""
        with self._change:
            self._failed = self._failed or error
            self._change.notify()

    def wait_empty(self, seconds: float) -> None:
        """Wait until every row is acknowledged. Raises what a delivery failed with; BrokerError after ``seconds``."""
        with self._change:
            in_time = self._change.wait_for(lambda: not self._sizes or self._failed is not None, seconds)
            if self._failed is not None:
                raise self._failed
            if not in_time:
                raise BrokerError(f"{len(self._sizes)} rows were not acknowledged.", "Publish again with --resume.")

    @property
    def done(self) -> int:
        """All rows up to this number are acknowledged or refused."""
        with self._change:
            return next(iter(self._sizes), self._last + 1) - 1  # in the order of numbers

    def _has_room(self, size: int) -> bool:
        return not self._sizes or (len(self._sizes) < MAX_ROWS and self._bytes + size <= MAX_BYTES)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run came: the content of the file."""

    path: str
    format: str
    topic: str
    split: str
    done: int = 0
    """Rows that need not be sent again."""
    place: str = ""
    """File and row of the last of these; another one there means that the data set has changed."""


class ProgressFile:
    """The file of one data set, format, split, topic and broker, written atomically. Not thread safe."""

    def __init__(self, home: Path, path: str, format: str, topic: str, split: str, bootstrap: str) -> None:
        self._empty = Progress(path, format, topic, split)
        key = json.dumps([path, format, topic, split, bootstrap])
        self.file = home / "publish" / f"{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"
        self._places: dict[int, str] = {}
        self._saved = 0

    def load(self) -> Progress:
        """What an earlier run left; nothing done where there is none. Raises ConfigError for a damaged file."""
        try:
            with self.file.open("rb") as stream:
                left = json.loads(stream.read(MAX_STATE_BYTES))
            progress = Progress(**left)
            if not isinstance(progress.done, int) or progress.done < 0:
                raise ValueError("done is no count")
        except FileNotFoundError:
            return self._empty
        except (OSError, ValueError, TypeError) as error:
            problem = f"{self.file} cannot be read ({error})."
            raise ConfigError(problem, "Delete it, and publish from the first row.") from error
        self._saved = progress.done
        return progress

    def note(self, number: int, place: str) -> None:
        """Remember where a row is from until it is done."""
        self._places[number] = place

    def save(self, done: int, every: int = SAVE_ROWS) -> None:
        """Write how far it is, if that is ``every`` rows further than the file says."""
        if done - self._saved < every or done not in self._places:
            return
        self._write(Progress(**{**asdict(self._empty), "done": done, "place": self._places[done]}))
        self._saved = done
        self._places = {number: place for number, place in self._places.items() if number >= done}

    def reset(self) -> None:
        """Forget an earlier run."""
        self._saved = 0
        self._change(lambda: self.file.unlink(missing_ok=True))

    def _write(self, progress: Progress) -> None:
        self._change(lambda: replace_file(self.file, json.dumps(asdict(progress)).encode()))

    def _change(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            problem = f"{self.file} cannot be written: {error.strerror or error}."
            raise ConfigError(problem, "Make room, or set `home` to a folder that can be written.") from error


PAUSE_SECONDS = 0.5


def wait_until_stored(settings: Settings, last: Mapping[int, int], seconds: float) -> None:
    """Return when ingest has stored, or refused, everything up to these offsets.

    Args:
        last: by partition of ``kafka.topic``.

    Raises:
        StoreUnavailable: it has not within so many seconds.
        BrokerError, StoreError: the topic or the store cannot be read.
    """
    kafka = settings.kafka
    admin = Admin(kafka)
    try:
        topic_id = admin.topic_id(kafka.topic)
    finally:
        admin.close()
    store, deadline = SampleStore(settings.lake), time.monotonic() + seconds
    with meter("waiting for ingest") as show:
        while behind := _behind(store, kafka.topic, topic_id, last):
            if time.monotonic() >= deadline:
                raise StoreUnavailable(
                    f"ingest has not stored everything after {seconds:g} s: {behind:,} records are left.",
                    "All was delivered, and waits in the topic. Is `ratchet ingest` running?",
                )
            show(partial("{:,} records are left".format, behind))
            time.sleep(PAUSE_SECONDS)


def _behind(store: SampleStore, topic: str, topic_id: str | None, last: Mapping[int, int]) -> int:
    """Records up to the offsets that were not read yet, counted from the beginning where nothing was."""
    newest = newest_of_topic(store.positions().values(), topic)
    read = {number: each.next for number, each in newest.items() if each.topic_id == topic_id}
    return sum(max(0, offset + 1 - read.get(number, 0)) for number, offset in last.items())
