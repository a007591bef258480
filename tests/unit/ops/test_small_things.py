from __future__ import annotations

import pickle

import pytest
import torch

from core import progress
from core.digests import digest12, digest_bytes, digest_json, digest_tensors
from core.errors import RecordError


def test_the_borders_of_digested_parts_count() -> None:
    assert digest_bytes(b"ab", b"c") != digest_bytes(b"a", b"bc")
    assert digest_json({"a": 1, "b": 2}) == digest_json({"b": 2, "a": 1})
    assert digest12("0123456789abcdef") == "0123456789ab"


def test_tensor_digests_depend_on_name_shape_type_and_value_but_not_on_order() -> None:
    a, b = torch.arange(6.0), torch.ones(2, 3)
    same = digest_tensors({"a": a, "b": b})
    assert digest_tensors({"b": b, "a": a}) == same
    assert digest_tensors({"a": b, "b": a}) != same
    assert digest_tensors({"a": a.reshape(2, 3), "b": b}) != same
    assert digest_tensors({"a": a.double(), "b": b}) != same
    assert digest_tensors({"a": a + 1e-6, "b": b}) != same


def test_an_error_keeps_its_fields_across_processes() -> None:
    error = pickle.loads(pickle.dumps(RecordError("too_large", "image is large.", "Shrink it.")))
    assert (error.reason, error.message, error.fix) == ("too_large", "image is large.", "Shrink it.")
    assert str(error) == "image is large. Shrink it."


def test_progress_yields_everything_and_tells_on_a_plain_log(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.0)
    assert list(progress.track(range(3), "counting")) == [0, 1, 2]
    assert "counting: 3/3" in capsys.readouterr().err
