"""Logging of a process to standard error, the same for every part, on a laptop and on a cluster."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from core.log_format import JsonFormatter, RecordFormatter, Redactor, TextFormatter

if TYPE_CHECKING:  # commands log before they have read the settings, and `ratchet --help` never does
    from pydantic import BaseModel

    from core.settings import Settings

OURS = ("ratchet", "streams")
"""Loggers to which ``logs.level`` applies. Libraries log from warnings up."""


@dataclass(frozen=True, slots=True)
class LogConfig:
    format: Literal["json", "text"]
    level: int
    labels: Mapping[str, str]
    secrets: Sequence[str] = field(repr=False)


_config: LogConfig | None = None
_SECRET = re.compile(r"(?i)password|passphrase|secret|token|credential")


class _OnceAMinute(logging.Filter):
    """Passes each line of kafka-python's source once a minute: it logs every attempt during an outage."""

    SECONDS = 60.0

    def __init__(self) -> None:
        super().__init__()
        self._logged_at: dict[tuple[str, int], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.name.startswith("kafka."):
            return True
        place = record.name, record.lineno
        if record.created - self._logged_at.get(place, -self.SECONDS) < self.SECONDS:
            return False
        self._logged_at[place] = record.created
        return True


def configure_logging(
    settings: Settings | None = None, role: str = "ratchet", *, service: bool = True, replica: str = "",
    request_id: Callable[[], str] = str,
) -> None:  # fmt: skip
    """Log to standard error as the settings say (None: before they are read). Call it at process start; the last call
    wins. A root logger with foreign handlers, as in a program that uses Ratchet as a library, stays unchanged. ``role``
    is the process's (``serve``, ``ingest``, ``encoder``, ...), ``replica`` which one of several. ``service``: a
    long-running process whose log is collected, not an interactive command."""
    wanted, least = (settings.logs.format, settings.logs.level) if settings is not None else ("auto", "info")
    labels = {"role": role} | ({"replica": replica} if replica else {})
    level = logging.getLevelNamesMapping()[least.upper()]
    inherit(LogConfig(log_format(wanted, service), level, labels, tuple(secrets_of(settings))), request_id)
    # The client logs a page of lines about a broker that is away; a command's error names it in one.
    logging.getLogger("kafka").setLevel(logging.NOTSET if service else logging.CRITICAL)


def inherited() -> LogConfig | None:
    """This process's configuration, for :func:`inherit` in a spawned one; None: not configured."""
    return _config


def inherit(config: LogConfig | None, request_id: Callable[[], str] = str) -> None:
    global _config
    root = logging.getLogger()
    own = [handler for handler in root.handlers if isinstance(handler.formatter, RecordFormatter)]
    if config is None or len(own) < len(root.handlers):
        return
    _config = config
    formatter = JsonFormatter if config.format == "json" else TextFormatter
    handler = logging.StreamHandler()
    handler.addFilter(_OnceAMinute())
    handler.setFormatter(formatter(config.labels, Redactor(config.secrets), request_id))
    for each in own:
        root.removeHandler(each)
    root.addHandler(handler)
    root.setLevel(max(config.level, logging.WARNING))
    for name in OURS:
        logging.getLogger(name).setLevel(config.level)
    logging.captureWarnings(True)


def log_format(format: Literal["auto", "json", "text"], service: bool = True) -> Literal["json", "text"]:
    """Resolve ``auto``: JSON for a service without a terminal, text elsewhere."""
    if format != "auto":
        return format
    return "json" if service and not sys.stderr.isatty() else "text"


def secrets_of(settings: Settings | None, environ: Mapping[str, str] = os.environ) -> list[str]:
    secrets = [value for name, value in environ.items() if _SECRET.search(name)]
    if settings is None:
        return secrets
    secrets += _secrets_in(settings)
    secrets += [value for name, value in settings.kafka.client.items() if _SECRET.search(name)]
    key = settings.home / "operator.key"
    if settings.serve.operator_key is None and key.is_file():
        secrets.append(key.read_text().strip())
    return secrets


def _secrets_in(section: BaseModel) -> Iterator[str]:
    from pydantic import BaseModel, SecretStr

    for name in type(section).model_fields:
        value: Any = getattr(section, name)
        if isinstance(value, SecretStr):
            yield value.get_secret_value()
        elif isinstance(value, BaseModel):
            yield from _secrets_in(value)
