"""What clients of other servers expect: other names of the models, vLLM's and KServe's paths, web pages (CORS)."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from core.errors import ConfigError
from core.loading import load_settings
from core.settings.serving import Serve
from serving.http.auth import needs
from serving.releases.admission import Admission
from serving.releases.types import ReleaseSnapshot
from tests.support.in_process_app import InProcessApp, open_in_process_app
from tests.unit.serving.auth_app import AuthApp
from tests.unit.serving.scripted_vlms import SETTINGS, WINDOW, ScriptedVlms, app_state, client, png, uri

ORIGIN = "https://app.example"
ALIASES = {"text-embedding-3-small": "clip", "gpt-4o": "vlm"}


class Server:
    """The application with a real CLIP."""

    def __init__(self, app: InProcessApp, http: httpx.AsyncClient) -> None:
        self.app, self.http = app, http


async def opened(home: Path, **serve: Any) -> Server:
    settings = Serve(**serve)
    app, http = await open_in_process_app(home, settings)
    app.admission.aliases = settings.aliases
    return Server(app, httpx.AsyncClient(transport=httpx.ASGITransport(http), base_url="http://localhost"))


async def test_an_alias_is_answered_listed_and_described_as_the_model_that_it_means(tmp_path: Path) -> None:
    server = await opened(tmp_path, aliases=ALIASES)
    for name in ("text-embedding-3-small", "clip"):
        answer = (await server.http.post("/v1/embeddings", json={"model": name, "input": "a"})).json()
        assert answer["model"] == "clip@1"
    rows = {row["id"]: row for row in (await server.http.get("/v1/models")).json()["data"]}
    assert {rows[name]["family"] for name in ("text-embedding-3-small", "clip")} == {"clip"}
    assert rows["gpt-4o"]["family"] == (await server.http.get("/v1/models/gpt-4o")).json()["family"] == "vlm"
    wrong = await server.http.post("/v1/embeddings", json={"model": "gpt-4o", "input": "a"})
    assert wrong.status_code == 404 and "text-embedding-3-small" in wrong.text


def test_an_alias_is_of_one_family_and_follows_what_is_live() -> None:
    admission = Admission({"gpt-4o": "vlm"})
    admission.adopt(WINDOW)
    assert admission.resolve("gpt-4o", "vlm").release == 3
    assert "gpt-4o" in admission.names("vlm") and "gpt-4o" not in admission.names("clip")


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("aliases: {clip: vlm}", "'clip' cannot be an alias"), ("aliases: {vlm@2: vlm}", "'vlm@2' cannot"),
        ("aliases: {clip-0123456789ab: clip}", "cannot be an alias"), ("aliases: {base: clip}", "'base' cannot"),
        ("aliases: {'': clip}", "'' cannot"), ("aliases: {ada: gpt}", "'clip' or 'vlm'"),
        ("cors_origins: [app.example]", "'app.example' is no origin"),
        ("cors_origins: ['https://app.example/']", "without a path"),
    ],
)  # fmt: skip
def test_a_name_that_is_taken_or_means_nothing_and_a_wrong_origin_abort_startup(
    tmp_path: Path, setting: str, told: str
) -> None:
    file = tmp_path / "ratchet.yaml"
    file.write_text(f"serve: {{{setting}}}")
    with pytest.raises(ConfigError, match="serve") as caught:
        load_settings(file, environ={})
    assert told in str(caught.value)


async def test_health_and_version_are_where_vllm_has_them(tmp_path: Path, closed: AuthApp) -> None:
    server = await opened(tmp_path)
    health = await server.http.get("/health")
    assert (health.status_code, health.json()["status"]) == (200, "ready")
    assert (await server.http.get("/version")).json().keys() == {"version"}
    assert [(await closed.get(path)).status_code for path in ("/version", "/v2")] == [401, 401]
    for path in ("/health", "/v2/health/live", "/v2/health/ready"):
        assert (await server.http.get(path)).status_code == 200
        assert needs(path) == (), "for probes, which have no key"
    assert needs("/healthz") == ("infer",)


@pytest.mark.parametrize("origins", [[ORIGIN], ["*"]])
async def test_pages_of_a_listed_origin_may_call_with_a_key_and_read_ratchets_headers(origins: list[str]) -> None:
    asked = {"origin": ORIGIN, "access-control-request-method": "POST",
             "access-control-request-headers": "authorization,content-type"}  # fmt: skip
    async with client(app_state(ScriptedVlms(), SETTINGS.model_copy(update={"cors_origins": origins}))) as http:
        preflight = await http.options("/v1/chat/completions", headers=asked)
        answer = await http.post(
            "/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]}, headers={"origin": ORIGIN}
        )
        denied = await http.get("/admin/v1/status", headers={"origin": ORIGIN})
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] in (ORIGIN, "*")
    assert "authorization" in preflight.headers["access-control-allow-headers"]
    exposed = answer.headers["access-control-expose-headers"]
    assert {"x-ratchet-release", "x-ratchet-answer", "x-request-id", "retry-after"} <= set(exposed.split(", "))
    assert denied.status_code == 401 and "access-control-allow-origin" in denied.headers, "so that a page can read why"


async def test_other_origins_other_hosts_and_servers_without_the_setting_allow_no_page() -> None:
    asked = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    async with client(app_state(ScriptedVlms(), SETTINGS.model_copy(update={"cors_origins": [ORIGIN]}))) as http:
        other = await http.options("/v1/models", headers=asked)
        rebound = await http.options("/v1/models", headers={**asked, "origin": ORIGIN, "host": "evil.example"})
    async with client(app_state(ScriptedVlms())) as http:
        off = await http.get("/v1/models", headers={"origin": ORIGIN})
    assert all("access-control-allow-origin" not in answer.headers for answer in (other, rebound, off))
    assert rebound.status_code == 403


async def test_embeddings_by_the_open_inference_protocol_are_those_of_v1(tmp_path: Path) -> None:
    server = await opened(tmp_path, aliases=ALIASES)
    texts, pictures = ["a red circle", "a bus"], [uri(), base64.b64encode(png(colour=(0, 0, 250))).decode()]
    known = (await server.http.get("/v2/models/clip")).json()
    assert [tensor["name"] for tensor in known["inputs"]] == ["text", "image"] and known["versions"] == ["1"]
    dim = known["outputs"][0]["shape"][1]
    for name, data, shape in (
        ("text", texts, [2]),
        ("image", pictures, [2]),
        ("text", texts, [2, 1]),
    ):
        tensor = {"name": name, "datatype": "BYTES", "shape": shape, "data": data}
        answer = await server.http.post("/v2/models/text-embedding-3-small/infer", json={"id": "7", "inputs": [tensor]})
        assert answer.status_code == 200, answer.text
        (output,) = answer.json()["outputs"]
        assert (answer.json()["id"], answer.json()["model_version"], output["datatype"]) == ("7", "1", "FP32")
        assert output["shape"] == [2, dim]
        inputs = texts if name == "text" else [{"image": uri()}, {"image": uri(png(colour=(0, 0, 250)))}]
        plain = (await server.http.post("/v1/embeddings", json={"input": inputs})).json()["data"]
        np.testing.assert_array_equal(np.reshape(output["data"], (2, dim)), [row["embedding"] for row in plain])
    assert (await server.http.get("/v2/models/clip/ready")).json() == {"name": "clip", "ready": True}
    assert (await server.http.get("/v2")).json()["name"] == "ratchet"


@pytest.mark.parametrize(
    ("tensor", "param"),
    [
        ({"shape": "1"}, "inputs.0.shape"), ({"name": "video"}, "inputs.0.name"), ({"data": [["a"]]}, "inputs.0.data"),
        ({"datatype": "FP32"}, "inputs.0.datatype"), ({"data": []}, "inputs.0.data"),
        ({"name": "image", "data": ["%"]}, "inputs.0.data.0"),
    ],
)  # fmt: skip
async def test_a_wrong_tensor_is_named(tensor: dict[str, Any], param: str) -> None:
    sent = {"name": "text", "datatype": "BYTES", "shape": [1], "data": ["a"]} | tensor
    async with client(app_state(None)) as http:
        answer = await http.post("/v2/models/clip/infer", json={"inputs": [sent]})
    assert answer.status_code == 400
    assert (answer.json()["error"]["param"] or "").startswith(param), answer.text


async def test_fields_of_other_embedding_apis_change_nothing_and_a_length_that_is_not_there_names_the_one_that_is(
    tmp_path: Path,
) -> None:
    server = await opened(tmp_path)
    plain = (await server.http.post("/v1/embeddings", json={"input": "a"})).json()["data"]
    for extra in (
        {"input_type": "search_query"},
        {"safety_identifier": "ann"},
        {"dimensions": len(plain[0]["embedding"])},
    ):
        assert (await server.http.post("/v1/embeddings", json={"input": "a", **extra})).json()["data"] == plain
    error = (await server.http.post("/v1/embeddings", json={"input": "a", "dimensions": 7})).json()["error"]
    assert error["param"] == "dimensions" and f"send {len(plain[0]['embedding'])}, or" in error["message"]


async def test_a_caller_is_its_safety_identifier_as_it_is_its_user() -> None:
    at = app_state(ScriptedVlms())
    at.admission.adopt((ReleaseSnapshot(4, "clip-a", "i3", "t3", "vlm-c", share=0.5), *at.admission.window))
    async with client(at) as http:
        for number in range(20):
            seen = set()
            for field in ("user", "safety_identifier"):
                body = {"messages": [{"role": "user", "content": "x"}], field: f"user-{number}"}
                seen.add((await http.post("/v1/chat/completions", json=body)).headers["x-ratchet-release"])
            assert len(seen) == 1
