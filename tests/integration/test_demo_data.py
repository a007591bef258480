"""A demo domain from the real registries."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from demo.data import prepare_domain
from demo.data.domain import split_of
from streams.publish.folders import read_folder


def test_flags_come_from_debian_with_a_receipt_and_the_same_packages_give_the_same_bytes(tmp_path: Path) -> None:
    first = prepare_domain("flags", tmp_path / "first")
    items = read_folder(first)
    by_text = {item.text: item for item in items}
    # 249 countries, of which ten fly the flag of another; a new release of the package may add a few.
    assert 225 <= len(items) == len(by_text) <= 260
    assert by_text["flag of Angola"].concept == "flag ao"
    assert all(item.split == split_of(item.concept) for item in items)
    assert 20 <= sum(item.split == "test" for item in items) <= 60
    for item in items:
        with Image.open(item.path) as image:
            assert (image.size, image.mode) == ((128, 128), "RGB")
    receipt = json.loads((first / "domain.json").read_text())
    assert receipt["licence"] == "public domain"
    assert [name.split("_")[0] for name in receipt["archives"]] == ["iso-codes", "iso-flags-png-320x240"]

    before = {path: path.stat().st_mtime_ns for path in first.rglob("*")}
    prepare_domain("flags", tmp_path / "first")
    assert before == {path: path.stat().st_mtime_ns for path in first.rglob("*")}, "it is not prepared again"
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "packages").symlink_to(tmp_path / "first" / "packages")
    second = prepare_domain("flags", tmp_path / "second")
    bytes_of = lambda folder: {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}  # noqa: E731
    assert bytes_of(first) == bytes_of(second)
