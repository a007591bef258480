"""Adapters in training: PEFT layers on a base, and the algebra that merges and compresses their deltas."""

from updater.adapters.factors import Delta, Factor, Whole, combine, compress, merge
from updater.adapters.lora import LoraModel, read_delta, trainer_encoder
from updater.adapters.model import AdapterModel
from updater.adapters.weights import WeightModel

__all__ = [
    "AdapterModel",
    "Delta",
    "Factor",
    "LoraModel",
    "WeightModel",
    "Whole",
    "combine",
    "compress",
    "merge",
    "read_delta",
    "trainer_encoder",
]
