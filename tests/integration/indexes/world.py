"""A tiny CLIP with adapters, a ledger, and a table of pictures in PostgreSQL whose vectors follow releases."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
from PIL import Image

from core.artifacts import Artifacts
from core.ledger import Ledger
from core.ledger.rows import IndexRow, IndexSpaceRow
from core.loading import load_settings
from core.settings.serving import BaseModels
from ratchet_client.images import open_image
from serving.engines.clip import ClipEngine
from serving.indexes.store import IndexStore, Vector, open_store
from serving.indexes.worker import IndexKeeper, IndexWorker, RowEmbedder
from tests.support.tiny import tiny_adapter, tiny_base


def drawn(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((40, 40), Image.Resampling.NEAREST).save(file, "PNG")
    return file.getvalue()


class World:
    def __init__(self, root: Path, url: str) -> None:
        ours = {"home": root, "base": BaseModels(clip="tiny", vlm="")}
        self.settings = load_settings(environ={}).model_copy(update=ours)
        base = tiny_base(root)
        self.engine, self.base = ClipEngine(base, threads=1), base
        self.ledger = Ledger.open(self.settings.ledger)
        self.clips, artifacts = dict[str, str](), Artifacts(self.settings.artifacts)
        for seed, letter in enumerate("abc"):
            folder = root / "made" / letter
            towers = ("image", "text") if letter != "c" else ("text",)
            self.clips[letter] = name = tiny_adapter(base, folder, seed, towers=towers)
            spaces = self.engine.load(name, folder)
            artifacts.put_directory(folder, f"adapters/{name}")
            self.ledger.register_adapter(
                name, family="clip", base=base.digest, image_space=spaces.image, text_space=spaces.text, meta={}
            )
        self.embedder = RowEmbedder(self.settings, self.ledger)
        self.embedder._engine = ClipEngine(base, threads=1)
        self.user = psycopg.connect(url, autocommit=True)
        self.user.execute("drop schema public cascade; create schema public")
        self.user.execute("create table photos (id int primary key, image bytea, title text)")
        self.index = IndexRow(name="found", url=url, source="photos", id_field="id", image_field="image")
        self.ledger.add_index(self.index, actor="test")
        self.release(None)

    def close(self) -> None:
        self.user.close()
        self.ledger.close()

    def put(self, *ids: int, shift: int = 0, image: bytes | None = None) -> None:
        with self.user.cursor() as cursor:
            cursor.executemany(
                "insert into photos values (%s, %s, 'a') on conflict (id) do update set image = excluded.image",
                [(id, image or drawn(id + shift)) for id in ids],
            )

    def release(self, letter: str | None) -> None:
        live = self.ledger.live()
        self.ledger.commit_release(
            live.number + 1 if live else 1, clip=self.clips.get(letter or ""), vlm=None, actor="me", reason="test",
            proposal_id=None,
        )  # fmt: skip

    def propose(self, letter: str) -> int:
        row = self.ledger.propose("release", clip=self.clips[letter], actor="me", reason="test")
        self.ledger.advance_proposal(row.id, "preparing")
        return row.id

    def space(self, letter: str | None) -> str:
        return self.engine.spaces(self.clips.get(letter or "")).image

    def keeper(self, opener: Callable[[IndexRow], IndexStore] = open_store, ledger: Any = None) -> IndexKeeper:
        return IndexKeeper(self.index, ledger or self.ledger, self.embedder, opener=opener)

    def settle(self, keeper: IndexKeeper | None = None) -> None:
        """Let a worker go on until nothing is left to do."""
        keeper, own = keeper or self.keeper(), keeper is None
        while keeper.fill() or keeper.flip():
            pass
        if own:
            keeper.close()

    def running(self) -> tuple[threading.Thread, threading.Event]:
        stopping = threading.Event()
        thread = threading.Thread(target=IndexWorker(self.ledger, self.embedder, None).run, args=(stopping,))
        thread.start()
        return thread, stopping

    @property
    def states(self) -> dict[str, str]:
        return {row.space: row.state for row in self.ledger.index_spaces("found")}

    def row(self, letter: str | None) -> IndexSpaceRow:
        return next(row for row in self.ledger.index_spaces("found") if row.space == self.space(letter))

    def found(self) -> tuple[str, dict[int, Vector]]:
        rows = self.user.execute("select id, embedding::text, space from found").fetchall()
        (space,) = {space for _, _, space in rows}
        return space, {id: np.array(eval(vector), np.float32) for id, vector, _ in rows}

    def is_right(self, letter: str | None) -> bool:
        """Whether clients find each picture of the table, and nothing else, by its vector of this release."""
        space, vectors = self.found()
        stored = dict(self.user.execute("select id, image from photos").fetchall())
        good = {id: image for id, image in stored.items() if image.startswith(b"\x89PNG")}
        pixels = np.stack([self.base.preprocess.pixels(open_image(image)) for image in good.values()])
        wanted = dict(zip(good, self.engine.encode_images(pixels, self.clips.get(letter or "")), strict=True))
        same = all(np.allclose(vectors[id], wanted[id], atol=1e-4) for id in wanted if id in vectors)
        return space == self.space(letter) and vectors.keys() == wanted.keys() and same
