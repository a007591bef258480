"""An image that is not the one that was meant is refused, however it comes."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

import pytest

from core.errors import RecordError
from streams.records.codecs import decode
from tests.support.kafka import picture

IMAGE = picture(1)
DIGEST = "sha256:" + hashlib.sha256(IMAGE).hexdigest()


def read(**fields: Any) -> bytes:
    return decode(json.dumps({"text": "a boat", **fields}).encode(), fetch=lambda uri: IMAGE).image


@pytest.mark.parametrize("fields", [{"image": base64.b64encode(IMAGE).decode()}, {"image_uri": "https://cdn.test/a"}])
def test_a_record_states_the_digest_of_its_image(fields: dict[str, str]) -> None:
    assert read(**fields, image_digest=DIGEST) == read(**fields) == IMAGE
    for digest, reason in (("sha256:" + "0" * 64, "uri_digest"), ("sha256:0", "schema"), (5, "schema"), ("", "schema")):
        with pytest.raises(RecordError) as caught:
            read(**fields, image_digest=digest)
        assert caught.value.reason == reason


def test_both_algorithms_of_oci_are_known() -> None:
    encoded = base64.b64encode(IMAGE).decode()
    assert read(image=encoded, image_digest="sha512:" + hashlib.sha512(IMAGE).hexdigest()) == IMAGE
    with pytest.raises(RecordError, match="states sha512:000000000000"):
        read(image=encoded, image_digest="sha512:" + "0" * 128)
