"""A request that names an embedding space gets vectors of that space or a refusal, through the real release protocol
and catalog, in one process.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from core.artifacts import Artifacts
from core.errors import LedgerUnavailable
from core.settings.serving import Serve
from serving.engines.bridge import bridge_key, dump_bridge
from serving.releases.types import ReleaseCommand
from tests.support.in_process_app import InProcessApp, open_in_process_app
from tests.support.tiny import tiny_adapter
from tests.unit.serving.auth_app import refusal
from tests.unit.serving.scripted_vlms import uri


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


class World:
    def __init__(self, runner: asyncio.Runner, home: Path) -> None:
        self.runner, self.home = runner, home
        self.app: InProcessApp
        self.app, http = runner.run(open_in_process_app(home, Serve(cache_bytes=0)))
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(http), base_url="http://localhost")

    def adapter(self, seed: int, towers: tuple[str, ...] = ("image", "text")) -> str:
        folder = self.home / "made" / str(seed)
        name = tiny_adapter(self.app.engine.base, folder, seed, 0.5, towers)
        spaces = self.app.engine.load(name, folder)
        self.app.ledger.register_adapter(
            name, family="clip", base=self.app.engine.base.digest, image_space=spaces.image, text_space=spaces.text,
            meta={},
        )  # fmt: skip
        return name

    def release(self, name: str | None) -> None:
        live = self.app.ledger.live()
        assert live is not None
        command = ReleaseCommand(adapters={"clip": name}, actor="t", reason="t", expected_live=live.number, force=True)
        self.runner.run(self.app.protocol.release(command, forced=True))

    def ask(self, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        call = self.http.get(path) if body is None else self.http.post(path, json=body)
        return self.runner.run(_of(call))


async def _of(call: Any) -> httpx.Response:
    answer: httpx.Response = await call
    return answer


@pytest.mark.parametrize("releases", [12, pytest.param(100, marks=pytest.mark.long)])
def test_a_pinned_space_is_never_mixed_by_releases_and_refused_after_the_window(
    tmp_path: Path, runner: asyncio.Runner, releases: int
) -> None:
    world = World(runner, tmp_path)
    names = [world.adapter(seed) for seed in range(4)]
    inputs = ["a red circle", {"image": uri()}]
    kept: list[tuple[str, Any]] = []
    gone = 0
    for number in range(releases):
        name = names[number % len(names)]
        world.release(name)
        for space, vectors in kept:
            answer = world.ask("/v1/embeddings", {"input": inputs, "space": space})
            if answer.status_code == 409:
                assert "Resident are" in refusal(answer, 409, "space_gone")
                gone += 1
                continue
            rows = answer.json()["data"]
            assert space in {row["space"] for row in rows}
            assert np.allclose([row["embedding"] for row in rows], vectors, atol=1e-5)
        answer = world.ask("/v1/embeddings", {"input": inputs})
        text, image = answer.json()["data"]
        spaces = world.app.engine.spaces(name)
        assert (text["space"], image["space"]) == (spaces.text, spaces.image)
        headers = answer.headers
        assert (headers["x-ratchet-image-space"], headers["x-ratchet-text-space"]) == (spaces.image, spaces.text)
        kept = [*kept[-2:], (spaces.image, [row["embedding"] for row in answer.json()["data"]])]
    assert gone == (releases - 2) + (releases - 3), "two of the three that were kept have left the window"


def test_texts_of_a_new_text_tower_may_be_compared_with_images_from_before(
    tmp_path: Path, runner: asyncio.Runner
) -> None:
    world = World(runner, tmp_path)
    world.release(world.adapter(1))
    [before] = world.ask("/v1/embeddings", {"input": [{"image": uri()}]}).json()["data"]
    world.release(world.adapter(2, towers=("text",)))
    world.release(world.adapter(3, towers=("text",)))
    pinned = {"space": before["space"]}
    refusal(
        world.ask("/v1/embeddings", {"input": "a", **pinned}), 409, "space_gone"
    )  # of the adapter's own image tower
    [now] = world.ask("/v1/embeddings", {"input": [{"image": uri()}]}).json()["data"]
    for path, body in (
        ("/v1/embeddings", {"input": "a"}), ("/v1/search", {"text": "a"}),
        ("/v1/classify", {"images": [uri()], "labels": ["a", "b"]}),
    ):  # fmt: skip
        answer = world.ask(path, {**body, "space": now["space"]})
        assert answer.headers["x-ratchet-image-space"] == now["space"] and answer.headers["x-ratchet-release"] == "4"
        refusal(world.ask(path, {**body, "model": "clip@3", "space": answer.headers["x-ratchet-text-space"]}), 409,
                "space_gone")  # fmt: skip


def test_spaces_are_listed_with_their_releases_and_what_the_gate_measured(
    tmp_path: Path, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(runner, tmp_path)
    ledger, name = world.app.ledger, world.adapter(2)
    ledger.begin_update(
        "u", family="clip", recipe={}, seed=0, store_version=0, data_from={}, data_to={}, incumbent=None
    )
    measured: dict[str, Any] = {
        "n": 90,
        "k": 5,
        "old_old": 0.5,
        "new_old": 0.49,
        "new_new": 0.52,
        "ci_low": -0.02,
        "margin": 0.03,
    }
    measured["bridge"] = {"n": 40, "old_old": 0.5, "recall": 0.48, "ci_low": -0.02, "allowed": True}
    summary = {"cross_version": {**measured, "allowed": True, "incumbent": None}}
    ledger.record_verdict("u", name, "passed", "reports/u", summary)
    world.release(name)
    spaces, base = world.app.engine.spaces(name), world.app.engine.spaces(None)
    image, text, old_image, old_text = world.ask("/v1/spaces").json()["data"]
    assert (image["id"], text["id"], old_image["id"], old_text["id"]) == (
        spaces.image, spaces.text, base.image, base.text,
    )  # fmt: skip
    assert image["cross_version"] == {**measured, "allowed": True, "incumbent": "base"}
    assert image["preprocessing"]["size"] == world.app.engine.base.preprocess.size and text["preprocessing"] is None
    assert (image["live"], image["releases"], image["releases_left"]) == (True, [2], 2)
    assert (old_text["live"], old_text["releases"], old_text["releases_left"]) == (False, [1], 1)
    assert old_image["cross_version"] is None

    def away(adapter: str) -> None:
        raise LedgerUnavailable("away", state="away")

    monkeypatch.setattr(type(ledger), "verdict_on", lambda self, adapter: away(adapter))
    assert world.ask("/v1/spaces").json()["data"][0]["cross_version"] is None


def test_a_bridge_maps_kept_vectors_into_the_live_space_if_the_gate_offers_one(
    tmp_path: Path, runner: asyncio.Runner
) -> None:
    world = World(runner, tmp_path)
    ledger, name, artifacts = world.app.ledger, world.adapter(2), Artifacts(str(tmp_path / "artifacts"))
    old, new = world.app.engine.spaces(None).image, world.app.engine.spaces(name).image
    ledger.begin_update(
        "u", family="clip", recipe={}, seed=0, store_version=0, data_from={}, data_to={}, incumbent=None
    )
    bridge = {"n": 90, "old_old": 0.5, "recall": 0.31, "ci_low": -0.2, "allowed": False}
    ledger.record_verdict("u", name, "passed", "reports/u", {"cross_version": {"incumbent": None, "bridge": bridge}})
    world.release(name)
    path = f"/v1/spaces/{old}/bridge"
    assert "its recall would be 31.0% of 50.0%" in refusal(world.ask(path), 404, "no_bridge")
    assert "Embed the images again" in refusal(world.ask("/v1/spaces/other/bridge"), 404, "no_bridge")
    matrix = np.linalg.qr(np.random.default_rng(1).normal(size=(world.app.engine.base.dim,) * 2))[0].astype(np.float32)
    artifacts.write_bytes(bridge_key(old, new), dump_bridge(matrix))
    for wrong in ("a.b", "%00", "..", "a" * 65, "%F0%9D%90%80" * 64):  # the last: letters of four bytes each
        assert world.ask(f"/v1/spaces/{wrong}/bridge").status_code in (400, 404)
    answer = world.ask(path).json()
    assert (answer["space"], answer["to"], answer["dimensions"]) == (old, new, len(matrix))
    got = np.frombuffer(base64.b64decode(answer["matrix"]), "<f4").reshape(len(matrix), -1)
    assert np.array_equal(got, matrix)
    artifacts.write_bytes(bridge_key(old, new), b"not a bridge")
    assert world.ask(path).status_code == 503
