"""Changes values in a settings file, and leaves everything else in it as it was written, comments too."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from core.errors import ConfigError
from core.files import replace_file


def update_section(path: Path, section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Set ``values`` of one section in a YAML file, in one step; the file is made if there is none.

    Returns:
        What was there before, by name; names that were not there are left out.

    Raises:
        ConfigError: the file is written in a way that this cannot edit; it is left as it is.
    """
    text = path.read_text() if path.exists() else ""
    before = _parse(path, text)
    old = before.get(section) or {}
    wanted = before | {section: old | dict(values)}
    changed = _edited(text, section, values)
    if _parse(path, changed) != wanted:
        lines = ", ".join(f"{section}.{name}: {value}" for name, value in values.items())
        raise ConfigError(f"{path} cannot be edited line by line.", f"Write these into it yourself: {lines}.")
    replace_file(path, changed.encode(), mode=path.stat().st_mode & 0o777 if path.exists() else 0o644)
    return {name: old[name] for name in values if name in old}


def _edited(text: str, section: str, values: Mapping[str, Any]) -> str:
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if re.match(rf"{re.escape(section)}:\s*(#.*)?$", line)), None)
    if start is None:
        lines += [f"{section}:"]
        start = len(lines) - 1
    end = next((i for i in range(start + 1, len(lines)) if re.match(r"[^\s#]", lines[i])), len(lines))
    block = lines[start + 1 : end]
    indent = next((m.group(1) for line in block if (m := re.match(r"(\s+)[^\s#]", line))), "  ")
    for name, value in values.items():
        new = f"{indent}{name}: {yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}"
        position = next((i for i, line in enumerate(block) if re.match(rf"{indent}{re.escape(name)}:", line)), None)
        if position is None:
            block.insert(0, new)
        else:
            comment = re.search(r"\s+#.*$", block[position])
            block[position] = new + (comment.group() if comment else "")
    return "\n".join([*lines[: start + 1], *block, *lines[end:]]) + "\n"


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        value = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}", "Fix the line that it names.") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a mapping of settings.", "See docs/operator.md for an example.")
    return value
