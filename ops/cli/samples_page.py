"""Samples as one HTML file: thumbnails inside, no scripts, nothing fetched."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment

from core.errors import ConfigError, RecordError
from core.settings.streams import Ingest
from ratchet_client.images import decode_image

MAX_CARDS: Final = 500
"""Samples on one page: some 5 MB of thumbnails."""
SIDE: Final = 192
MAX_VALUE_CHARS: Final = 2000


@dataclass(frozen=True, slots=True)
class Card:
    """One sample on the page."""

    picture: str | None
    """As a data URI; None where it does not decode."""
    facts: Sequence[tuple[str, str]]


def write_page(path: Path, title: str, rows: Iterable[Mapping[str, Any]], limits: Ingest) -> int:
    """Write samples with their images; returns how many. Raises ConfigError when the file cannot be written."""
    cards = [Card(thumbnail(row["image"], limits), list(facts(row))) for row in rows]
    template = resources.files("ops.cli").joinpath("templates/samples.html").read_text("utf-8")
    date = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    page = Environment(autoescape=True).from_string(template).render(title=title, cards=cards, made=date)
    try:
        path.write_text(page, "utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}.", "Name another file.") from error
    return len(cards)


def thumbnail(image: bytes, limits: Ingest) -> str | None:
    """An image as a small JPEG in a data URI; None where it does not decode."""
    try:
        picture = decode_image(image, limits.max_pixels, limits.max_image_bytes)
    except RecordError:
        return None
    picture.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def facts(row: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """What is known of a sample, without its image and what is empty."""
    for name, value in sorted(row.items(), key=lambda item: item[0] != "id"):
        if name in ("image", "topic", "partition", "offset") or value in (None, "", []):
            continue
        shown = f"{value:%Y-%m-%d %H:%M:%S} UTC" if isinstance(value, datetime) else str(value)
        if isinstance(value, list):
            shown = ", ".join(value)
        yield name, shown[:MAX_VALUE_CHARS]
    yield "record", f"{row['topic']}:{row['partition']}:{row['offset']}"
