"""``ratchet publish``: sends a data set to the topic row by row, in bounded memory.

Rows are numbered from 1 in reading order. A small file records the number up to which all rows are done (acknowledged,
or not valid samples), from which a later run resumes; at most :data:`MAX_ROWS` after it are in flight. It is written
every :data:`SAVE_ROWS` rows, so after a kill at most these, and what was in flight, are sent again.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import closing, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Final, TextIO

from core.errors import BrokerError, ConfigError, RatchetError, RecordError, StoreUnavailable
from core.files import replace_file
from core.progress import meter, progress_log
from core.settings import Settings
from ratchet_client.producer import Delivery, check_sample
from ratchet_client.records import Sample, make_sample
from streams.kafka.clients import Admin, connect_producer, producer_limits
from streams.publish.datasets import choose, read_dataset
from streams.publish.folders import DatasetRow, FolderItem, writing
from streams.store.rows import newest_of_topic
from streams.store.sample_store import SampleStore

MAX_ROWS: Final = 256
"""Rows in flight. With `SAVE_ROWS` at most the sender's own limit of unacknowledged records (512)."""
MAX_BYTES: Final = 32 * 2**20
"""Bytes of images in flight; a single larger image is let through."""
SAVE_ROWS: Final = 256
PAUSE_SECONDS: Final = 0.5
MAX_EXAMPLES: Final = 5
MAX_SHOWN_CHARS: Final = 300


def publish(
    settings: Settings,
    path: Path | str,
    *,
    format: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    source: str | None = None,
    dry_run: bool = False,
    skip_bad: bool = False,
    resume: bool = False,
    rejects: Path | None = None,
) -> PublishReport:
    """Send the rows of a data set, and wait until the broker has acknowledged each.

    Args:
        path, format, split: as for :func:`streams.publish.datasets.read_dataset`.
        source: for rows that name none.
        dry_run: read and check all rows without sending them; bad rows are counted.
        skip_bad: count invalid rows and continue, instead of raising the first one's error.
        resume: continue after the rows that an earlier run of the same path, format, split and topic finished.
        rejects: write bad rows to this file as JSON lines; a resumed run appends.

    Raises:
        RecordError: ``path`` is not a data set, has no rows, cannot be read further, or has a bad row that is not
            skipped. Earlier rows are acknowledged, and a resumed run starts at the bad row.
        BrokerError: the broker cannot be reached, or a row was not delivered.
        ConfigError: the progress or rejects file cannot be used, or the data set has changed.
    """
    chosen, kafka = choose(path, format), settings.kafka
    report = PublishReport(kafka.topic, chosen.name, dry_run)
    rows = read_dataset(path, chosen.name, split, settings.ingest.max_image_bytes)
    progress = ProgressFile(
        settings.home, str(Path(path).resolve()), chosen.name, kafka.topic, split or "", kafka.bootstrap
    )
    if resume:
        report.before = _skip(rows, progress)
    with _open_rejects(rejects, append=resume) as refused:
        run = _Run(settings, report, refused, source, skip_bad or dry_run)
        if dry_run:
            run.check(islice(rows, limit))
        else:
            run.send(islice(rows, limit), progress, resume)
    if not (report.delivered or report.refused or report.before):
        raise RecordError("dataset", f"{path} has no rows.", "Name a data set with samples in it.")
    return report


def _skip(rows: Iterator[DatasetRow], progress: ProgressFile) -> int:
    earlier = progress.load()
    passed, place = 0, ""
    with meter("passing over what was delivered") as show:
        for row in islice(rows, earlier.done):
            passed, place = passed + 1, row.place
            show(partial("{} of {} rows".format, passed, earlier.done))
    if passed < earlier.done or place != earlier.place:
        present = place if passed == earlier.done else f"only {passed} rows"
        raise ConfigError(
            f"{earlier.path} has changed: row {earlier.done} was {earlier.place}, and now there is {present}.",
            "Publish it without --resume; ingest counts what it has already as duplicates.",
        )
    return passed


