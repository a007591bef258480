"""A demo domain from the real registries."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from demo.data import prepare_domain
from demo.data.domain import split_of
from streams.publish.folders import read_folder

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


def test_flags_come_from_debian(home: Path) -> None:
    items = read_folder(prepare_domain("flags", home))
    by_text = {item.text: item for item in items}
    # 249 countries, of which ten fly the flag of another; a new release of the package may add a few.
    assert 225 <= len(items) == len(by_text) <= 260
    assert by_text["flag of Angola"].concept == "flag ao"
    assert all(item.split == split_of(item.concept) for item in items)
    assert 20 <= sum(item.split == "test" for item in items) <= 60
    for item in items:
        with Image.open(item.path) as image:
            assert (image.size, image.mode) == ((128, 128), "RGB")


def test_preparing_again_changes_nothing(home: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (home / "data" / "flags").rglob("*")}
    prepare_domain("flags", home)
    assert before == {path: path.stat().st_mtime_ns for path in (home / "data" / "flags").rglob("*")}


def test_the_same_packages_give_the_same_bytes(home: Path, tmp_path: Path) -> None:
    (tmp_path / "packages").symlink_to(home / "packages")
    first, second = home / "data" / "flags", prepare_domain("flags", tmp_path)
    names = sorted(path.relative_to(first) for path in first.rglob("*.*"))
    assert names == sorted(path.relative_to(second) for path in second.rglob("*.*"))
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_the_receipt_says_where_it_came_from(home: Path) -> None:
    receipt = json.loads((home / "data" / "flags" / "domain.json").read_text())
    assert receipt["licence"] == "public domain"
    assert [name.split("_")[0] for name in receipt["archives"]] == ["iso-codes", "iso-flags-png-320x240"]
