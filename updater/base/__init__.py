"""Where bases come from: any open_clip model and any Hugging Face VLM is registered, or fetched from the artifacts.

>>> base = add_base(Path(".ratchet"), "b16", "ViT-B-16", Path("b16.safetensors"))
>>> base = add_vlm(Path(".ratchet"), "smol", "hf-hub:HuggingFaceTB/SmolVLM-256M-Instruct")
"""

from updater.base.reference import reference_folders
from updater.base.register import add_base, add_vlm, pull_base, push_base

__all__ = ["add_base", "add_vlm", "pull_base", "push_base", "reference_folders"]
