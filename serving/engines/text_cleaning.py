"""What happens to a text before it is cut into tokens: open_clip's cleaning functions, without importing open_clip."""

from __future__ import annotations

import html
import string
from collections.abc import Callable, Mapping
from typing import Final

import ftfy

_PUNCTUATION: Final = str.maketrans("", "", string.punctuation)


def whitespace(text: str) -> str:
    """Broken Unicode repaired, HTML entities replaced (also those that were escaped twice), white space joined."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


def lower(text: str) -> str:
    """The same in lower case."""
    return whitespace(text).lower()


def canonicalize(text: str) -> str:
    """The same in lower case and without punctuation, as SigLIP's texts."""
    repaired = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(repaired.replace("_", " ").translate(_PUNCTUATION).lower().split())


CLEAN: Final[Mapping[str, Callable[[str], str]]] = {
    "whitespace": whitespace, "lower": lower, "canonicalize": canonicalize,
}  # fmt: skip
"""By open_clip's names."""
