"""``ratchet publish``: a data set to the topic, row by row, in memory that does not depend on its size."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Final, TextIO

from core.errors import BrokerError, ConfigError, RatchetError, RecordError
from core.progress import meter, say
from core.settings import Settings
from ratchet_client.encoding import Encoding
from ratchet_client.producer import Delivery, check_sample
from ratchet_client.records import Sample, make_sample
from streams.kafka.clients import connect_producer, producer_limits
from streams.publish.datasets import choose, read_dataset
from streams.publish.folders import DatasetRow, FolderItem
from streams.publish.publish_progress import InFlight, ProgressFile


def publish(
    settings: Settings,
    path: Path | str,
    *,
    format: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    source: str | None = None,
    encoding: Encoding = "raw",
    dry_run: bool = False,
    skip_bad: bool = False,
    resume: bool = False,
    rejects: Path | None = None,
) -> PublishReport:
    """Send the rows of a data set, and wait until the broker has acknowledged each.

    Args:
        settings: topic, broker and the bounds of samples.
        path: a file, a folder, or a pattern of shards.
        format: a name of :data:`streams.publish.datasets.FORMATS`; found by itself where it is None.
        split: only rows of this split, and those of none.
        limit: at most this many rows in this run.
        source: stands in where a row names none.
        encoding: how records are written.
        dry_run: read and check all rows as if to send them; bad rows are counted.
        skip_bad: count rows that are no valid samples and go on, rather than end with the error of the first.
        resume: go on behind the rows that an earlier run of the same path, format, split and topic dealt with.
        rejects: write refused rows to this file, a JSON object a line; a resumed run adds to it.

    Raises:
        RecordError: ``path`` is no data set, has no rows, cannot be read any further, or has a bad row and such are not
            skipped. What was sent before is acknowledged, and a resumed run begins at the bad row.
        BrokerError: the broker cannot be reached, or a row was not delivered.
        ConfigError: the file of progress, or of rejects, cannot be used; or the data set changed since.
    """
    chosen = choose(path, format)
    report = PublishReport(settings.kafka.topic, chosen.name, dry_run)
    rows = read_dataset(path, chosen.name, split, settings.ingest.max_image_bytes)
    kafka = settings.kafka
    progress = ProgressFile(
        settings.home, str(Path(path).resolve()), chosen.name, kafka.topic, split or "", kafka.bootstrap
    )
    if resume:
        report.before = _skip(rows, progress)
    with ExitStack() as stack:
        refused = stack.enter_context(open_rejects(rejects, append=resume))
        run = _Run(settings, report, refused, source, skip_bad or dry_run)
        if dry_run:
            run.check(islice(rows, limit))
        else:
            run.send(islice(rows, limit), progress, encoding, resume)
    if not (report.delivered or report.refused or report.before):
        raise RecordError("dataset", f"{path} has no rows.", "Name a data set with samples in it.")
    return report


def _skip(rows: Iterator[DatasetRow], progress: ProgressFile) -> int:
    """Pass over what was dealt with; returns how many rows that were."""
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


class _Run:
    """One run over the rows."""

    def __init__(
        self, settings: Settings, report: PublishReport, rejects: RejectsFile, source: str | None, skip_bad: bool
    ) -> None:
        self._settings = settings
        self._report = report
        self._rejects = rejects
        self._source = source
        self._skip_bad = skip_bad
        self._lock = threading.Lock()

    def check(self, rows: Iterator[DatasetRow]) -> None:
        """Do everything but send."""
        started = time.monotonic()
        with meter("checking") as show:
            for number, row in enumerate(rows, start=self._report.before + 1):
                sample = self._sample(number, row)
                if sample is not None and isinstance(row.content, FolderItem):
                    self._count(len(sample.image))
                    self._report.show(row, row.content)
                show(partial(self._report.progress, started))
        self._report.seconds = time.monotonic() - started

    def send(self, rows: Iterator[DatasetRow], progress: ProgressFile, encoding: Encoding, resume: bool) -> None:
        """Send the rows; what is acknowledged is in the file of progress, however this ends."""
        started = time.monotonic()
        first = self._report.before + 1
        in_flight = InFlight(self._report.before)
        settings = self._settings
        producer = connect_producer(settings.kafka, settings.ingest, encoding=encoding, on_delivery=lambda _: None)
        try:
            if not resume:
                progress.reset()
            with meter(f"publishing to {settings.kafka.topic}") as show:
                for number, row in enumerate(rows, start=first):
                    sample = self._sample(number, row)
                    progress.note(number, row.place)
                    if sample is None:
                        in_flight.pass_over(number)
                    else:
                        in_flight.add(number, len(sample.image))
                        future = producer.send_checked(sample)
                        size = len(sample.image)
                        future.add_done_callback(partial(self._delivered, in_flight, number, row.place, size))
                    progress.save(in_flight.done)
                    show(partial(self._report.progress, started))
            producer.flush()
            in_flight.wait_empty(producer.delivery_seconds)
        except (RatchetError, KeyboardInterrupt):
            with suppress(BrokerError):  # the error that ends it is told, not what follows from it
                producer.flush()
                in_flight.wait_empty(1.0)
            say(f"ended early: {self._report.progress(started)}; --resume goes on behind them")
            raise
        finally:
            producer.close()
            progress.save(in_flight.done, every=1)
            self._report.seconds = time.monotonic() - started

    def _sample(self, number: int, row: DatasetRow) -> Sample | None:
        """The sample of a row; None where it is refused and such rows are skipped. Raises RecordError otherwise."""
        if isinstance(row.content, RecordError):
            self._refuse(number, row, row.content)
            return None
        try:
            return _checked(row.content, row.place, self._settings, self._source)
        except RecordError as error:
            self._refuse(number, row, error)
            return None

    def _refuse(self, number: int, row: DatasetRow, error: RecordError) -> None:
        self._rejects.write(number, row.place, error)
        if not self._skip_bad:
            fix = f"{error.fix} Or leave out rows like this: --skip-bad."
            raise RecordError(error.reason, error.message, fix) from error
        self._report.refuse(error)

    def _delivered(self, in_flight: InFlight, number: int, place: str, size: int, future: Future[Delivery]) -> None:
        error = future.exception()
        if error is not None:
            named = BrokerError(f"{place}: {error.message}", error.fix) if isinstance(error, BrokerError) else error
            in_flight.failed(named)
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
    """The sample of a row, valid by the rules of ingest. Raises RecordError that names file, row and field."""
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
        field = f", field '{about}'" if about in ("image", "text") else ""
        raise RecordError(error.reason, f"{place}{field}: {error.message}", error.fix) from error
    return sample


DELIVERED: Final = 0
"""Every row was acknowledged (or, in a dry run, would have been sent)."""
FAILED: Final = 1
"""Nothing more could be done: an error of the broker, of the settings, or of a row while bad rows were not skipped."""
SOME_REFUSED: Final = 3
ALL_REFUSED: Final = 4
MAX_EXAMPLES: Final = 5
MAX_SHOWN_CHARS: Final = 300


@dataclass
class PublishReport:
    """Counts of rows; a row is one sample, so an image with five captions is five."""

    topic: str
    format: str = ""
    """Name of the format that was read."""
    dry_run: bool = False
    delivered: int = 0
    """Rows that the broker acknowledged; in a dry run, rows that it would have been sent."""
    size: int = 0
    """Bytes of the images of these."""
    before: int = 0
    """Rows that were passed over because an earlier run, which this one resumed, had dealt with them."""
    seconds: float = 0.0
    partitions: Counter[int] = field(default_factory=Counter)
    last: dict[int, int] = field(default_factory=dict)
    """The highest offset that was acknowledged, by partition."""
    refused: Counter[str] = field(default_factory=Counter)
    """Rows that are no valid samples, by reason; they were not sent."""
    examples: list[str] = field(default_factory=list)
    """The first few messages about refused rows."""
    samples: list[str] = field(default_factory=list)
    """In a dry run, the first few valid rows."""

    @property
    def exit_status(self) -> int:
        """0: all delivered, or nothing left to deliver; 3: some rows were refused; 4: all were."""
        if not self.refused:
            return DELIVERED
        return SOME_REFUSED if self.delivered or self.before else ALL_REFUSED

    def refuse(self, error: RecordError) -> None:
        """Count a row that is no valid sample."""
        self.refused[error.reason] += 1
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append(str(error))

    def show(self, row: DatasetRow, item: FolderItem) -> None:
        """Keep a valid row as an example."""
        if len(self.samples) < MAX_EXAMPLES:
            words = item.text or f"{item.question} -> {item.answer}"
            label = f" [{item.label}]" if item.label else ""
            self.samples.append(f"{row.place}: {words[:MAX_SHOWN_CHARS]}{label}")

    def progress(self, since: float) -> str:
        """How far it is, for people; ``since`` is a time of the monotonic clock."""
        seconds = max(time.monotonic() - since, 1e-6)
        megabytes = self.size / 1e6
        refused = f", {self.refused.total()} refused" if self.refused else ""
        return (
            f"{self.delivered} rows, {megabytes:.1f} MB, {self.delivered / seconds:.0f} rows/s,"
            f" {megabytes / seconds:.1f} MB/s{refused}"
        )

    def __rich__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        rate = self.delivered / self.seconds if self.seconds else 0.0
        speed = f"{rate:.0f} rows/s, {self.size / 1e6 / self.seconds if self.seconds else 0.0:.1f} MB/s"
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


class RejectsFile:
    """Rows that were refused, a JSON object a line: ``row``, ``place``, ``reason``, ``message``, ``fix``."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def write(self, number: int, place: str, error: RecordError) -> None:
        """Add a row; ``number`` counts from 1."""
        if self._stream is not None:
            entry = {
                "row": number,
                "place": place,
                "reason": error.reason,
                "message": error.message,
                "fix": error.fix,
            }
            # Names and texts may hold bytes that were no UTF-8; JSON escapes them.
            self._stream.write(json.dumps(entry) + "\n")


@contextmanager
def open_rejects(path: Path | None, append: bool) -> Iterator[RejectsFile]:
    """The file that refused rows are written to, if there is one. Raises ConfigError when it cannot be written."""
    if path is None:
        yield RejectsFile(None)
        return
    try:
        stream = path.open("a" if append else "w", encoding="utf-8", buffering=1)
    except OSError as error:
        problem = f"{path} cannot be written: {error.strerror or error}."
        raise ConfigError(problem, "Name another file with --rejects.") from error
    with stream:
        yield RejectsFile(stream)
