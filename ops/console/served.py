"""What is served: each model with its base, adapter, engine and precision, and the releases that are loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from core.digests import digest12
from core.ledger import Family, ReleaseRow
from core.settings import Settings
from ops.console.timeline import FAMILIES, NAMES

DEPLOYMENTS: Mapping[Family, str] = {"clip": "Encoder", "vlm": "Vlm"}


@dataclass(frozen=True)
class ServedModel:
    """One model of the live release."""

    family: Family
    base: str
    """Name of ``base.clip`` or ``base.vlm``, with 12 digits of its digest where a replica says it."""
    adapter: str | None
    engines: tuple[str, ...]
    """Engine, precision and device of the replicas, each once; empty where none says so."""
    setting: str
    """What the settings ask for."""
    replicas: Mapping[str, int]
    """Number of replicas by state; empty while the server does not say."""

    @property
    def name(self) -> str:
        """CLIP or VLM."""
        return NAMES[self.family]


@dataclass(frozen=True)
class LoadedRelease:
    """A release that replicas hold, with the embedding spaces of its CLIP."""

    number: int
    share: float
    clip: str | None
    vlm: str | None
    text_space: str
    image_space: str
    coverage: float | None
    """Share of the catalog that is embedded in its image space; None where the catalog does not say."""
    same_text_space: bool
    """Whether the live release has the same text space."""
    same_image_space: bool
    """Whether the live release has the same image space."""


def served_models(status: Mapping[str, Any] | None, live: ReleaseRow | None, settings: Settings) -> list[ServedModel]:
    """CLIP, and the VLM where there is one.

    Args:
        status: the answer of ``/admin/v1/status``; None while the server does not answer.
    """
    controller = {} if status is None else status["controller"]
    models = []
    for family in FAMILIES:
        name = settings.base.clip if family == "clip" else settings.base.vlm
        if not name:
            continue
        rows = controller.get("encoders" if family == "clip" else "vlm", [])
        digests = sorted({digest12(row["base_digest"]) for row in rows if row.get("base_digest")})
        models.append(
            ServedModel(
                family=family,
                base=f"{name} ({', '.join(digests)})" if digests else name,
                adapter=None if live is None else live.adapter(family),
                engines=_engines(rows),
                setting=_setting(family, settings),
                replicas=controller.get("replicas", {}).get(DEPLOYMENTS[family], {}),
            )
        )
    return models


def loaded_releases(status: Mapping[str, Any] | None) -> list[LoadedRelease]:
    """The releases that can be asked by number, newest first."""
    if status is None:
        return []
    rows = sorted(status["controller"]["resident"], key=lambda row: -int(row["release"]))
    spaces = status["catalog"]["spaces"]
    return [
        LoadedRelease(
            number=row["release"],
            share=row.get("share", 1.0),
            clip=row["adapter"],
            vlm=row["vlm"],
            text_space=row["text_space"],
            image_space=row["image_space"],
            coverage=spaces.get(row["image_space"], {}).get("coverage"),
            same_text_space=row["text_space"] == rows[0]["text_space"],
            same_image_space=row["image_space"] == rows[0]["image_space"],
        )
        for row in rows
    ]


def _engines(rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    parts = ("engine", "precision", "device")
    return tuple(dict.fromkeys(" ".join(str(row[name]) for name in parts if row.get(name)) for row in rows))


def _setting(family: Family, settings: Settings) -> str:
    serve = settings.serve
    if family == "clip":
        return f"serve.engine {serve.engine}, serve.precision {serve.precision}"
    return f"serve.vlm_engine {serve.vlm_engine}"
