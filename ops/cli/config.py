"""``ratchet config``: the settings, their origins, and the generated settings file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from core.errors import ConfigError
from ops.cli import context as ctx
from ops.cli.terminal import AsJson, show_rows

if TYPE_CHECKING:
    from pydantic import BaseModel

    from core.settings import Settings

app = typer.Typer(help="Show and check the settings.", no_args_is_help=True)

HEAD = """\
# Settings of Ratchet, made by `ratchet init`. A line that begins with # and no space is a default: take the # away (and
# that of the section above it) to set another value. `ratchet config show` tells what is in effect, and why.
"""


@app.command()
def show(
    context: typer.Context,
    as_json: AsJson = False,
    changed: Annotated[bool, typer.Option("--changed", help="Only what differs from the defaults.")] = False,
) -> None:
    """Every setting, its value, its origin and its meaning.

    Examples:  ratchet config show --changed    |    RATCHET_SERVE__PORT=9000 ratchet config show
    """
    from pydantic_core import to_jsonable_python

    from core.loading import describe

    rows = [
        {"setting": name, "value": str(to_jsonable_python(value)), "origin": origin, "meaning": meaning}
        for name, value, origin, meaning in describe(_checked(context))
        if not changed or origin != "default"
    ]
    data = {row["setting"]: {"value": row["value"], "origin": row["origin"]} for row in rows}
    show_rows(rows, "Settings", as_json, data=data, whole=["setting"])


@app.command()
def check(context: typer.Context) -> None:
    """Read the settings and check every name and value. Ends with status 1 and the error that names what is wrong.

    Example:  ratchet --config new.yaml config check
    """
    count = len(_checked(context).origins)
    typer.echo(f"the settings are valid; {count} are not the defaults (`ratchet config show --changed`)")


def _checked(context: typer.Context) -> Settings:
    """The settings, whose recipes exist. Raises ConfigError."""
    from updater.recipes import load_recipe

    settings = ctx.of(context).settings
    for name in ("recipe", "vlm_recipe"):
        try:
            load_recipe(getattr(settings.updater, name))
        except ConfigError as error:
            raise ConfigError(f"updater.{name}: {error.message}", error.fix) from None
    return settings


def settings_yaml(chosen: Mapping[str, Any]) -> str:
    """A settings file with every setting; those in ``chosen`` that differ from the default are set, others commented
    out. Prose begins with ``# ``, a commented setting with ``#`` alone. ``chosen``: values by dotted name
    (``{"serve.port": 9000}``), without secrets."""
    from core.loading import describe
    from core.settings import Settings

    defaults = {name: value for name, value, _, _ in describe(Settings())}
    chosen = {name: value for name, value in chosen.items() if value != defaults[name]}
    return HEAD + "".join(f"{line}\n" for line in _lines(Settings, "", chosen, live=True))


def _lines(model: type[BaseModel], prefix: str, chosen: Mapping[str, Any], live: bool) -> Iterator[str]:
    """Lines of a section's settings. ``live``: the section itself is not commented out."""
    from core.settings.section import Section

    indent = "  " * prefix.count(".")
    for name, field in model.model_fields.items():
        if field.exclude:
            continue
        dotted, kind = f"{prefix}{name}", field.annotation
        if not prefix:
            yield ""
        if isinstance(kind, type) and issubclass(kind, Section):
            inner = live and any(each.startswith(f"{dotted}.") for each in chosen)
            yield f"{indent}# {(kind.__doc__ or '').splitlines()[0]}"
            yield f"{indent}{'' if inner else '#'}{name}:"
            yield from _lines(kind, f"{dotted}.", chosen, inner)
        else:
            yield f"{indent}# {field.description}"
            sign = "" if dotted in chosen else "#"
            value = chosen.get(dotted, field.get_default(call_default_factory=True))
            yield f"{indent}{sign}{name}: {yaml_value(value)}"


def yaml_value(value: Any) -> str:
    import yaml
    from pydantic_core import to_jsonable_python

    return yaml.safe_dump(to_jsonable_python(value), default_flow_style=True, width=float("inf")).splitlines()[0]
