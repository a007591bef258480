"""Schemas, data URIs, authentication, bounds and probabilities, without a server."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from serving.http.classify import ClassifyRequest, probabilities
from serving.http.embeddings import EmbeddingsRequest
from serving.http.errors import ApiError, from_validation
from serving.http.image_loader import from_data_uri


@pytest.mark.parametrize("tokens", [[1, 2], [[1, 2], [3]], 7])
def test_token_ids_are_refused_in_words(tokens: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        EmbeddingsRequest.model_validate({"input": tokens})
    error = from_validation(caught.value)
    assert "check_embedding_ctx_length=False" in str(error.detail)
    assert error.param == "input"


def test_one_input_and_a_list_are_the_same() -> None:
    assert EmbeddingsRequest.model_validate({"input": "x"}).input == ["x"]
    mixed = EmbeddingsRequest.model_validate({"input": ["x", {"image": "data:"}, {"type": "text", "text": "y"}]})
    assert len(mixed.input) == 3


@pytest.mark.parametrize(
    ("inputs", "param"),
    [
        (["x", 5], "input.1"),
        (["x", None], "input.1"),
        (["x", {}], "input.1.text"),
        (["x", {"image": 5}], "input.1.image"),
        (["x", {"image": "data:", "caption": "x"}], "input.1.caption"),
        (["x", "y", {"type": "image_url", "image_url": {"uri": "data:"}}], "input.2.image_url.url"),
        (["x", {"type": "text"}], "input.1.text"),
        ({"image": 5}, "input.0.image"),
    ],
)
def test_an_error_in_one_of_the_inputs_names_it(inputs: Any, param: str) -> None:
    with pytest.raises(ValidationError) as caught:
        EmbeddingsRequest.model_validate({"input": inputs})
    assert from_validation(caught.value).param == param


def test_a_label_that_is_given_twice_is_refused() -> None:
    with pytest.raises(ValidationError, match="differ"):
        ClassifyRequest.model_validate({"images": ["x"], "labels": ["cat", "dog", "cat"]})


def test_a_template_needs_one_place_for_the_label() -> None:
    for templates in (["no place"], ["{} and {}"], []):
        with pytest.raises(ValidationError):
            ClassifyRequest.model_validate({"images": ["x"], "labels": ["a"], "templates": templates})


@pytest.mark.parametrize(
    ("uri", "code"),
    [
        ("file:///etc/passwd", "image_format"),
        ("data:image/png,abc", "image_format"),
        ("data:image/png;base64,@@@@", "image_format"),
        ("data:image/png;base64," + "A" * 2000, "image_too_large"),
    ],
)
def test_only_data_uris_within_bounds_are_taken(uri: str, code: str) -> None:
    with pytest.raises(ApiError) as caught:
        from_data_uri(uri, "input.0", max_bytes=1000)
    assert caught.value.code == code


def test_a_data_uri_gives_its_bytes() -> None:
    assert from_data_uri("data:image/png;base64," + base64.b64encode(b"abc").decode(), "x", 10) == b"abc"


def test_probabilities_are_of_the_mean_over_templates() -> None:
    images = np.eye(2, dtype=np.float32)
    prompts = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], np.float32)
    shares = probabilities(images, prompts, templates=2, scale=10.0)
    np.testing.assert_allclose(shares.sum(axis=1), 1)
    assert shares[0, 0] == pytest.approx(1 / (1 + np.exp(-10)))
