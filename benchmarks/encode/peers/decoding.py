"""Pictures for the graphs of :mod:`benchmarks.encode.peers.onnx_export`, with Pillow alone."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image


def pixels(encoded: bytes, about: Mapping[str, Any]) -> npt.NDArray[np.uint8]:
    """``uint8 [size, size, 3]``: resized to the shorter side and cut, or to a square. ``about``: of ``model.json``."""
    size = about["size"]
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    resample = Image.Resampling.BILINEAR if about["bilinear"] else Image.Resampling.BICUBIC
    if about["squash"]:
        return np.asarray(image.resize((size, size), resample))
    short = min(image.size)
    image = image.resize((int(size * image.width / short), int(size * image.height / short)), resample)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)))
