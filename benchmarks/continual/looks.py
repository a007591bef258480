"""Pictures of suites that look like a training picture (similar_ids), computed once and stored."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from core.digests import digest12, digest_json
from core.progress import track
from streams.ingest.perceptual_hash import COLOUR_TOLERANCE, HASH_BYTES, perceptual_hash
from updater.data.pools import Pair
from updater.training.checkpoint import read_json, write_json

ALIKE = 3
"""Bits of 64 in which the hashes of two pictures may differ to count as the same; colours as for duplicates."""


def left_out(folder: Path, taught: Sequence[Pair], candidates: Mapping[str, Sequence[Pair]]) -> dict[str, list[str]]:
    wanted = [sorted(pair.id for pair in taught), {name: [p.id for p in pairs] for name, pairs in candidates.items()}]
    path = folder / f"{digest12(digest_json([ALIKE, *wanted]))}.json"
    known = read_json(path)
    if isinstance(known, dict):
        return known
    hashes, colours = _looks(taught, "looks of training pictures")
    similar_ids: dict[str, list[str]] = {}
    for name, pairs in candidates.items():
        own_hashes, own_colours = _looks(pairs, f"looks of {name}")
        similar_ids[name] = []
        for pair, own, colour in zip(pairs, own_hashes, own_colours, strict=True):
            near = np.bitwise_count(hashes ^ own) <= ALIKE
            if near.any() and (np.abs(colours[near] - colour).max(axis=1) <= COLOUR_TOLERANCE).any():
                similar_ids[name].append(pair.id)
    write_json(path, similar_ids)
    return similar_ids


def _looks(pairs: Sequence[Pair], what: str) -> tuple[NDArray[np.uint64], NDArray[np.int16]]:
    """Hashes [n] and mean colours [n, cells] of pictures."""
    hashes, colours = [], []
    for pair in track(pairs, what):
        with Image.open(io.BytesIO(pair.read())) as image:
            look = perceptual_hash(image)
        hashes.append(look.phash)
        colours.append(np.frombuffer(look.colours, np.uint8).astype(np.int16))
    return np.array(hashes, np.uint64), np.array(colours, np.int16).reshape(len(hashes), HASH_BYTES - 8)
