"""The settings file with every setting in it: what was chosen is set, the default of everything else is commented out.

Prose begins with ``# ``, a setting that is commented out with ``#`` alone: without that sign it is set.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from core.loading import describe
from core.settings import Settings
from core.settings.section import Section

HEAD = """\
# Settings of Ratchet, made by `ratchet init`. A line that begins with # and no space is a default: take the # away (and
# that of the section above it) to set another value. `ratchet config show` tells what is in effect, and why.
"""


def settings_yaml(chosen: Mapping[str, Any]) -> str:
    """The file's text.

    Args:
        chosen: values by dotted name (``{"serve.port": 9000}``), those of no secret. One that is the default is
            commented out all the same.
    """
    defaults = {name: value for name, value, _, _ in describe(Settings())}
    chosen = {name: value for name, value in chosen.items() if value != defaults[name]}
    return HEAD + "".join(f"{line}\n" for line in _lines(Settings, "", chosen, live=True))


def _lines(model: type[BaseModel], prefix: str, chosen: Mapping[str, Any], live: bool) -> Iterator[str]:
    """Lines of a section's settings. ``live``: whether the section itself is set, and not commented out."""
    indent = "  " * prefix.count(".")
    for name, field in model.model_fields.items():
        if field.exclude:
            continue
        dotted = f"{prefix}{name}"
        section = _section(field)
        if not prefix:
            yield ""
        if section is None:
            yield f"{indent}# {field.description}"
            sign = "" if dotted in chosen else "#"
            yield f"{indent}{sign}{name}: {_value(chosen.get(dotted, field.get_default(call_default_factory=True)))}"
            continue
        inner = any(each.startswith(f"{dotted}.") for each in chosen)
        yield f"{indent}# {(section.__doc__ or '').splitlines()[0]}"
        yield f"{indent}{'' if live and inner else '#'}{name}:"
        yield from _lines(section, f"{dotted}.", chosen, live and inner)


def _section(field: FieldInfo) -> type[Section] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def _value(value: Any) -> str:
    if isinstance(value, list):
        value = [str(each) if isinstance(each, PurePath) else each for each in value]
    value = str(value) if isinstance(value, PurePath) else value
    return yaml.safe_dump(value, default_flow_style=True, width=float("inf")).splitlines()[0]
