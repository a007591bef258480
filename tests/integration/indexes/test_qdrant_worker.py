"""The worker with images by URI, in Qdrant's local mode."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from qdrant_client import QdrantClient
from qdrant_client import models as m

from core.ledger.rows import IndexRow
from serving.indexes.qdrant import QdrantStore
from serving.indexes.worker import IndexKeeper, RowEmbedder
from tests.integration.indexes.world import World, drawn
from tests.support.postgres import PostgresServer


def test_a_collection_follows_a_release_and_a_rollback(tmp_path: Path, pgvector: PostgresServer) -> None:
    world = World(tmp_path, pgvector.url)
    images = {id: tmp_path / f"{id}.png" for id in range(10)}
    for id, path in images.items():
        path.write_bytes(drawn(id))
    user = QdrantClient(path=str(tmp_path / "qdrant"))
    user.create_collection("photos", {})
    points = [m.PointStruct(id=id, vector={}, payload={"url": path.as_uri()}) for id, path in images.items()]
    outside = m.PointStruct(id=99, vector={}, payload={"url": "file:///etc/hostname"})
    user.upsert("photos", [*points, outside])
    user.close()
    row = IndexRow(
        name="shop", url=f"qdrant://{tmp_path / 'qdrant'}", source="photos", id_field="id", image_field="url"
    )
    world.ledger.add_index(row, actor="me")
    ingest = world.settings.ingest.model_copy(update={"allowed_uris": [tmp_path.as_uri()]})
    embedder = RowEmbedder(world.settings.model_copy(update={"ingest": ingest}), world.ledger)
    store = QdrantStore(row)
    keeper = IndexKeeper(row, world.ledger, embedder, opener=lambda _: store)
    pixels = np.stack([world.base.preprocess.pixels(path.read_bytes()) for path in images.values()])
    for letter in (None, "a", None):
        world.release(letter)
        world.settle(keeper)
        found, _ = store._client.scroll("shop", limit=100, with_vectors=True)
        vectors = {int(point.id): np.array(point.vector) for point in found}
        wanted = world.engine.encode_images(pixels, world.clips.get(letter or ""))
        assert {(point.payload or {})["space"] for point in found} == {world.space(letter)}
        assert vectors.keys() == images.keys(), "and not the file outside of ingest.allowed_uris"
        assert all(np.allclose(vectors[id], wanted[id], atol=1e-4) for id in images)
    (space,) = (each for each in world.ledger.index_spaces("shop") if each.state == "live")
    assert (space.rows, space.total, space.skipped) == (10, 11, 1)
    keeper.close()
    world.close()
