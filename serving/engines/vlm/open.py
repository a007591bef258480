"""Which engine answers for a VLM base."""

from __future__ import annotations

from core.errors import ConfigError
from core.settings.serving import Serve
from serving.engines.vlm.generation import VlmEngine
from serving.engines.vlm.hf_engine import TransformersEngine
from serving.engines.vlm.vllm_engine import VllmEngine
from serving.engines.vlm.vllm_start import installed
from serving.engines.vlm.vlm_base import VlmBase


def open_engine(base: VlmBase, serve: Serve, *, kind: str | None = None) -> VlmEngine:
    """The engine that ``kind`` or ``serve.vlm_engine`` names, not started. ``auto``: vLLM where it is installed.

    Raises :class:`ConfigError` for an unknown kind.
    """
    wanted = kind or serve.vlm_engine
    if wanted == "auto":
        wanted = "vllm" if installed() else "transformers"
    if wanted == "vllm":
        return VllmEngine(base, serve)
    if wanted == "transformers":
        return TransformersEngine(base, serve)
    raise ConfigError(f"There is no VLM engine {wanted!r}.", "Set serve.vlm_engine to auto, vllm or transformers.")
