"""Distributions over rows with loops over Python's floats: a reference for terms of the loss."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

Rows = list[list[float]]


def dots(one: torch.Tensor, other: torch.Tensor, scale: float = 1.0) -> Rows:
    """Each row of one with each of the other, times a scale."""
    return [
        [scale * sum(a * b for a, b in zip(x, y, strict=True)) for y in other.double().tolist()]
        for x in one.double().tolist()
    ]


def columns(rows: Rows) -> Rows:
    return [list(column) for column in zip(*rows, strict=True)]


def softmax(scores: list[float]) -> list[float]:
    total = sum(math.exp(score) for score in scores)
    return [math.exp(score) / total for score in scores]


def cross_entropy(old: Rows, new: Rows) -> float:
    """Mean over rows of the cross entropy of softmax(new) under softmax(old)."""
    values = []
    for x, y in zip(old, new, strict=True):
        values.append(-sum(p * math.log(q) for p, q in zip(softmax(x), softmax(y), strict=True)))
    return sum(values) / len(values)


def kl(old: list[float], new: list[float]) -> float:
    """KL(softmax(old) || softmax(new)); 0 for no rows."""
    return sum(p * math.log(p / q) for p, q in zip(softmax(old), softmax(new), strict=True))


def mean_kl(old: Rows, new: Rows) -> float:
    return sum(kl(x, y) for x, y in zip(old, new, strict=True)) / len(old)


def contrast(scores: Rows, own: Sequence[int], keys: Sequence[int], extra: Rows | None = None) -> float:
    """Mean over rows that have positives of minus their mean log-share; a row's positives are the keys of its own
    number, its negatives all others and ``extra``.
    """
    values = []
    for i, row in enumerate(scores):
        total = math.log(sum(math.exp(score) for score in (*row, *(extra[i] if extra else ()))))
        positives = [score - total for score, key in zip(row, keys, strict=True) if key == own[i] >= 0]
        values += [-sum(positives) / len(positives)] if positives else []
    return sum(values) / len(values)


def without_diagonal(rows: Rows) -> Rows:
    return [[value for column, value in enumerate(row) if column != number] for number, row in enumerate(rows)]
