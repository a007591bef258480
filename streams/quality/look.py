from __future__ import annotations

import hmac
from dataclasses import dataclass

import imagehash
import numpy as np
from PIL import Image


@dataclass(frozen=True, slots=True)
class Look:
    phash: int
    colours: bytes

    def hex(self) -> str:
        return f"{self.phash:016x}{self.colours.hex()}"

    @classmethod
    def parse(cls, t: str) -> Look:
        return cls(int(t[:16], 16), bytes.fromhex(t[16:]))


def look_of(image: Image.Image) -> Look:
    return Look(int(str(imagehash.phash(image)), 16), np.asarray(image.resize((3, 3), Image.Resampling.BOX)).tobytes())


def similar(a: Look, b: Look, d: int) -> bool:
    return (a.phash ^ b.phash).bit_count() <= d and (
        not a.colours or not b.colours or max(abs(x - y) for x, y in zip(a.colours, b.colours)) <= 12
    )


def split_of(look: Look, key: bytes, share: float) -> str:
    return (
        "fresh_eval"
        if int.from_bytes(hmac.digest(key, look.hex().encode(), "sha256")[:8], "big") < share * 2**64
        else "train"
    )
