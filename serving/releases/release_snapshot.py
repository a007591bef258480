"""A release as one request sees it."""

from __future__ import annotations

from dataclasses import dataclass

from core.ledger.rows import Family

BASE = "base"
"""How clients name a base without an adapter."""


@dataclass(frozen=True, slots=True)
class ReleaseSnapshot:
    """A release as one request sees it, from admission to answer.

    ``clip`` and ``vlm`` are the adapters' names, None for the base alone. The spaces say which vectors are comparable:
    an index is searched only with a query whose text or image space belongs to the same release.
    """

    release: int
    clip: str | None
    image_space: str
    text_space: str
    vlm: str | None = None
    share: float = 1.0
    """Of the requests, that it answers; see :attr:`core.ledger.rows.ReleaseRow.share`."""

    @property
    def adapter(self) -> str:
        """The CLIP adapter's name as shown to clients."""
        return self.clip or BASE

    @property
    def vlm_adapter(self) -> str:
        """The VLM adapter's name as shown to clients."""
        return self.vlm or BASE

    def shown(self, family: Family) -> str:
        """The adapter's name of one family, as shown to clients."""
        return self.adapter if family == "clip" else self.vlm_adapter
