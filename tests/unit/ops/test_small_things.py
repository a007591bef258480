from __future__ import annotations

import pickle

import torch

from core.digests import digest_bytes, digest_json, digest_tensors
from core.errors import RecordError


def test_a_digest_depends_on_the_borders_of_parts_and_on_name_shape_type_and_value_but_not_on_order() -> None:
    assert digest_bytes(b"ab", b"c") != digest_bytes(b"a", b"bc")
    assert digest_json({"a": 1, "b": 2}) == digest_json({"b": 2, "a": 1})
    a, b = torch.arange(6.0), torch.ones(2, 3)
    same = digest_tensors({"a": a, "b": b})
    assert digest_tensors({"b": b, "a": a}) == same
    for other in ({"a": b, "b": a}, {"a": a.reshape(2, 3), "b": b}, {"a": a.double(), "b": b}, {"a": a + 1e-6, "b": b}):
        assert digest_tensors(other) != same


def test_an_error_keeps_its_fields_across_processes() -> None:
    error = pickle.loads(pickle.dumps(RecordError("too_large", "image is large.", "Shrink it.")))
    assert (error.reason, error.message, error.fix) == ("too_large", "image is large.", "Shrink it.")
    assert str(error) == "image is large. Shrink it."
