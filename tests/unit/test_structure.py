from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = ("core", "streams", "serving", "updater", "ops", "demo", "methods", "benchmarks", "client")
MAX_LINES = 500
STORIES = {"An embedding": 12, "A record": 12, "An update": 25, "A release": 12, "A rollback": 8}
"""Maximum number of files that a reader opens, without core."""


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py") if ".venv" not in path.parts)


@cache
def modules() -> dict[str, Path]:
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sources(*PARTS)}
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


def imported(path: Path) -> Iterator[str]:
    """Modules of ours that a file imports anywhere: at its top, in a function, or for types only."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in modules() else node.module for name in names)


def test_no_file_is_longer_than_500_lines() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in sources(*PARTS, "tests")}
    assert {path.relative_to(ROOT): lines for path, lines in lengths.items() if lines > MAX_LINES} == {}


def test_no_imports_go_in_a_circle() -> None:
    graph = {name: set(imported(path)) & set(modules()) - {name} for name, path in modules().items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("story", STORIES)
def test_a_story_is_told_in_few_files_and_what_it_names_is_there(story: str) -> None:
    page = (ROOT / "docs" / "reading.md").read_text()
    told = re.search(rf"^## {story}\b.*?(?=^##|\Z)", page, re.MULTILINE | re.DOTALL)
    assert told is not None, f"docs/reading.md has no list for {story!r}"
    steps = re.findall(r"^\d+\. `([\w/]+\.py)`: ((?:`\w+`(?:, )?)+)", told.group(), re.MULTILINE)
    assert 1 < len(steps) <= STORIES[story]
    for file, names in steps:
        assert set(re.findall(r"`(\w+)`", names)) <= defined(ROOT / file), file


def defined(path: Path) -> set[str]:
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)}
