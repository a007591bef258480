"""The base "shipped-vlm", made from committed assets.

>>> base = build_vlm(Path(".ratchet"))
"""

from demo.vlm.scores import score_vlm
from demo.vlm.shipped import build_vlm

__all__ = ["build_vlm", "score_vlm"]
