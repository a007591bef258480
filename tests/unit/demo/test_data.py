"""Demo data: packages that are read, pictures that are drawn, domains that are built and when."""

from __future__ import annotations

import base64
import gzip
import io
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Thread

import pytest
from PIL import Image

from core.loading import load_settings
from demo.data import (
    DOMAINS,
    QUESTIONS,
    DemoData,
    PackageError,
    Preparation,
    domain,
    packages,
    render,
)
from demo.data.domain import RECEIPT, VERSION, DomainInfo, Draft, build, split_of
from demo.data.packages import Package, read_members
from demo.data.preparation import merged
from demo.data.render import SIDE, Unfit, decode, draw_svg, on_canvas
from demo.first_start import clip_data, vlm_data
from streams.publish.folders import INDEX, read_folder
from tests.support.pictures import png

ROOT = Path(__file__).parents[3]


def drafts() -> Iterator[Draft]:
    for number in range(150):
        colour = (number, 255 - number, 0)
        yield Draft(
            f"n{149 - number:03}", f"colour {number}", f"colour {number}", partial(Image.new, "RGB", (9, 9), colour)
        )
    yield Draft("same", "again", "again", partial(Image.new, "RGB", (9, 9), (0, 255, 0)))
    yield Draft("unfit", "unfit", "unfit", partial(decode, b"no"))
    yield Draft("fixed", "fixed", "fixed", partial(decode, png("navy")), split="test")


def toy(builder: Callable[..., Iterator[Draft]] = drafts) -> DomainInfo:
    return DomainInfo("toy", (), "CC0-1.0", "nobody", builder)


def drawn_again() -> Iterator[Draft]:
    raise AssertionError("drawn again")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_domain_is_complete_alike_everywhere_and_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = build(toy(), tmp_path)
    assert folder == tmp_path / "data" / "toy"
    items = read_folder(folder)
    assert len(items) == 151 and {item.domain for item in items} == {"toy"}
    assert all(item.split == ("test" if item.concept == "fixed" else split_of(item.concept)) for item in items)
    receipt = json.loads((folder / RECEIPT).read_text())
    assert receipt["skipped"] == {"not a readable picture": 1, "same picture as another": 1}
    assert sum(receipt["splits"].values()) == 151 and receipt["licence"] == "CC0-1.0"
    assert content(folder) == content(build(toy(), tmp_path / "other"))
    assert build(toy(drawn_again), tmp_path) == folder
    (folder / "stray").touch()
    monkeypatch.setattr(domain, "VERSION", domain.VERSION + 1)
    build(toy(), tmp_path)
    assert not (folder / "stray").exists() and len(read_folder(folder)) == 151


def test_one_split_is_drawn_alone_with_the_rows_of_the_whole_and_becomes_it_when_more_is_wanted(tmp_path: Path) -> None:
    drawn: list[str] = []

    def noted(draft: Draft) -> Image.Image:
        drawn.append(draft.name)
        return draft.picture()

    def watched() -> Iterator[Draft]:
        return (replace(each, picture=partial(noted, each)) for each in drafts())

    whole = build(toy(), tmp_path / "whole")
    folder = build(toy(watched), tmp_path, "test")
    part = read_folder(folder)
    rows = [[(item.path.name, item.text, item.bytes()) for item in of] for of in (part, read_folder(whole, "test"))]
    assert rows[0] == rows[1] and set(drawn) == {item.path.stem for item in part}
    before = content(folder)
    assert build(toy(drawn_again), tmp_path, "test") == folder and content(folder) == before
    build(toy(), tmp_path)
    assert len(read_folder(folder)) == 151
    for split in (None, "train", "test"):
        build(toy(drawn_again), tmp_path, split)


def test_a_failure_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[Draft]:
        yield from drafts()
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        build(toy(broken), tmp_path)
    assert [path.name for path in (tmp_path / "data").iterdir()] == [".toy.lock"]
    assert len(read_folder(build(toy(), tmp_path))) == 151


