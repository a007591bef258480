"""Preprocessing: from a decoded image to the input of the image tower. Resizing yields ``uint8``, a quarter of float32
to pass between processes, and equals open_clip's own transform bit by bit for a decoded image. JPEGs are decoded at the
smallest scale that is large enough (:meth:`Preprocess.needed`), which changes pixels slightly. Does not import
open_clip, which would take seconds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

import numpy as np
from PIL import Image

from core.errors import BaseModelError
from ratchet_client.images import OpenedImage, open_accepted

if TYPE_CHECKING:
    import torch

Interpolation = Literal["bicubic", "bilinear"]
ResizeMode = Literal["shortest", "longest", "squash"]
OPENAI_MEAN: Final = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD: Final = (0.26862954, 0.26130258, 0.27577711)
"""CLIP's training values, and open_clip's default."""
MAX_RATIO = 32
"""Images with a greater ratio of sides are cropped to their middle before resizing. open_clip resizes first: 40 million
pixels in one row would become 224 rows of nine billion, of which it keeps the middle."""


@dataclass(frozen=True)
class Preprocess:
    size: int
    """Side of the square input in pixels."""
    mean: tuple[float, float, float] = OPENAI_MEAN
    """Per channel, on the scale 0..1."""
    std: tuple[float, float, float] = OPENAI_STD
    interpolation: Interpolation = "bicubic"
    resize_mode: ResizeMode = "shortest"
    """``shortest``: shortest side to ``size``, centre crop; ``longest``: pad; ``squash``: ignore the ratio."""
    fill_color: int = 0

    def __post_init__(self) -> None:
        checks = {
            "size": isinstance(self.size, int) and 8 <= self.size <= 4096,
            "mean": len(self.mean) == 3,
            "std": len(self.std) == 3 and all(s > 0 for s in self.std),
            "interpolation": self.interpolation in get_args(Interpolation),
            "resize_mode": self.resize_mode in get_args(ResizeMode),
        }
        for field, good in checks.items():
            if not good:
                raise BaseModelError(
                    f"Preprocessing of the base: {field}={getattr(self, field)!r} is not usable.",
                    "See serving/engines/preprocess.py for the allowed values.",
                )

    def to_json(self) -> dict[str, Any]:
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Preprocess:
        """Inverse of :meth:`to_json`; also reads open_clip's ``preprocess_cfg`` (``size`` may be a pair)."""
        known = {key: value[key] for key in cls.__dataclass_fields__ if value.get(key) is not None}
        size = known.get("size")
        if isinstance(size, list | tuple):
            if len(set(size)) != 1:
                raise BaseModelError(f"The base wants {size} pixels; only square inputs are served.")
            known["size"] = size[0]
        for key in ("mean", "std"):
            if key in known:
                known[key] = tuple(float(v) for v in known[key])
        return cls(**known)

    def pixels(self, image: Image.Image | OpenedImage | bytes) -> np.ndarray:
        """``uint8 [size, size, 3]`` of an image. Bytes must be of an accepted image: they are read without limits.
        Gate, trainer, catalog and server all pass encoded images, so that they see the same pixels. Raises
        :class:`core.errors.RecordError` when it is not an acceptable image."""
        if isinstance(image, bytes):
            image = open_accepted(image)
        if isinstance(image, OpenedImage):
            width, height = image.size
            image = image.decode(self.needed)
            if (width - height) * (image.width - image.height) < 0:  # rotated by its EXIF orientation
                width, height = height, width
        else:
            width, height = image.size
        within = self._within_ratio(image)
        if within is not image:
            width, height = within.size
        return np.asarray(self._square(within if within.mode == "RGB" else within.convert("RGB"), width, height))

    def needed(self, size: tuple[int, int]) -> tuple[int, int]:
        """Smallest size (width, height) to which decoding may scale down an image of that size."""
        side = self.size
        if self.resize_mode != "longest":
            return side, side
        ratio = max(*size, side) / side
        return max(1, round(size[0] / ratio)), max(1, round(size[1] / ratio))

    def _within_ratio(self, image: Image.Image) -> Image.Image:
        if self.resize_mode == "squash":
            return image
        # When the longer side is fitted, the shorter one must keep at least one pixel.
        most = MAX_RATIO if self.resize_mode == "shortest" else self.size
        width, height = (min(side, other * most) for side, other in (image.size, image.size[::-1]))
        if (width, height) == image.size:
            return image
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((left, top, left + width, top + height))

    def _square(self, image: Image.Image, width: int, height: int) -> Image.Image:
        """The first steps of open_clip's evaluation transform, with its rounding. ``width`` and ``height``: of the full
        image; decoding at a smaller scale rounds them."""
        side = self.size
        resample = Image.Resampling.BILINEAR if self.interpolation == "bilinear" else Image.Resampling.BICUBIC
        if self.resize_mode == "squash":
            return image.resize((side, side), resample)
        if self.resize_mode == "shortest":
            short = min(width, height)
            image = image.resize((int(side * width / short), int(side * height / short)), resample)
            left, top = (round((length - side) / 2) for length in image.size)
            return image.crop((left, top, left + side, top + side))
        ratio = max(height / side, width / side)
        image = image.resize((round(width / ratio), round(height / ratio)), resample)
        square = Image.new("RGB", (side, side), (self.fill_color,) * 3)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square

    def normalise(self, pixels: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
        """``float32 [n, 3, size, size]`` from ``uint8 [n, size, size, 3]``."""
        import torch  # takes two seconds; processes that only prepare images do without

        self.check(pixels)
        # A writable copy: torch gives no guarantees for read-only buffers (object store, mmap).
        return self.normalise_tensor(torch.from_numpy(np.array(pixels)).to(device))

    def normalise_tensor(self, pixels: torch.Tensor) -> torch.Tensor:
        """Same as :meth:`normalise`, for a tensor on the computing device."""
        batch = pixels.permute(0, 3, 1, 2).float().div_(255.0)
        return batch.sub_(_per_channel(self.mean, batch.device)).div_(_per_channel(self.std, batch.device))

    def check(self, pixels: np.ndarray) -> None:
        """Raise ValueError unless ``pixels`` are ``uint8 [n, size, size, 3]``."""
        expected = (self.size, self.size, 3)
        if pixels.ndim != 4 or pixels.shape[1:] != expected or pixels.dtype != np.uint8:
            raise ValueError(
                f"pixels must be uint8 [n, {self.size}, {self.size}, 3], not {pixels.dtype} {list(pixels.shape)}; "
                "make them with Preprocess.pixels and numpy.stack."
            )


@cache
def _per_channel(values: tuple[float, float, float], device: torch.device) -> torch.Tensor:
    """``[1, 3, 1, 1]`` on a device, cached: a captured CUDA graph must not contain a copy."""
    import torch

    return torch.tensor(values, device=device).view(1, 3, 1, 1)
