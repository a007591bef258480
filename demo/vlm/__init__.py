"""The base "shipped-vlm", made from committed assets."""

from demo.vlm.scores import score_vlm
from demo.vlm.shipped import build_vlm

__all__ = ["build_vlm", "score_vlm"]
