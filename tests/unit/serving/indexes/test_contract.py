"""The page's example of another database: its entry point opens the store, and its tests tell a good one from a bad."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from tests.support.pages import ROOT, Page

MY_INDEX = Path(__file__).with_name("my_index")


def passed_and_failed(folder: Path, changes: Mapping[str, str] = MappingProxyType({})) -> tuple[list[str], list[str]]:
    """Install the package as `pip install` does, with changes of its store, and run the page's tests."""
    shutil.copytree(MY_INDEX, folder / "my_index")
    store = folder / "my_index" / "store.py"
    for right, wrong in changes.items():
        assert right in store.read_text()
        store.write_text(store.read_text().replace(right, wrong))
    about = folder / "my_index-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: my-index\nVersion: 1.0\n")
    for block in Page(ROOT / "docs" / "operator" / "indexes.md").blocks:
        name, _, text = block.text.partition("\n")
        if name == "# pyproject.toml":
            points = tomllib.loads(text)["project"]["entry-points"]["ratchet.indexes"]
            lines = [f"{scheme} = {where}" for scheme, where in points.items()]
            (about / "entry_points.txt").write_text("\n".join(["[ratchet.indexes]", *lines]))
        elif name == "# test_my_index.py":
            (folder / "test_my_index.py").write_text(text)
    path = os.pathsep.join([str(folder), *(place for place in sys.path if place)])
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rpf", "--tb=no", "test_my_index.py"]
    run = subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    lines = [line for line in run.stdout.splitlines() if "::" in line]
    names = {
        result: [line.split(" - ")[0].rpartition("::")[2] for line in lines if line.startswith(result)]
        for result in ("PASSED", "FAILED")
    }
    assert lines, run.stdout + run.stderr
    return names["PASSED"], names["FAILED"]


def test_the_store_of_the_page_passes(tmp_path: Path) -> None:
    passed, failed = passed_and_failed(tmp_path)
    assert len(passed) == 7 and not failed


def test_a_store_with_mistakes_fails_a_test_for_each(tmp_path: Path) -> None:
    mistakes = {
        ' if self._rows[row.id]["image"] == row.version': "",
        'row["vectors"].pop(space, None)': "row",
        ' and row["skip"] is None': "",
    }
    _, failed = passed_and_failed(tmp_path, mistakes)
    for name in ("a_row_that_changed_is_pending_again", "dropped_spaces_leave_nothing", "a_skipped_row_does_not_block"):
        assert any(name in each for each in failed), (name, failed)
