"""Loading, validation and editing of settings, with the origin of each value. Precedence: flags, environment
(``RATCHET_SERVE__PORT=9000``), ``ratchet.yaml``, defaults. Load once at start with :func:`load_settings`; nothing else
in Ratchet reads the environment."""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Iterator, Mapping
from itertools import accumulate, chain
from operator import attrgetter
from pathlib import Path
from typing import Any, Final, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from core.errors import ConfigError
from core.files import replace_file
from core.log_format import STARS, redact_url
from core.settings import Settings
from core.settings.section import Section

log = logging.getLogger("ratchet.settings")
PREFIX = "RATCHET_"
FILE = "ratchet.yaml"
FILE_VARIABLE = "RATCHET_CONFIG"
CLIENT_VARIABLES = ("RATCHET_CLIENT_URL", "RATCHET_CLIENT_KEY")
"""Those of programs that use a server, such as the examples."""
_OF_KUBERNETES = re.compile(r"(.+_)?(SERVICE_HOST|SERVICE_PORT(_.+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)")
"""Variables that Kubernetes sets for each service, ``RATCHET_SERVE_SERVICE_HOST``; ``RATCHET_SERVE_PORT`` is a URL."""
MASKED = ("kafka.client",)
"""Mappings whose values are masked, because some are secrets."""


def load_settings(
    path: Path | None = None, overrides: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None
) -> Settings:
    """Read and validate the settings, recording origins. ``path`` is a YAML file; default: the one in
    ``RATCHET_CONFIG``, or ``ratchet.yaml`` in the working directory, if any. ``overrides``: values from flags, by
    dotted name (``{"serve.port": 9000}``). Raises ConfigError that names the wrong key or value, its origin and the
    fix. A variable without a section that names no setting may belong to another program: it is only a warning."""
    environ = os.environ if environ is None else environ
    named = environ.get(FILE_VARIABLE)
    origins: dict[str, str] = {}
    values: dict[str, Any] = {}
    flags = ((name, value, "flag") for name, value in (overrides or {}).items())
    for name, value, origin in chain(_of_file(path or (Path(named) if named else None)), _of_environ(environ), flags):
        if _field(name) is None:
            if origin.startswith("environment") and "." not in name:  # a setting of a section has a dot
                log.warning("%s names no setting, and is ignored. %s", origin, _nearest(name))
                continue
            raise ConfigError(f"unknown setting {name!r} (from {origin}).", _nearest(name))
        *sections, leaf = name.split(".")
        target = values
        for section in sections:
            target = target.setdefault(section, {})
        target[leaf] = value
        origins[name] = origin
    try:
        return Settings(**values, origins=origins)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        origin = next((o for n, o in origins.items() if name.startswith(n) or n.startswith(name)), "defaults")
        shown = f" = {first['input']!r}" if _is_public(name) else ""
        raise ConfigError(
            f"setting {name}{shown} (from {origin}) is not valid: {first['msg']}.",
            "See `ratchet config show` for every setting and its meaning.",
        ) from None


def describe(settings: Settings) -> list[tuple[str, Any, str, str]]:
    """Every setting as (dotted name, value, origin, meaning); secrets are masked."""
    rows = []
    for name, field in FIELDS.items():
        value: Any = attrgetter(name)(settings)
        if name in MASKED and value:
            value = dict.fromkeys(value, STARS)
        rows.append((name, _masked(value), settings.origins.get(name, "default"), field.description or ""))
    return rows


def _masked(value: Any) -> Any:
    if isinstance(value, list):
        return [_masked(each) for each in value]
    return redact_url(value) if isinstance(value, str) else value


