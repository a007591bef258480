"""Log formats: one JSON object per line, or a line of text for people, without secrets."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Final

from core.request_context import current

MAX_MESSAGE_CHARS: Final = 4000
MAX_TRACEBACK_CHARS: Final = 8000
"""Container runtimes cut lines at 16 KiB, which breaks JSON objects. Tracebacks keep their end."""
_encoder: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
STARS = "**********"
LEAST_CHARS = 8
"""Shorter values are not real secrets, and would match inside words."""
_PASSWORD = re.compile(r"(://[^/\s:@]*:)[^/\s]*@")
_PARAMETER = re.compile(r"(?i)([?&][^=&\s]*(?:password|secret|token|key|signature)[^=&\s]*=)[^&\s]+")
_NAMED = re.compile(
    r"(?i)((?:password|passwd|passphrase|secret|token|api[_-]?key|access[_-]?key|operator[_-]?key)"
    r"[\"']?\s*[=:]\s*[\"']?)(?!\*\*)[^\s\"',;&)}\]]+"
)
_BEARER = re.compile(r"(?i)\b(bearer|basic)(\s+)[A-Za-z0-9._~+/=-]{8,}")
_API_KEY = re.compile(r"\b(rk_[0-9A-Za-z]{1,16}_)[0-9A-Za-z]+")
"""An API key; its ID is not secret, see :mod:`core.ledger.keys`."""


def redact_url(text: str) -> str:
    """A URL without its password and secret query parameters."""
    shown = _PASSWORD.sub(rf"\g<1>{STARS}@", text)
    return _PARAMETER.sub(rf"\g<1>{STARS}", shown)


class Redactor:
    """Removes secrets from text: given ones, and anything that looks like a key, password or token."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        """``secrets``: values never shown; those under 8 characters are ignored."""
        longest_first = sorted({each for each in secrets if len(each) >= LEAST_CHARS}, key=len, reverse=True)
        self._secrets = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def redact(self, text: str) -> str:
        if self._secrets is not None:
            text = self._secrets.sub(STARS, text)
        text = _BEARER.sub(rf"\g<1>\g<2>{STARS}", redact_url(text))
        return _NAMED.sub(rf"\g<1>{STARS}", _API_KEY.sub(rf"\g<1>{STARS}", text))


class RecordFormatter(logging.Formatter):
    """The base of both formats. ``labels`` are on every line: ``role``, and ``replica`` for a replica. ``request_id``:
    this thread's request ID, used if :mod:`core.request_context` has none."""

    def __init__(
        self, labels: Mapping[str, str], redactor: Redactor | None = None, request_id: Callable[[], str] = str
    ) -> None:
        super().__init__()
        self.labels = dict(labels)
        self.redactor = redactor or Redactor()
        self.request_id = request_id

    def message(self, record: logging.LogRecord) -> str:
        text = self.redactor.redact(record.getMessage())
        return text if len(text) <= MAX_MESSAGE_CHARS else f"{text[:MAX_MESSAGE_CHARS]} [...]"

    def traceback(self, record: logging.LogRecord) -> str:
        parts = [self.formatException(record.exc_info)] if record.exc_info else []
        parts += [self.formatStack(record.stack_info)] if record.stack_info else []
        text = self.redactor.redact("\n".join(parts))
        return text if len(text) <= MAX_TRACEBACK_CHARS else f"[...] {text[-MAX_TRACEBACK_CHARS:]}"

    def request(self) -> dict[str, Any]:
        request = current()
        fields: dict[str, Any] = {"request_id": (request and request.request_id) or self.request_id()}
        if request is not None:
            fields |= {"release": request.release, "adapter": request.adapter}
        return {name: value for name, value in fields.items() if value not in (None, "")}


class JsonFormatter(RecordFormatter):
    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": timestamp(record.created), "level": record.levelname, "logger": record.name,
            "message": self.message(record), **self.labels, "pid": record.process, **self.request(),
        }  # fmt: skip
        if traceback := self.traceback(record):
            fields["traceback"] = traceback
        return _encoder.encode(fields)


class TextFormatter(RecordFormatter):
    def format(self, record: logging.LogRecord) -> str:
        labels = {name: value for name, value in self.labels.items() if name != "role"} | self.request()
        about = "".join(f" {name}={value}" for name, value in labels.items())
        line = f"{timestamp(record.created)} {record.levelname} {record.name}: {self.message(record)}"
        line += f" [{about.strip()}]" if about else ""
        traceback = self.traceback(record)
        return f"{line}\n{traceback}" if traceback else line


def timestamp(seconds: float) -> str:
    """ISO 8601 in UTC, with milliseconds: ``1970-01-01T00:00:00.500Z``."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def readable(line: str) -> str:
    """A log line as text; lines that are not our JSON objects stay unchanged."""
    try:
        fields = json.loads(line)
        shown = f"{fields['time']} {fields['level']} {fields['message']}"
    except (ValueError, KeyError, TypeError):
        return line
    return f"{shown}\n{fields['traceback']}" if "traceback" in fields else shown


def writes_json() -> bool:
    return any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers)
