"""``ratchet publish``: a data set to the topic, row by row, in memory that does not depend on its size."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from core.errors import BrokerError, ConfigError, RatchetError, RecordError
from core.progress import meter, say
from core.settings import Settings
from ratchet_client.encoding import Encoding
from ratchet_client.producer import Delivery, check_sample
from ratchet_client.records import Sample, make_sample
from streams.clients import connect_producer, producer_limits
from streams.datasets import read_dataset
from streams.datasets.detection import choose
from streams.folders import DatasetRow, FolderItem
from streams.publish_report import PublishReport, RejectsFile, open_rejects
from streams.publish_resume import InFlight, ProgressFile


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
        format: a name of :data:`streams.datasets.FORMATS`; found by itself where it is None.
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
