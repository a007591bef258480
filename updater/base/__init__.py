"""Where bases come from: the shipped one is made from PyPI packages, any other open_clip model is registered.

>>> base = build_base(Path(".ratchet"))
>>> base = add_base(Path(".ratchet"), "b16", "ViT-B-16", Path("b16.safetensors"))
"""

from updater.base.register import add_base
from updater.base.scores import score_base
from updater.base.shared import pull_base, push_base
from updater.base.shipped import REFERENCE, build_base, reference_folders

__all__ = ["REFERENCE", "add_base", "build_base", "pull_base", "push_base", "reference_folders", "score_base"]