@dataclass
class _Run:
    _settings: Settings
    _report: PublishReport
    _rejects: TextIO | None
    _source: str | None
    _skip_bad: bool
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def check(self, rows: Iterator[DatasetRow]) -> None:
        report, started = self._report, time.monotonic()
        with meter("checking") as show:
            for number, row in enumerate(rows, start=report.before + 1):
                sample = self._sample(number, row)
                if sample is not None and isinstance(row.content, FolderItem):
                    self._count(len(sample.image))
                    if len(report.samples) < MAX_EXAMPLES:
                        item = row.content
                        words = item.text or f"{item.question} -> {item.answer}"
                        label = f" [{item.label}]" if item.label else ""
                        report.samples.append(f"{row.place}: {words[:MAX_SHOWN_CHARS]}{label}")
                show(partial(report.progress, started))
        report.seconds = time.monotonic() - started

    def send(self, rows: Iterator[DatasetRow], progress: ProgressFile, resume: bool) -> None:
        report, settings, started = self._report, self._settings, time.monotonic()
        in_flight = InFlight(report.before)
        producer = connect_producer(settings.kafka, settings.ingest, on_delivery=lambda _: None)
        try:
            if not resume:
                progress.reset()
            with meter(f"publishing to {settings.kafka.topic}") as show:
                for number, row in enumerate(rows, start=report.before + 1):
                    sample = self._sample(number, row)
                    progress.note(number, row.place)
                    if sample is None:
                        in_flight.pass_over(number)
                    else:
                        size = len(sample.image)
                        in_flight.add(number, size)
                        future = producer.send_checked(sample)
                        future.add_done_callback(partial(self._delivered, in_flight, number, row.place, size))
                    progress.save(in_flight.done)
                    show(partial(report.progress, started))
            producer.flush()
            in_flight.wait_empty(producer.delivery_seconds)
        except (RatchetError, KeyboardInterrupt):
            with suppress(BrokerError):  # report the original error, not its consequences
                producer.flush()
                in_flight.wait_empty(1.0)
            progress_log.info(f"ended early: {report.progress(started)}; --resume goes on behind them")
            raise
        finally:
            producer.close()
            progress.save(in_flight.done, every=1)
            report.seconds = time.monotonic() - started

    def _sample(self, number: int, row: DatasetRow) -> Sample | None:
        """The sample of a row; None if it is invalid and such rows are skipped. Raises RecordError otherwise."""
        try:
            if isinstance(row.content, RecordError):
                raise row.content
            return _checked(row.content, row.place, self._settings, self._source)
        except RecordError as error:
            if self._rejects is not None:
                told = {"reason": error.reason, "message": error.message, "fix": error.fix}
                # Names and texts may contain bytes that are not UTF-8; JSON escapes them.
                self._rejects.write(json.dumps({"row": number, "place": row.place, **told}) + "\n")
            if not self._skip_bad:
                fix = f"{error.fix} Or leave out rows like this: --skip-bad."
                raise RecordError(error.reason, error.message, fix) from error
            self._report.refused[error.reason] += 1
            if len(self._report.examples) < MAX_EXAMPLES:
                self._report.examples.append(str(error))
            return None

    def _delivered(self, in_flight: InFlight, number: int, place: str, size: int, future: Future[Delivery]) -> None:
        error = future.exception()
        if error is not None:
            in_flight.failed(
                BrokerError(f"{place}: {error.message}", error.fix) if isinstance(error, BrokerError) else error
            )
            return
        self._count(size, future.result())
        in_flight.acknowledged(number)

    def _count(self, size: int, delivery: Delivery | None = None) -> None:
        with self._lock:
            self._report.delivered += 1
            self._report.size += size
            if delivery is not None:
                last = self._report.last.get(delivery.partition, -1)
                self._report.partitions[delivery.partition] += 1
                self._report.last[delivery.partition] = max(last, delivery.offset)


