"""The tiny random CLIP of the benchmarks."""

from benchmarks.fixtures.tiny import CONFIG, RANK, tiny_adapter, tiny_base

__all__ = ["CONFIG", "RANK", "tiny_adapter", "tiny_base"]
