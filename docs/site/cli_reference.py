"""The page of the command line: Typer's own, with the examples of each command as a code block."""

from __future__ import annotations

import inspect
import re
from typing import Any

import typer
from typer.cli import get_docs_for_click

from ops.cli.main import app

HEAD = """\
Every command takes the settings of the folder that it is run in (`ratchet.yaml`), and the options of `ratchet` itself
before its name: `ratchet --set serve.port=9000 up`. An error ends with status 1 and says what to do."""


def page() -> str:
    """The page."""
    root = typer.main.get_command(app)
    _fence_examples(root)
    root.help, root.epilog = HEAD, None
    return get_docs_for_click(obj=root, ctx=typer.Context(root), name="ratchet", title="Command line")


def _fence_examples(command: Any) -> None:
    """Write the examples at the end of a command's help, and of those below it, as a block."""
    prose, *rest = re.split(r"^Examples?:", inspect.cleandoc(command.help or ""), maxsplit=1, flags=re.M)
    parts = (re.sub(r"\s+", " ", each).strip() for each in re.split(r"(?:\s{2,}|\n)\|\s+|\n\s*\n", " ".join(rest)))
    lines = "\n".join(each for each in parts if each.startswith("ratchet"))
    command.help = f"{prose.strip()}\n\n```bash\n{lines}\n```" if lines else prose.strip()
    for child in getattr(command, "commands", {}).values():
        _fence_examples(child)
