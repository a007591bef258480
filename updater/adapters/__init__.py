"""Adapters in training: PEFT layers on a base, and the algebra that merges and compresses their deltas."""

from updater.adapters.lora import LoraModel, read_delta, trainer_encoder
from updater.adapters.model import AdapterModel
from updater.adapters.weight_deltas import Dense, LowRank, WeightDelta, combine, compress, merge

__all__ = [
    "AdapterModel",
    "Dense",
    "LoraModel",
    "LowRank",
    "WeightDelta",
    "combine",
    "compress",
    "merge",
    "read_delta",
    "trainer_encoder",
]
