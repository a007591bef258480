"""What the probes of a load should be answered: local engines, which share nothing with the server but files, say."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from core.artifacts import Artifacts
from core.settings import Settings
from ratchet_client.images import decode_image
from serving.engines.clip import ClipEngine
from serving.engines.vlm.generation import question
from serving.engines.vlm.vlm_base import load_vlm_base
from serving.releases.release_snapshot import BASE

Question = tuple[bytes, str]
"""An encoded image, and what is asked about it."""
ANSWER_TOKENS = 16


class ExpectedVectors:
    """Vectors of the probes under any adapter."""

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
        """Answer under each adapter, with one engine for all."""
        missing = [adapter for adapter in dict.fromkeys(adapters) if adapter not in self._answers]
        if not missing:
            return
        from serving.engines.vlm.hf_engine import TransformersEngine  # slow to import, and not every load asks
        from serving.engines.vlm.sync import SyncVlm

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
        """An answer for each question."""
        self.prepare([adapter])
        return self._answers[adapter]
