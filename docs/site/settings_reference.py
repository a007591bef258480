"""The page of the settings: every one with its environment variable, type, default and meaning, from the models."""

from __future__ import annotations

import json
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined, to_jsonable_python

from core.settings import Settings
from core.settings.section import Section

HEAD = """# Settings

Flags (`--set serve.port=9000`) win over environment variables (`RATCHET_SERVE__PORT=9000`), which win over
`ratchet.yaml`, which wins over the defaults ([details](../operator/reference.md#settings)). `ratchet config
show` lists every setting with its value on your machine, and where that comes from. A number has the unit that the
name or the description says; bounds are part of the type.
"""
NAMES = {str: "text", int: "integer", float: "number", bool: "true or false", SecretStr: "secret"}
BOUNDS = ((Ge, "ge", "≥"), (Gt, "gt", ">"), (Le, "le", "≤"), (Lt, "lt", "<"))


def page() -> str:
    """The page."""
    return "\n".join([HEAD, *_section(Settings, "", "Whole installation")])


def _section(model: type[BaseModel], prefix: str, title: str) -> list[str]:
    fields = {name: field for name, field in model.model_fields.items() if name != "origins"}
    leaves = {name: field for name, field in fields.items() if _group(field) is None}
    lines = [f"\n## {f'`{prefix[:-1]}`' if prefix else title}\n"]
    if prefix:
        lines += [f"{(model.__doc__ or '').strip()}\n"]
    lines += ["| setting | type | default | |", "|---|---|---|---|"]
    lines += [_row(f"{prefix}{name}", field) for name, field in leaves.items()]
    for name, field in fields.items():
        if (group := _group(field)) is not None:
            lines += _section(group, f"{prefix}{name}.", "")
    return lines


def _row(name: str, field: FieldInfo) -> str:
    variable = f"RATCHET_{name.upper().replace('.', '__')}"
    kind = " ".join([_type(field.annotation), *_bounds(field)])
    return f"| `{name}`<br>`{variable}` | {kind} | {_default(field)} | {(field.description or '').replace('|', '/')} |"


def _group(field: FieldInfo) -> type[Section] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0])
    if origin is Literal:
        return ", ".join(f"`{each}`" for each in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(each) for each in arguments if each is not type(None))
    if origin in (list, tuple):
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return f"mapping to {_type(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return f"mapping ({', '.join(f'`{name}`' for name in annotation.model_fields)})"
    return NAMES.get(annotation, "path" if getattr(annotation, "__name__", "") == "Path" else "text")


def _bounds(field: FieldInfo) -> list[str]:
    return [
        f"{sign} {getattr(each, attribute):,}"
        for each in field.metadata
        for kind, attribute, sign in BOUNDS
        if isinstance(each, kind)
    ]


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    if value is None or value == "" or value == []:
        return "unset"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    shown = json.dumps(to_jsonable_python(value)) if isinstance(value, list | dict) else value
    return f"`{shown}`"
