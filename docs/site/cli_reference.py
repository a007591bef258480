"""The page of the command line: every command with its help, arguments, options and examples, from the commands."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import typer

from ops.cli.main import app

HEAD = """# Command line

Every command takes the settings of the folder that it is run in (`ratchet.yaml`), and the options of `ratchet`
itself before its name: `ratchet --set serve.port=9000 up`. An error ends with status 1 and says what to do.
"""


def page() -> str:
    """The page."""
    root = typer.main.get_command(app)
    return "\n".join([HEAD, *_table("option", root, "ratchet"), *_commands(root, "ratchet", 2)])


def _commands(group: Any, path: str, depth: int) -> Iterator[str]:
    for name, command in getattr(group, "commands", {}).items():
        if command.hidden:
            continue
        full = f"{path} {name}"
        text, examples = _divided(command.help or "")
        yield f"\n{'#' * depth} {full}\n"
        yield f"{text}\n"
        if not getattr(command, "commands", {}) or command.invoke_without_command:
            yield f"```text\n{_usage(command, full)}\n```\n"
            yield from _table("argument", command, full)
            yield from _table("option", command, full)
        if examples:
            yield "```bash\n" + "\n".join(examples) + "\n```\n"
        yield from _commands(command, full, min(depth + 1, 3))


def _usage(command: Any, full: str) -> str:
    kinds = [each.param_type_name for each in command.params]
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    words = [each.name.upper() if each.required else f"[{each.name.upper()}]" for each in arguments]
    return " ".join([full, *(["[OPTIONS]"] if "option" in kinds else []), *words])


def _table(kind: str, command: Any, full: str) -> Iterator[str]:
    context = command.make_context(full, [], resilient_parsing=True)
    shown = [each for each in command.params if each.param_type_name == kind and "completion" not in each.name]
    records = [record for each in shown if (record := each.get_help_record(context))]
    if records:
        yield f"| {kind} | |\n|---|---|"
        yield from (f"| `{_cell(names)}` | {_cell(text)} |" for names, text in records)
        yield ""


def _divided(text: str) -> tuple[str, list[str]]:
    """A command's help without its examples, and the examples."""
    prose, *rest = re.split(r"^Examples?:", inspect.cleandoc(text), maxsplit=1, flags=re.M)
    parts = re.split(r"(?:\s{2,}|\n)\|\s+|\n\s*\n", " ".join(rest))
    examples = [re.sub(r"\s+", " ", each).strip() for each in parts]
    return prose.strip(), [each for each in examples if each.startswith("ratchet")]


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|").strip()
