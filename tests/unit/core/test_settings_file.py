"""Values are changed in a settings file, and everything else stays as it was written."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from core.errors import ConfigError
from core.loading import update_section

WRITTEN = """\
# of the shop
home: /data   # a volume

serve:
  port: 9000  # behind the proxy
  max_batch: 16

kafka:
  topic: pictures
"""


def test_a_file_that_is_not_there_is_made(tmp_path: Path) -> None:
    path = tmp_path / "ratchet.yaml"
    assert update_section(path, "serve", {"engine": "torch", "max_batch": 8}) == {}
    assert yaml.safe_load(path.read_text()) == {"serve": {"engine": "torch", "max_batch": 8}}


def test_values_are_replaced_and_added_and_comments_stay(tmp_path: Path) -> None:
    path = tmp_path / "ratchet.yaml"
    path.write_text(WRITTEN)
    path.chmod(0o600)
    assert update_section(path, "serve", {"max_batch": 32, "precision": "bfloat16"}) == {"max_batch": 16}
    text = path.read_text()
    assert "# of the shop" in text and "port: 9000  # behind the proxy" in text
    assert yaml.safe_load(text) == {
        "home": "/data", "serve": {"port": 9000, "max_batch": 32, "precision": "bfloat16"},
        "kafka": {"topic": "pictures"},
    }  # fmt: skip
    assert path.stat().st_mode & 0o777 == 0o600
    assert [each.name for each in tmp_path.iterdir()] == ["ratchet.yaml"]


def test_a_section_is_added_to_a_file_without_one(tmp_path: Path) -> None:
    path = tmp_path / "ratchet.yaml"
    path.write_text("home: /data")
    update_section(path, "serve", {"encoder_threads": 2})
    assert yaml.safe_load(path.read_text()) == {"home": "/data", "serve": {"encoder_threads": 2}}


@pytest.mark.parametrize("text", ["serve: {port: 9000}\n", "{serve: {port: 1}}\n", "- a list\n", "serve: [\n"])
def test_a_file_that_cannot_be_edited_is_left_as_it_is(tmp_path: Path, text: str) -> None:
    path = tmp_path / "ratchet.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        update_section(path, "serve", {"engine": "onnx"})
    assert path.read_text() == text
