"""What `ratchet init` is told: by options, by answers on a terminal, or not at all; and the settings that follow."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from core.errors import ConfigError
from core.loading import describe, load_settings
from core.log_format import STARS
from core.settings import Settings
from core.settings.serving import SHIPPED
from ops.cli.context import Context

EMBEDDED = "embedded"
"""Stands for the broker that `ratchet up` starts."""


@dataclass(frozen=True)
class Answers:
    """What was asked, or given as options."""

    model: str
    weights: Path | None
    data: Path | None
    labels: Path | None
    broker: str
    topic: str


def on_terminal() -> bool:
    """Whether somebody can be asked."""
    return sys.stdin.isatty()


def ask(shared: Context, home: Path | None, given: Answers, yes: bool) -> Answers:
    """What was given, what is answered on a terminal, and defaults."""
    defaults = _load(shared, {} if home is None else {"home": home})
    by_flag = {each for each, origin in defaults.origins.items() if origin == "flag"}
    asking = on_terminal() and not yes
    if not (asking or yes or given.model or "base.clip" in by_flag):
        raise ConfigError(
            "--model is not given, and there is no terminal to ask on.", "Give it, or --yes for defaults."
        )

    def answer(value: str, question: str, default: str) -> str:
        return value or (typer.prompt(question, default=default).strip() if asking else default)

    def path(value: Path | None, question: str) -> Path | None:
        if value is not None or not asking:
            return value
        text = typer.prompt(question, default="", show_default=False).strip()
        return Path(text).expanduser() if text else None

    model = answer(given.model, "Model: a registered base, a folder, or an open_clip architecture", defaults.base.clip)
    weights, data, labels = given.weights, given.data, given.labels
    if asking and not (Path(model).is_dir() or _is_registered(defaults.home, model)):
        weights = path(weights, "Its weights, a safetensors file")
    if labels is None:
        data = path(data, "Folder of pictures that the model must not get worse at (none: empty)")
        if data is not None:
            labels = path(labels, "File with their labels or captions (subfolders are the classes: empty)")
    bootstrap = defaults.kafka.bootstrap if "kafka.bootstrap" in by_flag else EMBEDDED
    broker = answer(given.broker, "Kafka brokers, host:port; embedded: one for this machine", bootstrap)
    topic = answer(given.topic, "Topic with new pairs", defaults.kafka.topic)
    return Answers(model, weights, data, labels, broker, topic)


def _is_registered(home: Path, model: str) -> bool:
    from serving.engines.clip_base import list_bases

    return model == SHIPPED or model in list_bases(home, "clip")


def settings_of(shared: Context, answers: Answers, home: Path | None) -> tuple[Settings, dict[str, Any]]:
    """The settings that will be in effect, and those of them that were chosen."""
    named: dict[str, Any] = {"kafka.topic": answers.topic}
    if answers.broker != EMBEDDED:
        named["kafka.bootstrap"] = answers.broker
    if home is not None:
        named["home"] = home
    settings = _load(shared, named)
    flags = [flag.partition("=")[0].strip() for flag in shared.flags]
    shown = {row: str(value) for row, value, _, _ in describe(settings)}
    for flag in flags:
        if STARS in shown[flag]:
            variable = f"RATCHET_{flag.upper().replace('.', '__')}"
            raise ConfigError(f"--set {flag} is a secret, and is not written to a file.", f"Set {variable} instead.")
    return settings, {each: _value(settings, each) for each in [*flags, *named]}


def _load(shared: Context, named: dict[str, Any]) -> Settings:
    """Without a settings file: the one that is there is to be replaced."""
    return load_settings(Path(os.devnull), {**shared.overrides, **named})


def _value(settings: Settings, name: str) -> Any:
    value: Any = settings
    for part in name.split("."):
        value = getattr(value, part)
    return value