def _checked(item: FolderItem, place: str, settings: Settings, source: str | None) -> Sample:
    """The sample of a row, valid by ingest's rules. Raises RecordError naming file, row and field."""
    names = ("text", "question", "answer", "domain", "concept", "label", "tags")
    fields: dict[str, Any] = {name: getattr(item, name) for name in names}
    fields["source"] = item.source or source or ""
    fields["time"] = item.time or None
    if set(item.answers) - {item.answer}:
        fields["extra"] = {"answers": list(item.answers)}
    try:
        sample = make_sample({**fields, "image": item.bytes(settings.ingest.max_image_bytes)})
        check_sample(sample, producer_limits(settings.ingest))
    except RecordError as error:
        about, _, _ = error.reason.partition("_")
        named = f", field '{about}'" if about in ("image", "text") else ""
        raise RecordError(error.reason, f"{place}{named}: {error.message}", error.fix) from error
    return sample


@dataclass
class PublishReport:
    """Counts of rows; a row is one sample, so an image with five captions counts as five."""

    topic: str
    format: str = ""
    dry_run: bool = False
    delivered: int = 0
    """Rows acknowledged by the broker; in a dry run, rows that would be sent."""
    size: int = 0
    before: int = 0
    """Rows skipped because the resumed run had finished them."""
    seconds: float = 0.0
    partitions: Counter[int] = field(default_factory=Counter)
    last: dict[int, int] = field(default_factory=dict)
    refused: Counter[str] = field(default_factory=Counter)
    """Invalid rows by reason; they were not sent."""
    examples: list[str] = field(default_factory=list)
    samples: list[str] = field(default_factory=list)

    @property
    def exit_status(self) -> int:
        """0: all delivered, or nothing left to deliver; 3: some rows were refused; 4: all were."""
        if not self.refused:
            return 0
        return 3 if self.delivered or self.before else 4

    def progress(self, since: float) -> str:
        refused = f", {self.refused.total()} refused" if self.refused else ""
        return f"{self.delivered} rows, {self.size / 1e6:.1f} MB, {self._speed(time.monotonic() - since)}{refused}"

    def _speed(self, seconds: float) -> str:
        seconds = max(seconds, 1e-6)
        return f"{self.delivered / seconds:.0f} rows/s, {self.size / 1e6 / seconds:.1f} MB/s"

    def __rich__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        speed = self._speed(self.seconds)
        amount = f"{self.delivered} samples ({self.size / 1e6:.1f} MB)"
        spread = ", ".join(f"{number}: {count}" for number, count in sorted(self.partitions.items()))
        if self.dry_run:
            lines = [f"{amount} of {self.format} are valid; nothing was sent to {self.topic} ({speed})"]
            lines += [f"  {text}" for text in self.samples]
        else:
            where = f"delivered to {self.topic} in {self.seconds:.1f} s"
            lines = [f"{amount} {where} ({speed}; by partition {spread or 'none'})"]
        if self.before:
            lines.append(f"{self.before} rows were dealt with by an earlier run")
        if self.refused:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in self.refused.most_common())
            lines += [f"{self.refused.total()} rows refused ({reasons})", *(f"  {text}" for text in self.examples)]
        return "\n".join(lines)


def _open_rejects(path: Path | None, append: bool) -> Any:
    if path is None:
        return nullcontext()
    with writing(path, "Name another file with --rejects."):
        return path.open("a" if append else "w", encoding="utf-8", buffering=1)


class InFlight:
    """Unacknowledged rows, bounded by count and bytes. Thread safe."""

    def __init__(self, done: int = 0) -> None:
        self._change = threading.Condition()
        self._sizes: dict[int, int] = {}
        self._bytes = 0
        self._failed: BaseException | None = None
        self._last = done

    def add(self, number: int, size: int) -> None:
        """Add the next row; waits for room. Raises the error of a failed delivery."""
        with self._change:
            self._change.wait_for(lambda: self._has_room(size) or self._failed is not None)
            if self._failed is not None:
                raise self._failed
            self._sizes[number] = size
            self._bytes += size
            self._last = number

    def pass_over(self, number: int) -> None:
        with self._change:
            self._last = number

    def acknowledged(self, number: int) -> None:
        with self._change:
            self._bytes -= self._sizes.pop(number)
            self._change.notify()

    def failed(self, error: BaseException) -> None:
        """Record a failed delivery. The row stays in the window, so that neither it nor later rows count as done."""
        with self._change:
            self._failed = self._failed or error
            self._change.notify()

    def wait_empty(self, seconds: float) -> None:
        """Wait until all rows are acknowledged. Raises a delivery's error, or BrokerError after ``seconds``."""
        with self._change:
            in_time = self._change.wait_for(lambda: not self._sizes or self._failed is not None, seconds)
            if self._failed is not None:
                raise self._failed
            if not in_time:
                raise BrokerError(f"{len(self._sizes)} rows were not acknowledged.", "Publish again with --resume.")

    @property
    def done(self) -> int:
        """All rows up to this number are acknowledged or invalid."""
        with self._change:
            return next(iter(self._sizes), self._last + 1) - 1  # rows are in the order of their numbers

    def _has_room(self, size: int) -> bool:
        return not self._sizes or (len(self._sizes) < MAX_ROWS and self._bytes + size <= MAX_BYTES)


