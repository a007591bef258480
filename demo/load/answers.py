"""Compares the answers of a load with what local engines answer under the release that each was stamped with."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from core.ledger import Ledger
from core.ledger.rows import Family
from core.settings import Settings
from demo.load.expected import ExpectedAnswers, ExpectedVectors, Question
from demo.load.probes import Probe
from serving.http.classify import probabilities
from serving.releases.release_snapshot import BASE

TOLERANCE = 1e-3
"""Largest difference of a component, a probability or a score. Batching changes the sixth digit; adapters differ in the
second."""
HALF_TOLERANCE = 6e-3
"""The same where the server computes in half precision: batching changes the third digit."""


class AnswerCheck:
    """Expected answers by adapter. Engines are made when the first answer of a family needs one."""

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
        """``sample_ids``: of the images in the catalog. ``rows``: what the generator wrote."""
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
        """In what way an answer is not that of its release; empty when it is."""
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
        most = TOLERANCE if self.vectors.engine.choice.precision == "float32" else HALF_TOLERANCE
        return "" if apart < most else f"{stamped}: differs by {apart:.4f}"
