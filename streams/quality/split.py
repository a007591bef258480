"""Which split a sample belongs to."""

from __future__ import annotations

from ops.digests import digest_bytes
from streams.rows import Split


def split_of(image: bytes, fresh_eval_share: float) -> Split:
    """``fresh_eval`` for a fixed share of all images, ``train`` for the others; a pure function of the image's bytes.

    The image alone decides, and not its texts or metadata: the same picture with another caption or question must not
    be trained on when its twin judges what was learned.
    """
    bucket = int(digest_bytes(b"split", image)[:16], 16)
    return "fresh_eval" if bucket < fresh_eval_share * 2**64 else "train"
