from __future__ import annotations

import io

from PIL import Image


def png(colour: str | tuple[int, ...] = "red", size: tuple[int, int] = (8, 8), mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, "PNG")
    return buffer.getvalue()
