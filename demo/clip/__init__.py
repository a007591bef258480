"""The base "shipped", made from packages of PyPI."""

from demo.clip.scores import score_base
from demo.clip.shipped import build_base

__all__ = ["build_base", "score_base"]
