"""What a rollback goes back to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ops.errors import LedgerError, ReleaseError
from ops.ledger.ledger import Ledger
from ops.ledger.rows import Family, ReleaseRow
from serving.releases.types import Adapters

NAMES: Mapping[Family, str] = {"clip": "CLIP", "vlm": "VLM"}


def rollback_target(ledger: Ledger, families: Sequence[Family], to: int | None) -> Adapters:
    """Adapters of release ``to``, or of the newest one that had another adapter in one of the families.

    Raises:
        ReleaseError: there is none.
    """
    live = ledger.live()
    if live is None:
        raise ReleaseError("nothing is live, so nothing can be rolled back.", "Wait for /health/ready.")
    try:
        release = _other(ledger, live, families) if to is None else ledger.release(to)
    except LedgerError as error:
        raise ReleaseError(error.message, error.fix) from None
    adapters: Adapters = {family: release.adapter(family) for family in families}
    for name, why in ledger.withdrawn(list(adapters.values())).items():
        raise ReleaseError(f"{name} was withdrawn: {why}", "Go back to another release, or release it with --force.")
    return adapters


def _other(ledger: Ledger, live: ReleaseRow, families: Sequence[Family]) -> ReleaseRow:
    stable = ledger.stable() or live
    if any(stable.adapter(family) != live.adapter(family) for family in families):
        return stable  # a canary or a shadow is taken back by what answers beside it
    older = [ledger.before(family, stable.adapter(family)) for family in families]
    release = max((row for row in older if row is not None), key=lambda row: row.number, default=None)
    if release is None:
        kind = "another" if len(families) > 1 else f"another {NAMES[families[0]]}"
        raise ReleaseError(
            f"no release before {live.number} has {kind} adapter.", "Name one with `to`, or release an adapter."
        )
    return release