def _of_file(path: Path | None) -> Iterator[tuple[str, Any, str]]:
    file = path or Path(FILE)
    if path is not None and not file.exists():
        raise ConfigError(f"settings file {path} does not exist.", f"Check --config, or {FILE_VARIABLE}.")

    def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, str]]:
        for key, value in values.items():
            name = f"{prefix}{key}"
            if isinstance(value, dict) and name in SECTIONS:
                yield from flat(value, f"{name}.")
            else:
                yield name, value, str(file)

    try:
        text = file.read_text() if file.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"settings file {file} cannot be read: {error}.", f"Check --config, or {FILE_VARIABLE}."
        ) from None
    return flat(_mapping(file, text))


def _of_environ(environ: Mapping[str, str]) -> Iterator[tuple[str, Any, str]]:
    for key, text in environ.items():
        rest = key.removeprefix(PREFIX)
        if rest == key or key in (FILE_VARIABLE, *CLIENT_VARIABLES) or rest.startswith("TEST_"):
            continue
        if not (_OF_KUBERNETES.fullmatch(rest) or (rest.endswith("PORT") and "://" in text)):
            name = rest.lower().replace("__", ".")
            yield name, parse_value(name, text), f"environment {key}"


def parse_value(name: str, text: str) -> Any:
    """Parse a flag's or environment variable's value: a YAML scalar or flow list, ``[a, b]``. Numbers stay text until
    validation, because a name may be one (``base.clip=123``). Empty text unsets optional settings, and is itself for
    others (``base.vlm=``). Invalid YAML is text."""
    if not text.strip():
        field = _field(name)
        return None if field is not None and type(None) in get_args(field.annotation) else ""
    if _is_secret(name):
        return text
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return value if value is None or isinstance(value, str | list | dict) else text.strip()


def _leaves(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _leaves(field.annotation, f"{prefix}{name}.")
        elif name != "origins":
            yield f"{prefix}{name}", field


FIELDS: Final = dict(_leaves(Settings))
SECTIONS: Final = {name[:end] for name in FIELDS for end, char in enumerate(name) if char == "."}


def _field(name: str) -> FieldInfo | None:
    """The setting of this name, or the mapping that it is a key of (``kafka.client.ssl_cafile``)."""
    mapping = FIELDS.get(name.rpartition(".")[0])
    return FIELDS.get(name) or (mapping if mapping is not None and get_origin(mapping.annotation) is dict else None)


def _is_secret(name: str) -> bool:
    field = _field(name)
    return field is not None and "SecretStr" in str(field.annotation)


def _is_public(name: str) -> bool:
    """True if a wrong value may be shown: not a secret, a URL or a group that may contain one."""
    parents = accumulate(name.split("."), "{}.{}".format)  # an item's name is below its setting's
    leaf = next((each for each in parents if _field(each) is not None), None)
    return leaf is not None and leaf not in MASKED and not _is_secret(leaf) and not re.search("url|registry", leaf)


def _nearest(name: str) -> str:
    close = difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.4 if "." in name else 0.6)
    return f"Did you mean {close[0]!r}?" if close else "See `ratchet config show` for the names."


def update_section(path: Path, section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Set ``values`` of a section in a YAML file atomically, creating it if needed. The rest of the file, with
    comments, stays unchanged. Returns the previous values that existed. Raises ConfigError, and changes nothing, if the
    file's layout cannot be edited."""
    text = path.read_text() if path.exists() else ""
    before = _mapping(path, text)
    old = before.get(section) or {}
    wanted = before | {section: old | dict(values)}
    changed = _with_values(text, section, values)
    if _mapping(path, changed) != wanted:
        lines = ", ".join(f"{section}.{name}: {value}" for name, value in values.items())
        raise ConfigError(f"{path} cannot be edited line by line.", f"Write these into it yourself: {lines}.")
    replace_file(path, changed.encode(), mode=path.stat().st_mode & 0o777 if path.exists() else 0o644)
    return {name: old[name] for name in values if name in old}


def _with_values(text: str, section: str, values: Mapping[str, Any]) -> str:
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


def _mapping(path: Path, text: str) -> dict[str, Any]:
    try:
        value = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}", "Fix the line that it names.") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a mapping of settings.", "See docs/operator/reference.md for an example.")
    return value