def test_two_at_once_make_one(tmp_path: Path) -> None:
    made: list[int] = []

    def counted() -> Iterator[Draft]:
        made.append(1)
        yield from drafts()

    threads = [Thread(target=build, args=(toy(counted), tmp_path)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1]
    assert len(read_folder(tmp_path / "data" / "toy")) == 151


@pytest.mark.parametrize("info", DOMAINS.values(), ids=str)
def test_notice_attributes_every_domain(info: DomainInfo) -> None:
    notice = " ".join((ROOT / "NOTICE").read_text().split())
    assert f" {info.name} " in notice and info.licence in notice
    assert all(package.name in notice for package in info.packages)


def there(home: Path, name: str, split: str = "") -> None:
    folder = home / "data" / name
    folder.mkdir(parents=True)
    (folder / INDEX).touch()
    (folder / RECEIPT).write_text(json.dumps({"version": VERSION, "split": split}))


def test_suites_need_their_split_the_reference_pool_the_whole_and_questions_what_they_ask_about(tmp_path: Path) -> None:
    settings = load_settings(None, {"home": str(tmp_path)})
    assert {each.name: each.split for each in merged(clip_data(settings))} == {
        "noto": None, "pixel_ultica": None, "openclipart": "test", "fashion": "test", "flags": None,
        "stamp_photo": None,
    }  # fmt: skip
    needed = merged([*clip_data(settings), *vlm_data(settings)])
    assert needed[-1] == DemoData("vqa_base")
    assert {DemoData(source) for source in QUESTIONS["vqa_base"].sources} <= set(needed[:-1])
    assert len({each.name for each in needed}) == len(needed)


def test_what_is_there_is_not_made_again_and_starts_no_process(tmp_path: Path) -> None:
    there(tmp_path, "openclipart", "test")
    with Preparation([DemoData("openclipart", "test")], tmp_path) as data:
        data.wait("openclipart")
        data.wait_for_all()
        assert data._pool is None


def test_a_package_that_cannot_be_had_is_named_to_whoever_waits_for_it(tmp_path: Path) -> None:
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "dataset-fashion-mnist_1_all.deb").write_bytes(b"no package")
    there(tmp_path, "flags")
    with (
        pytest.raises(PackageError, match="dataset-fashion-mnist"),
        Preparation([DemoData("flags"), DemoData("fashion", "test")], tmp_path) as data,
    ):
        data.wait("flags")
        data.wait_for_all()


SQUARE = '<rect x="40" y="40" width="20" height="20" fill="#ff0000"/>'


def svg(content: str, side: int = 64) -> bytes:
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {namespaces} width="{side}" height="{side}">{content}</svg>'.encode()


def picture_in_svg(link: str) -> bytes:
    return svg(f'<image xlink:href="{link}" width="64" height="64"/>')


def test_a_picture_is_centred_on_a_white_square_without_a_dark_rim_and_pixel_art_keeps_its_colours() -> None:
    canvas = on_canvas(decode(png("red", (40, 20))))
    assert (canvas.size, canvas.mode) == ((SIDE, SIDE), "RGB")
    assert canvas.getpixel((64, 64)) == (255, 0, 0)
    assert canvas.getpixel((64, 10)) == canvas.getpixel((64, 118)) == (255, 255, 255)
    transparent = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    transparent.paste((255, 255, 255, 255), (4, 4, 12, 12))
    assert on_canvas(transparent).getextrema() == ((255, 255),) * 3
    pixels = Image.new("RGBA", (17, 17), (255, 0, 0, 255))
    pixels.putpixel((8, 8), (0, 0, 255, 255))
    colours = {colour for _, colour in on_canvas(pixels, crisp=True).getcolors(99) or []}
    assert colours == {(255, 0, 0), (0, 0, 255), (255, 255, 255)}


def test_an_svg_is_drawn_with_pictures_inside_and_trimming_enlarges_what_is_small_on_its_paper() -> None:
    page = svg(SQUARE, 100)
    assert on_canvas(draw_svg(page)).getpixel((20, 20)) == (255, 255, 255)
    assert on_canvas(draw_svg(page, trim=True)).getpixel((20, 20)) == (255, 0, 0)
    inside = base64.b64encode(png("blue", (64, 64))).decode()
    drawn = on_canvas(draw_svg(picture_in_svg(f"data:image/png;base64,{inside}")))
    assert drawn.getpixel((64, 64)) == (0, 0, 255)


@pytest.mark.parametrize("reference", ["{file}", "file://{file}", "http://127.0.0.1:9/secret.png"])
def test_an_svg_does_not_look_at_this_machine(tmp_path: Path, reference: str) -> None:
    (tmp_path / "secret.png").write_bytes(png("blue", (64, 64)))
    with pytest.raises(Unfit, match="blank"):
        on_canvas(draw_svg(picture_in_svg(reference.format(file=tmp_path / "secret.png"))))


