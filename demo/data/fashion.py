"""Fashion-MNIST: grey 28 px pictures of clothes, ten classes, as published (light on black)."""

from __future__ import annotations

import gzip
import io
import struct
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Final

from PIL import Image

from demo.data.domain import Draft
from demo.data.packages import MAX_MEMBER_BYTES, PackageError, read_members

_ROOT: Final = "usr/share/datasets/fashion-mnist/"
_SIDE: Final = 28
LABELS: Final = (
    "t-shirt",
    "trousers",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
_PHRASES: Final = ("a photo of {}", "a grey product photo of {}", "{}, on black", "a small picture of {}")
_PARTS: Final = (("train", "train", 400), ("t10k", "test", 100))
"""Files of the original, our split, and pictures of each class: the first so many, so 4,000 and 1,000."""


def fashion(archive: Path) -> Iterator[Draft]:
    """Builder. Here a split is the original's, not the concept's: every class is in both."""
    files = dict(read_members(archive, lambda name: name.startswith(_ROOT)))
    for prefix, split, each in _PARTS:
        pixels = _read(files, f"{prefix}-images-idx3-ubyte.gz", 16)
        classes = _read(files, f"{prefix}-labels-idx1-ubyte.gz", 8)
        if len(pixels) != len(classes) * _SIDE * _SIDE or max(classes) >= len(LABELS):
            raise PackageError(f"{archive} is damaged: {prefix} does not add up.", "Delete it and try again.")
        taken: Counter[int] = Counter()
        for number, kind in enumerate(classes):
            if taken[kind] == each:
                continue
            taken[kind] += 1
            label = LABELS[kind]
            thing = label if label == "trousers" else f"{'an' if label[0] in 'aeiou' else 'a'} {label}"
            start = number * _SIDE * _SIDE
            yield Draft(
                name=f"{split}-{number:05d}",
                text=_PHRASES[number % len(_PHRASES)].format(thing),
                concept=label,
                picture=partial(Image.frombytes, "L", (_SIDE, _SIDE), pixels[start : start + _SIDE * _SIDE]),
                label=label,
                tags=("clothing", "grey"),
                split=split,
            )


def _read(files: dict[str, bytes], name: str, header: int) -> bytes:
    """The data of an IDX file; its header is a magic number and the sizes, as big-endian 32-bit integers."""
    with gzip.open(io.BytesIO(files.get(_ROOT + name, b""))) as stream:
        data = stream.read(MAX_MEMBER_BYTES)
    if len(data) < header or struct.unpack(">I", data[:4])[0] not in (0x801, 0x803):
        raise PackageError(f"the package has no {name} in IDX format.", "Delete the archive and try again.")
    return data[header:]
