"""The served models with base, adapter, engine and precision, and the loaded releases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response

from core.digests import digest12
from core.ledger import Family, ReleaseRow
from core.settings import Settings
from ops.console.request_context import Reader
from ops.console.timeline import NAMES

router = APIRouter()


@router.get("/models")
def models(context: Reader) -> Response:
    data = context.data
    status, live = data.status(), data.ledger.live()
    resident = [] if status is None else status["controller"]["resident"]
    return context.page(
        "models.html", "Models", models=served_models(status, live, data.settings), away=status is None, live=live,
        loaded=sorted(resident, key=lambda row: -int(row["release"])),
        catalog=None if status is None else status["catalog"],
    )  # fmt: skip


@dataclass(frozen=True)
class ServedModel:
    family: Family
    base: str
    """Name of ``base.clip`` or ``base.vlm``, with 12 digits of its digest if a replica reports it."""
    adapter: str | None
    engines: tuple[str, ...]
    """Distinct engine, precision and device of the replicas; empty if none reports them."""
    setting: str
    replicas: Mapping[str, int]
    """Number of replicas by state; empty if unknown."""

    @property
    def name(self) -> str:
        return NAMES[self.family]


def served_models(status: Mapping[str, Any] | None, live: ReleaseRow | None, settings: Settings) -> list[ServedModel]:
    """CLIP, and the VLM if there is one. ``status``: of ``/admin/v1/status``; None if the server does not answer."""
    controller = {} if status is None else status["controller"]
    serve = settings.serve
    asked: tuple[tuple[Family, str, str, str, str], ...] = (
        ("clip", settings.base.clip, "encoders", "Encoder",
         f"serve.precision {serve.precision}"),
        ("vlm", settings.base.vlm, "vlm", "Vlm", f"serve.vlm_engine {serve.vlm_engine}"),
    )  # fmt: skip
    made: list[ServedModel] = []
    for family, name, key, deployment, setting in asked:
        if name:
            rows = controller.get(key, [])
            digests = sorted({digest12(row["base_digest"]) for row in rows if row.get("base_digest")})
            parts = ("engine", "precision", "device")
            engines = dict.fromkeys(" ".join(str(row[part]) for part in parts if row.get(part)) for row in rows)
            base = f"{name} ({', '.join(digests)})" if digests else name
            adapter = live.adapter(family) if live else None
            replicas = controller.get("replicas", {}).get(deployment, {})
            made.append(ServedModel(family, base, adapter, tuple(engines), setting, replicas))
    return made
