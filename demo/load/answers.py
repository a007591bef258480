"""Compares answers of a load with those of local engines under the release that each answer is stamped with."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from core.artifacts import Artifacts
from core.ledger import Ledger
from core.ledger.rows import Family
from core.settings import Settings
from demo.load.probes import ANSWER_TOKENS, Probe, Question
from ratchet_client.images import decode_image
from serving.engines.clip import ClipEngine
from serving.engines.vlm.generation import question
from serving.engines.vlm.vlm_base import load_vlm_base
from serving.http.classify import probabilities
from serving.releases.types import BASE


class ExpectedVectors:
    def __init__(self, settings: Settings, images: Sequence[bytes], texts: Sequence[str]) -> None:
        self.artifacts = Artifacts(settings.artifacts)
        self.engine = ClipEngine.of(settings)
        preprocess = self.engine.base.preprocess
        self.pixels = np.stack([preprocess.pixels(image) for image in images])
        self.texts = list(texts)
        self._answers: dict[str, npt.NDArray[np.float32]] = {}

    def of(self, adapter: str) -> npt.NDArray[np.float32]:
        """All probe items under an adapter: images first, then texts."""
        if adapter not in self._answers:
            name = None if adapter == BASE else adapter
            if name is not None:
                self.engine.load(name, self.artifacts.fetch(f"adapters/{name}"))
            self._answers[adapter] = np.concatenate(
                [self.engine.encode_images(self.pixels, name), self.engine.encode_texts(self.texts, name)]
            )
            if name is not None:
                self.engine.unload(name)
        return self._answers[adapter]


class ExpectedAnswers:
    """Greedy answers to the questions under any adapter, by transformers and PEFT."""

    def __init__(self, settings: Settings, questions: Sequence[Question]) -> None:
        self.settings = settings
        self.artifacts = Artifacts(settings.artifacts)
        self.asks = [
            question(np.array(decode_image(image).convert("RGB")), text, ANSWER_TOKENS) for image, text in questions
        ]
        self._answers: dict[str, list[str]] = {}

    def prepare(self, adapters: Sequence[str]) -> None:
        missing = [adapter for adapter in dict.fromkeys(adapters) if adapter not in self._answers]
        if not missing:
            return
        from serving.engines.vlm.hf_engine import TransformersEngine  # slow to import, and only needed with questions
        from serving.engines.vlm.open import SyncVlm

        base = load_vlm_base(self.settings.home, self.settings.base.vlm)
        with SyncVlm(TransformersEngine(base, self.settings.serve)) as engine:
            for adapter in missing:
                name = None if adapter == BASE else adapter
                if name is not None:
                    engine.load(name, self.artifacts.fetch(f"adapters/{name}"))
                self._answers[adapter] = [reply.text for reply in engine.replies(self.asks, name)]
                if name is not None:
                    engine.unload(name)

    def of(self, adapter: str) -> list[str]:
        self.prepare([adapter])
        return self._answers[adapter]


TOLERANCE = 1e-3
"""Largest difference of a value. Batching changes the sixth digit; adapters differ in the second."""
HALF_TOLERANCE = 6e-3
"""The same for a server in half precision: batching changes the third digit."""


class AnswerCheck:
    """Expected answers by adapter. Engines are made for the families that were answered."""

    def __init__(
        self,
        settings: Settings,
        probes: Sequence[Probe],
        images: Sequence[bytes],
        texts: Sequence[str],
        questions: Sequence[Question],
        sample_ids: Sequence[str],
        rows: Sequence[dict[str, Any]],
    ) -> None:
        """``sample_ids``: of the images in the catalog; ``rows``: the generator's output."""
        self.probes = probes
        self.images = len(images)
        self.sample_ids = list(sample_ids)
        self.adapters: dict[tuple[Family, int], str] = {}
        for row in Ledger.open(settings.ledger).releases(100_000):
            self.adapters["clip", row.number] = row.clip or BASE
            self.adapters["vlm", row.number] = row.vlm or BASE
        answered = {self.probes[row["p"]].family for row in rows if row["c"] == 200}
        if "clip" in answered:
            self.vectors = ExpectedVectors(settings, images, texts)
        if "vlm" in answered:
            self.answers = ExpectedAnswers(settings, questions)
            self.answers.prepare([r["a"] for r in rows if r["c"] == 200 and self.probes[r["p"]].family == "vlm"])

    def difference(self, row: dict[str, Any]) -> str:
        """The difference of an answer from that of its release; empty if none."""
        probe, stamped = self.probes[row["p"]], f"release {row['r']} ({row['a']})"
        if self.adapters.get((probe.family, row["r"])) != row["a"]:
            return f"{stamped} is stamped with an adapter that it does not have"
        if probe.kind == "chat":
            want = self.answers.of(row["a"])[probe.items[0]]
            return "" if row["y"] == want else f"{stamped}: answers {row['y']!r}, not {want!r}"
        expected = self.vectors.of(row["a"])
        if probe.kind == "search":
            return self._hits(stamped, row["y"], expected, probe.items[0])
        if probe.kind == "classify":
            images, texts = expected[list(probe.items)], expected[self.images :]
            shares = probabilities(images, texts, 1, self.vectors.engine.logit_scale)
            return self._apart(stamped, np.asarray(row["y"]), shares)
        got = np.stack([np.frombuffer(base64.b64decode(text), "<f4") for text in row["y"]])
        return self._apart(stamped, got, expected[list(probe.items)])

    def _hits(self, stamped: str, hits: list[list[Any]], expected: npt.NDArray[np.float32], query: int) -> str:
        ids = [each[0] for each in hits]
        if sorted(ids) != sorted(self.sample_ids):
            return f"{stamped}: {len(ids)} hits with {len(set(ids))} different ids; {len(self.sample_ids)} exist"
        scores = expected[: self.images] @ expected[query]
        want = [scores[self.sample_ids.index(each)] for each in ids]
        return self._apart(stamped, np.asarray([each[1] for each in hits]), np.asarray(want))

    def _apart(self, stamped: str, got: npt.NDArray[Any], want: npt.NDArray[Any]) -> str:
        if got.shape != want.shape:
            return f"{stamped}: the shape is {got.shape}, not {want.shape}"
        apart = float(np.abs(got - want).max())
        most = TOLERANCE if self.vectors.engine.precision == "float32" else HALF_TOLERANCE
        return "" if apart < most else f"{stamped}: differs by {apart:.4f}"
