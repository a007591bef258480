"""The two models of a server."""

from __future__ import annotations

from typing import Final, Literal

Family = Literal["clip", "vlm"]
FAMILIES: Final[tuple[Family, ...]] = ("clip", "vlm")
