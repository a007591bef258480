"""What became of the rows of a data set that was published, and the exit status that says so."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TextIO

from core.errors import ConfigError, RecordError
from streams.folders import DatasetRow, FolderItem

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
