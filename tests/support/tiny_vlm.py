"""The tiny random VLM of the benchmarks."""

from benchmarks.fixtures.tiny_vlm import (
    PATCH,
    RANK,
    SCALE,
    SIDE,
    TEMPLATE,
    VOCABULARY,
    WORDS,
    tiny_vlm_adapter,
    tiny_vlm_base,
)

__all__ = ["PATCH", "RANK", "SCALE", "SIDE", "TEMPLATE", "VOCABULARY", "WORDS", "tiny_vlm_adapter", "tiny_vlm_base"]