@dataclass(frozen=True, slots=True)
class Progress:
    path: str
    format: str
    topic: str
    split: str
    done: int = 0
    place: str = ""
    """File and row of the last of these; a different one there means that the data set has changed."""


_HOME_FIX: Final = "Make room, or set `home` to a folder that can be written."


class ProgressFile:
    """The progress of one data set, format, split, topic and broker, written atomically. Not thread safe."""

    def __init__(self, home: Path, path: str, format: str, topic: str, split: str, bootstrap: str) -> None:
        self._empty = Progress(path, format, topic, split)
        key = json.dumps([path, format, topic, split, bootstrap])
        self.file = home / "publish" / f"{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"
        self._places: dict[int, str] = {}
        self._saved = 0

    def load(self) -> Progress:
        """The progress of an earlier run, or zero. Raises ConfigError for a damaged file."""
        try:
            progress = Progress(**json.loads(self.file.read_bytes()))
            if not isinstance(progress.done, int) or progress.done < 0:
                raise ValueError("done is not a count")
        except FileNotFoundError:
            return self._empty
        except (OSError, ValueError, TypeError) as error:
            problem = f"{self.file} cannot be read ({error})."
            raise ConfigError(problem, "Delete it, and publish from the first row.") from error
        self._saved = progress.done
        return progress

    def note(self, number: int, place: str) -> None:
        self._places[number] = place

    def save(self, done: int, every: int = SAVE_ROWS) -> None:
        """Save the progress if it is at least ``every`` rows ahead of the file."""
        if done - self._saved < every or done not in self._places:
            return
        content = {**asdict(self._empty), "done": done, "place": self._places[done]}
        with writing(self.file, _HOME_FIX):
            replace_file(self.file, json.dumps(content).encode())
        self._saved = done
        self._places = {number: place for number, place in self._places.items() if number >= done}

    def reset(self) -> None:
        self._saved = 0
        with writing(self.file, _HOME_FIX):
            self.file.unlink(missing_ok=True)


def wait_until_stored(settings: Settings, last: Mapping[int, int], seconds: float) -> None:
    """Wait until ingest has stored or quarantined everything up to offsets of ``kafka.topic``, by partition. Raises
    StoreUnavailable if it has not done so within ``seconds``; BrokerError or StoreError if the topic or the store
    cannot be read."""
    topic = settings.kafka.topic
    with closing(Admin(settings.kafka)) as admin:
        topic_id = admin.topic_id(topic)
    store, deadline = SampleStore(settings.lake), time.monotonic() + seconds
    with meter("waiting for ingest") as show:
        while behind := _behind(store, topic, topic_id, last):
            if time.monotonic() >= deadline:
                raise StoreUnavailable(
                    f"ingest has not stored everything after {seconds:g} s: {behind:,} records are left.",
                    "All was delivered, and waits in the topic. Is `ratchet ingest` running?",
                )
            show(partial("{:,} records are left".format, behind))
            time.sleep(PAUSE_SECONDS)


def _behind(store: SampleStore, topic: str, topic_id: str | None, last: Mapping[int, int]) -> int:
    """Unread records up to the offsets, counted from 0 for partitions that were never read."""
    newest = newest_of_topic(store.positions().values(), topic)
    read = {number: each.next for number, each in newest.items() if each.topic_id == topic_id}
    return sum(max(0, offset + 1 - read.get(number, 0)) for number, offset in last.items())
