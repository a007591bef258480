"""Bounds on the scans of a JPEG: work that its number of pixels does not show.

A progressive JPEG may send its coefficients in any number of scans, and a scan of 31 bytes costs a pass over all of the
picture (9 ms for 16 million pixels): in 8 MiB there is room for 40 minutes of decoding.
"""

from __future__ import annotations

import re
from typing import Final

MAX_SCANS: Final = 64
"""Encoders write about 10."""
MAX_SEGMENTS: Final = 4096
"""An ICC profile or XMP comes in up to 255 of them."""
_MARKER: Final = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
"""Not the bytes that stand for 255 in a scan (FF 00), and not its restart markers (D0 to D7)."""
_START_OF_SCAN, _END_OF_IMAGE, _WITHOUT_LENGTH = 0xDA, 0xD9, (0x01, 0xD8)


def has_too_many_scans(data: bytes) -> bool:
    """True for a JPEG with more than :data:`MAX_SCANS` scans, or :data:`MAX_SEGMENTS` segments, up to its end."""
    position, scans, segments = 2, 0, 0
    while marker := _MARKER.search(data, position):
        kind, position = data[marker.start() + 1], marker.end()
        if kind == _END_OF_IMAGE:
            return False
        if kind not in _WITHOUT_LENGTH:
            position += int.from_bytes(data[position : position + 2])
        segments += 1
        scans += kind == _START_OF_SCAN
        if scans > MAX_SCANS or segments > MAX_SEGMENTS:
            return True
    return False