def test_a_broken_or_too_large_picture_is_unfit(monkeypatch: pytest.MonkeyPatch) -> None:
    for data in (b"", b"<svg", b"not a picture", png()[:40]):
        for read in (draw_svg, decode):
            with pytest.raises(Unfit):
                read(data)
    monkeypatch.setattr(render, "MAX_PIXELS", 99)
    with pytest.raises(Unfit, match="pixel limit"):
        decode(png(size=(10, 10)))
    monkeypatch.setattr(render, "MAX_SVG_BYTES", 10)
    with pytest.raises(Unfit, match="size limit"):
        draw_svg(svg(SQUARE))


def tgz(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for name, kind in (("link", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE), ("device", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(f"{name}.png")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    return path


def everything(_: str) -> bool:
    return True


def nothing(_: str) -> bool:
    return False


def test_only_wanted_files_are_read_no_links_and_nothing_is_written_whatever_their_names(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    names = ("package/a.png", "b.txt", "./package/c.png", "../evil.png", "/tmp/evil.png")
    archive = tgz(inner / "a.tgz", {name: name.encode() for name in names})
    found = [content.decode() for _, content in read_members(archive, lambda name: name.endswith(".png"))]
    assert found == [name for name in names if name != "b.txt"]
    assert [name for name, _ in read_members(archive, everything)][2] == "package/c.png"
    assert [path.name for path in (*tmp_path.iterdir(), *inner.iterdir())] == ["inner", "a.tgz"]


@pytest.mark.parametrize(
    ("limit", "most", "wanted", "problem"),
    [
        ("MAX_MEMBER_BYTES", 10, everything, "11 bytes; the limit is 10"),
        ("MAX_ARCHIVE_BYTES", 15, nothing, "unpacks to over 15 bytes"),
        ("MAX_MEMBER_BYTES", 1_000_000, everything, "goes on after its end"),
    ],
    ids=["large file", "files that are not wanted count for the total", "endless tail"],
)
def test_an_archive_beyond_a_limit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, most: int, wanted: Callable[[str], bool], problem: str
) -> None:
    monkeypatch.setattr(packages, limit, most)
    archive = tgz(tmp_path / "a.tgz", {"one": b"x" * 11, "two": b"x" * 11})
    archive.write_bytes(gzip.compress(gzip.decompress(archive.read_bytes()) + bytes(5_000_000)))
    with pytest.raises(PackageError, match=problem):
        list(read_members(archive, wanted))


@pytest.mark.parametrize("keep", [0, 10, 25_000, -6, "a changed checksum, behind everything that a reader needs"])
def test_a_cut_or_changed_archive_is_damaged(tmp_path: Path, keep: int | str) -> None:
    archive = tgz(tmp_path / "a.tgz", {"one": os.urandom(50_000)})
    whole = bytearray(archive.read_bytes())
    whole[-5] ^= isinstance(keep, str)
    archive.write_bytes(whole[:keep] if isinstance(keep, int) else whole)
    with pytest.raises(PackageError, match="damaged") as caught:
        list(read_members(archive, everything))
    assert "Delete" in caught.value.fix


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="no dpkg-deb: not a Debian machine")
def test_a_debian_package_is_read_without_installing_and_a_cut_one_is_damaged(tmp_path: Path) -> None:
    tree, deb = tmp_path / "tree", tmp_path / "toy_1_all.deb"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN" / "control").write_text(
        "Package: toy\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: toy\n"
    )
    (tree / "DEBIAN").chmod(0o755)  # dpkg-deb accepts nothing less, whatever the umask
    (tree / "usr").mkdir()
    (tree / "usr" / "a.txt").write_bytes(os.urandom(100_000))
    subprocess.run(["dpkg-deb", "--build", "--root-owner-group", tree, deb], check=True, capture_output=True)
    ((name, content),) = read_members(deb, everything)
    assert name == "usr/a.txt" and len(content) == 100_000
    deb.write_bytes(deb.read_bytes()[:60_000])
    with pytest.raises(PackageError, match="damaged"):
        list(read_members(deb, everything))


def program(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A new PATH; scripts find sh and touch by full names."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "bin"


NPM = Package("npm", "@scope/toy", "1.2.3")


def test_a_failed_download_says_why_and_leaves_nothing_a_good_one_is_kept(path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "packages"
    program(path, "npm", "echo 'network is unreachable' >&2; exit 7")
    with pytest.raises(PackageError, match=r"`npm pack .*@scope/toy@1\.2\.3` failed .* 7: network is unreachable"):
        NPM.fetch(folder)
    assert [path.suffix for path in folder.iterdir()] == [".lock"]
    program(path, "npm", "/usr/bin/touch scope-toy-1.2.3.tgz")
    first = NPM.fetch(folder)
    program(path, "npm", "exit 1")
    assert NPM.fetch(folder) == first == folder / "scope-toy-1.2.3.tgz"
