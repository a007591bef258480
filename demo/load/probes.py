"""The requests of a load, of kinds whose answers can be computed elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from core.ledger.rows import Family
from ratchet_client import data_uri

Question = tuple[bytes, str]
ANSWER_TOKENS = 16
RequestKind = Literal["embeddings", "classify", "search", "chat"]
PATHS: Final[dict[RequestKind, str]] = {
    "embeddings": "/v1/embeddings",
    "classify": "/v1/classify",
    "search": "/v1/search",
    "chat": "/v1/chat/completions",
}


@dataclass(frozen=True)
class Probe:
    kind: RequestKind
    items: tuple[int, ...]
    """Indices of images and texts (images first), or the index of one question."""
    body: dict[str, Any] = field(repr=False)

    @property
    def family(self) -> Family:
        return "vlm" if self.kind == "chat" else "clip"

    @property
    def path(self) -> str:
        return PATHS[self.kind]


def embedding_probes(images: Sequence[bytes], texts: Sequence[str]) -> list[Probe]:
    """Single images, single texts, and pairs of both, which must be answered by one release."""
    everything: list[Any] = [*({"image": data_uri(image)} for image in images), *texts]

    def probe(*items: int) -> Probe:
        return Probe("embeddings", items, {"input": [everything[item] for item in items], "encoding_format": "base64"})

    probes: list[Probe] = []
    for index in range(max(len(images), len(texts))):
        image, text = index % len(images), len(images) + index % len(texts)
        probes += [probe(image), probe(text)]
        if index % 4 == 0:
            probes.append(probe(image, text))
    return probes


def batch_probes(images: Sequence[bytes], texts: Sequence[str], items: int) -> list[Probe]:
    """One request with ``items`` images, and one with as many texts."""
    pictures = [number % len(images) for number in range(items)]
    words = [number % len(texts) for number in range(items)]
    image_inputs: list[Any] = [{"image": data_uri(images[number])} for number in pictures]
    return [
        Probe("embeddings", tuple(pictures), {"input": image_inputs, "encoding_format": "base64"}),
        Probe(
            "embeddings", tuple(len(images) + number for number in words),
            {"input": [texts[number] for number in words], "encoding_format": "base64"},
        ),
    ]  # fmt: skip


def classify_probes(images: Sequence[bytes], texts: Sequence[str]) -> list[Probe]:
    return [
        Probe("classify", (number,), {"images": [data_uri(image)], "labels": list(texts), "templates": ["{}"]})
        for number, image in enumerate(images)
    ]


def search_probes(images: Sequence[bytes], texts: Sequence[str]) -> list[Probe]:
    """Each text; as many hits as there are images, which are the whole catalog."""
    return [
        Probe("search", (len(images) + number,), {"text": text, "k": len(images)}) for number, text in enumerate(texts)
    ]


def chat_probes(questions: Sequence[Question]) -> list[Probe]:
    return [_chat(number, question) for number, question in enumerate(questions)]


def interleaved(clip: list[Probe], vlm: list[Probe]) -> list[Probe]:
    """Two of CLIP, then one of the VLM, until each was used at least once."""
    if not vlm:
        return clip
    rounds = max((len(clip) + 1) // 2, len(vlm))
    return [
        probe
        for n in range(rounds)
        for probe in (clip[2 * n % len(clip)], clip[(2 * n + 1) % len(clip)], vlm[n % len(vlm)])
    ]


def _chat(number: int, question: Question) -> Probe:
    image, text = question
    content = [{"type": "image_url", "image_url": {"url": data_uri(image)}}, {"type": "text", "text": text}]
    body = {"model": "vlm", "messages": [{"role": "user", "content": content}], "temperature": 0,
            "max_tokens": ANSWER_TOKENS}  # fmt: skip
    return Probe("chat", (number,), body)
