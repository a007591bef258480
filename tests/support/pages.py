"""The pages under docs/ and in the root as data: their code blocks, commands, links and settings."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from ops.cli.main import app

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *(ROOT / "docs").rglob("*.md")])


@dataclass(frozen=True)
class Block:
    """A code block; ``language`` is empty for an indented one."""

    language: str
    text: str


@dataclass(frozen=True, eq=False)
class Page:
    path: Path

    @property
    def name(self) -> str:
        return str(self.path.relative_to(ROOT))

    @cached_property
    def blocks(self) -> list[Block]:
        """Its code blocks, fenced and indented (by four spaces, or seven inside a list)."""
        return [each for each in self._parts if isinstance(each, Block)]

    @cached_property
    def prose(self) -> str:
        return "\n".join(each for each in self._parts if isinstance(each, str))

    @cached_property
    def spans(self) -> list[str]:
        return re.findall(r"`([^`\n]+)`", self.prose)

    def commands(self, program: str) -> list[str]:
        """Command lines of a program, in blocks and in the prose, without comments and pipes."""
        spans = [_alone(span) for span in self.spans if span.startswith(f"{program} ")]
        return [*self.shown(program), *spans]

    def shown(self, program: str) -> list[str]:
        """Command lines of a program in code blocks, including those inside ``$(...)``."""
        texts = [block.text.replace("\\\n", " ") for block in self.blocks if block.language in ("", "bash")]
        lines = [line for text in texts for line in text.splitlines()]
        inner = [re.search(rf"\$\(({program} [^)]*)\)", line) for line in lines]
        found = [each[1] if each else line.strip() for each, line in zip(inner, lines, strict=True)]
        return [_alone(text) for text in found if text.startswith(f"{program} ")]

    @cached_property
    def headings(self) -> set[str]:
        titles = re.findall(r"^#+ (.*)$", self.prose, re.M)
        return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}

    @cached_property
    def links(self) -> list[str]:
        return re.findall(r"\]\(([^)\s]+)\)", self.prose)

    @cached_property
    def _parts(self) -> list[Block | str]:
        return list(_parts(self.path.read_text().splitlines()))


def _parts(lines: list[str]) -> Iterator[Block | str]:
    at = 0
    while at < len(lines):
        line, start = lines[at], at
        fence = re.match(r"\s*```(\w*)", line)
        at += 1
        if fence:
            while not lines[at].strip().startswith("```"):
                at += 1
            yield Block(fence.group(1), "\n".join(lines[start + 1 : at]))
            at += 1
        elif line.startswith("    ") and (start == 0 or not lines[start - 1].strip()):
            while at < len(lines) and (lines[at].startswith("    ") or not lines[at].strip()):
                at += 1
            yield Block("", "\n".join(lines[start:at]))
        else:
            yield line


def _alone(line: str) -> str:
    return re.split(r"\s#|\s>|\s\|", line)[0].strip()


@cache
def _command() -> Any:
    """Cached: to read the signatures of all commands takes longer than to read a line."""
    return typer.main.get_command(app)


def resolve(line: str, *, strict: bool = False) -> Any:
    """Find the command of a line and parse its arguments without running it. Returns its context and raises usage
    errors.

    A command without arguments is a mention and need only exist, unless ``strict`` takes it as it would run.
    """
    command = _command()
    words = shlex.split(line)[1:]
    context = command.make_context("ratchet", words)
    while isinstance(command, TyperGroup):
        words = [*context._protected_args, *context.args]
        if not words and command.invoke_without_command:
            break
        name, child, words = command.resolve_command(context, words)
        assert child is not None
        mention = not words and not strict
        command, context = child, child.make_context(name, words, parent=context, resilient_parsing=mention)
    return context
