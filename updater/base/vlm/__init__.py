"""The shipped VLM, made from committed assets, and any other Hugging Face VLM, registered.

>>> base = build_vlm(Path(".ratchet"))
>>> base = add_vlm(Path(".ratchet"), "smol", "hf-hub:HuggingFaceTB/SmolVLM-256M-Instruct")
"""

from updater.base.vlm.register import add_vlm
from updater.base.vlm.scores import score_vlm
from updater.base.vlm.shipped import VLM_NAME, VLM_REFERENCE, build_vlm

__all__ = ["VLM_NAME", "VLM_REFERENCE", "add_vlm", "build_vlm", "score_vlm"]
