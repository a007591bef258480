from __future__ import annotations

import gzip
import io
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from demo.data import packages
from demo.data.packages import Package, PackageError, read_members


def tgz(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def everything(_: str) -> bool:
    return True


def test_only_wanted_files_are_read_and_nothing_is_written_whatever_a_member_is_called(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    names = ("package/a.png", "b.txt", "./package/c.png", "../evil.png", "/tmp/evil.png")
    archive = tgz(inner / "a.tgz", {name: name.encode() for name in names})
    found = [content.decode() for _, content in read_members(archive, lambda name: name.endswith(".png"))]
    assert found == [name for name in names if name != "b.txt"]
    assert [name for name, _ in read_members(archive, everything)][2] == "package/c.png"
    assert [path.name for path in (*tmp_path.iterdir(), *inner.iterdir())] == ["inner", "a.tgz"]


def test_links_and_devices_are_not_files(tmp_path: Path) -> None:
    archive = tmp_path / "a.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, kind in (("link", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE), ("dev", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    assert list(read_members(archive, everything)) == []


def test_a_large_file_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "MAX_MEMBER_BYTES", 10)
    with pytest.raises(PackageError, match="11 bytes; the limit is 10"):
        list(read_members(tgz(tmp_path / "a.tgz", {"big": b"x" * 11}), everything))


def test_files_that_are_not_wanted_count_for_the_total(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "MAX_ARCHIVE_BYTES", 15)
    archive = tgz(tmp_path / "a.tgz", {"one": b"x" * 10, "two": b"x" * 10})
    with pytest.raises(PackageError, match="unpacks to over 15 bytes"):
        list(read_members(archive, lambda _: False))


@pytest.mark.parametrize("keep", [0, 10, 0.5, -6])
def test_a_cut_archive_is_damaged(tmp_path: Path, keep: float) -> None:
    archive = tgz(tmp_path / "a.tgz", {"one": os.urandom(50_000)})
    whole = archive.read_bytes()
    archive.write_bytes(whole[: int(len(whole) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(PackageError, match="damaged") as caught:
        list(read_members(archive, everything))
    assert "Delete" in caught.value.fix


def test_a_changed_byte_at_the_end_is_noticed(tmp_path: Path) -> None:
    """The checksum comes after everything that a reader needs."""
    archive = tgz(tmp_path / "a.tgz", {"one": b"x"})
    whole = bytearray(archive.read_bytes())
    whole[-5] ^= 1
    archive.write_bytes(whole)
    with pytest.raises(PackageError, match="damaged"):
        list(read_members(archive, everything))


def test_an_endless_tail_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "MAX_MEMBER_BYTES", 1_000_000)
    archive = tgz(tmp_path / "a.tgz", {"one": b"x"})
    archive.write_bytes(gzip.compress(gzip.decompress(archive.read_bytes()) + bytes(5_000_000)))
    with pytest.raises(PackageError, match="goes on after its end"):
        list(read_members(archive, everything))


@pytest.fixture
def deb(tmp_path: Path) -> Path:
    if shutil.which("dpkg-deb") is None:
        pytest.skip("no dpkg-deb: not a Debian machine")
    tree = tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN" / "control").write_text(
        "Package: toy\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: toy\n"
    )
    (tree / "DEBIAN").chmod(0o755)  # dpkg-deb accepts nothing less, whatever the umask
    (tree / "usr").mkdir()
    (tree / "usr" / "a.txt").write_bytes(os.urandom(100_000))
    subprocess.run(
        ["dpkg-deb", "--build", "--root-owner-group", tree, tmp_path / "toy_1_all.deb"],
        check=True,
        capture_output=True,
    )
    return tmp_path / "toy_1_all.deb"


def test_a_debian_package_is_read_without_installing(deb: Path) -> None:
    ((name, content),) = read_members(deb, everything)
    assert name == "usr/a.txt"
    assert len(content) == 100_000


def test_a_cut_debian_package_is_damaged(deb: Path) -> None:
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
DEB = Package("deb", "toy")


@pytest.mark.parametrize(("package", "program_name"), [(NPM, "npm"), (DEB, "apt-get")])
def test_a_missing_program_is_named_with_a_fix(path: Path, tmp_path: Path, package: Package, program_name: str) -> None:
    with pytest.raises(PackageError, match=f"{program_name}.* not on PATH") as caught:
        package.fetch(tmp_path / "packages")
    assert caught.value.fix


def test_a_failed_download_shows_what_was_said_and_leaves_nothing(path: Path, tmp_path: Path) -> None:
    program(path, "npm", "echo 'network is unreachable' >&2; exit 7")
    with pytest.raises(PackageError, match=r"`npm pack .*@scope/toy@1\.2\.3` failed .* 7: network is unreachable"):
        NPM.fetch(tmp_path / "packages")
    assert [path.suffix for path in (tmp_path / "packages").iterdir()] == [".lock"]


def test_a_package_is_downloaded_once(path: Path, tmp_path: Path) -> None:
    program(path, "npm", "/usr/bin/touch scope-toy-1.2.3.tgz")
    first = NPM.fetch(tmp_path / "packages")
    program(path, "npm", "exit 1")
    assert NPM.fetch(tmp_path / "packages") == first == tmp_path / "packages" / "scope-toy-1.2.3.tgz"


def test_stale_package_lists_are_refreshed(path: Path, tmp_path: Path) -> None:
    refreshed = tmp_path / "refreshed"
    script = f"""
    case "$2" in
        update) /usr/bin/touch {refreshed} ;;
        download) [ -e {refreshed} ] && /usr/bin/touch toy_1_all.deb ;;
    esac"""
    program(path, "apt-get", script)
    assert DEB.fetch(tmp_path / "packages").name == "toy_1_all.deb"
    assert refreshed.exists()
