"""A candidate's change of the base's weights, scaled: W + s ΔW of a trained adapter."""

from __future__ import annotations

from pathlib import Path

from core.errors import AdapterError
from serving.engines.adapters import read_adapter, write_adapter
from serving.engines.clip_base import ClipBase

FIRST, SECOND = ".lora_A.weight", ".lora_B.weight"


def write_scaled(directory: Path, base: ClipBase, scale: float, target: Path) -> str:
    """Write the adapter of ``directory`` with ``scale`` times its ΔW = B A; returns the new adapter's name.

    Raises AdapterError if it has anything but LoRA factors.
    """
    files = read_adapter(directory)
    other = [name for name in files.tensors if not name.endswith((FIRST, SECOND))]
    if other:
        raise AdapterError(f"Adapter {files.name} changes {other[0]} as a whole.", "Scale one of LoRA factors alone.")
    tensors = {name: scale * value if name.endswith(SECOND) else value for name, value in files.tensors.items()}
    return write_adapter(target, tensors, files.config, base)
