"""The templates, and their filters for times, numbers, shares and names."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2

from core.ledger import answers
from core.ledger.rows import SYSTEM_ACTORS
from ops.console.public import REFRESH_SECONDS, SPEAKERS
from ops.console.timeline import ranges, records

TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,  # captions, reasons and names are untrusted
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
STEPS = ((60, "second"), (60, "minute"), (24, "hour"), (7, "day"), (52, "week"))
TONES = {
    "passed": "good", "committed": "good", "done": "good", "sent": "good", "ready": "good", "stable": "good",
    "rejected": "bad", "failed": "bad", "away": "bad", "withdrawn": "bad", "collected": "open",
    "inconclusive": "open", "held": "open", "pending": "open", "preparing": "open", "abandoned": "open",
    "training": "busy", "trained": "busy", "gated": "busy", "sending": "busy", "canary": "busy", "shadow": "busy",
}  # fmt: skip
STATES = {
    "training": "training", "trained": "being judged", "gated": "being proposed", "done": "finished",
    "failed": "failed", "abandoned": "given up",
}  # fmt: skip
KINDS = {
    "initial": "first start", "update": "learned", "rollback": "taken back", "release": "released by hand",
    "promotion": "promoted",
}  # fmt: skip


def ago(moment: datetime | None, now: datetime | None = None) -> str:
    if moment is None:
        return "never"
    count = ((now or datetime.now(UTC)) - moment).total_seconds()
    if count < 5:
        return "just now"
    for size, unit in STEPS:
        if count < size:
            return f"{int(count)} {unit}{'' if int(count) == 1 else 's'} ago"
        count /= size
    return f"{moment:%Y-%m-%d}"


def utc(moment: datetime | None) -> str:
    return "" if moment is None else f"{moment:%Y-%m-%d %H:%M:%S} UTC"


def iso(moment: datetime | None) -> str:
    return "" if moment is None else moment.isoformat()


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.0f} days"


def number(value: float | None) -> str:
    """A number with separators; one decimal for small fractions."""
    if value is None:
        return "–"
    return f"{value:,.1f}" if value and abs(value) < 10 and value != int(value) else f"{value:,.0f}"


def points(share: float | None) -> str:
    """A difference of shares in percentage points, with sign."""
    return "–" if share is None else f"{100 * share:+.1f}".replace("-", "−")


def percent(share: float | None, digits: int = 0) -> str:
    return "–" if share is None else f"{100 * share:.{digits}f}%"


def odds(chance: float) -> str:
    return "less than once in a billion times" if chance < 1e-9 else f"once in {1 / chance:,.0f} times"


def adapter(name: str | None) -> str:
    return name or "the base alone"


def pairs(value: Any) -> str:
    """A small JSON value in one line, for the audit log."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {pairs(child)}" for key, child in value.items() if child not in (None, "", [], {}))
    if isinstance(value, (list, tuple)):
        return " ".join(pairs(child) for child in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


TEMPLATES.filters |= {
    "ago": ago, "utc": utc, "iso": iso, "duration": duration, "number": number, "points": points, "percent": percent,
    "adapter": adapter, "pairs": pairs, "answers": answers, "odds": odds,
}  # fmt: skip
TEMPLATES.globals |= {
    "system_actors": SYSTEM_ACTORS, "speakers": SPEAKERS, "refresh_seconds": REFRESH_SECONDS, "tones": TONES,
    "states": STATES, "kinds": KINDS, "records": records, "ranges": ranges,
}  # fmt: skip
