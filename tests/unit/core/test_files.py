from __future__ import annotations

import stat
from pathlib import Path

import pytest

from core.files import replace_file, replacing


def test_a_file_gets_its_content_and_mode_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "state.json"
    replace_file(path, b"old")
    replace_file(path, b"new", mode=0o600)
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(path.parent.iterdir()) == [path]


def test_after_an_error_the_old_content_stays_and_the_new_file_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "scores.npz"
    replace_file(path, b"old")
    with pytest.raises(ZeroDivisionError), replacing(path) as staging:
        staging.write_bytes(b"half")
        assert (staging.parent, staging.suffix, path.read_bytes()) == (tmp_path, ".npz", b"old")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
