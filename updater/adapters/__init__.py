"""Adapters in training: PEFT layers on a base, and the algebra that merges and compresses their deltas."""

from updater.adapters.factors import Delta, Factor, compress, merge
from updater.adapters.lora import LoraModel, read_delta, trainer_encoder

__all__ = [
    "Delta",
    "Factor",
    "LoraModel",
    "compress",
    "merge",
    "read_delta",
    "trainer_encoder",
]
