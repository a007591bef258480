"""HEAD, as load balancers ask: what GET answers, without the body."""

from __future__ import annotations

import pytest

from tests.unit.serving.scripted_vlms import app_state, client


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/models/clip", "/v1/models/none", "/health/ready/vlm", "/v1/nothing", "/v1/embeddings"]
)
async def test_head_is_answered_as_get_without_a_body(path: str) -> None:
    async with client(app_state(None)) as http:
        whole, head = await http.get(path), await http.head(path)
    assert head.status_code == whole.status_code
    assert head.headers["content-length"] == whole.headers["content-length"]
    assert head.content == b""
