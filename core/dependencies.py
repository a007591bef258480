"""State of Ratchet's dependencies, as shared by health, status, doctor, metrics, alerts and console."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

from core.errors import (
    ArtifactsUnavailable,
    BrokerError,
    Fenced,
    LedgerError,
    Outage,
    OutageState,
    RatchetError,
    RecordTooLarge,
    RegistryUnavailable,
    StoreError,
)

Dependency = Literal["ledger", "artifacts", "store", "broker", "registry"]
State = Literal["ok", OutageState]
"""``away``: no connection, or it fails. ``slow``: no answer in time. ``refused``: access is denied; the detail names
what is missing. ``full``: it takes no more data."""
_KINDS: Final[tuple[tuple[type[RatchetError], Dependency], ...]] = (
    (RegistryUnavailable, "registry"), (BrokerError, "broker"), (ArtifactsUnavailable, "artifacts"),
    (StoreError, "store"), (LedgerError, "ledger"),
)  # fmt: skip
"""The first match by isinstance is the error's dependency."""


@dataclass(frozen=True, slots=True)
class DependencyState:
    state: State = "ok"
    detail: str = ""
    fix: str = ""

    @classmethod
    def of(cls, error: RatchetError) -> DependencyState:
        """The state that an error implies: ``refused`` if it is not an outage, as the dependency answers but cannot be
        used."""
        return cls(error.state if isinstance(error, Outage) else "refused", error.message, error.fix)


_current: dict[Dependency, DependencyState] = {}


def dependency_of(error: Exception) -> Dependency | None:
    if isinstance(error, (Fenced, RecordTooLarge)):  # about one sender, or one record
        return None
    return next((name for kind, name in _KINDS if isinstance(error, kind)), None)


def noted(error: Exception) -> Dependency | None:
    """Record and export the state that an outage implies. Returns the error's dependency, if any."""
    name = dependency_of(error)
    if name is not None and isinstance(error, Outage):
        _set(name, DependencyState.of(error))
    return name


def answered(names: Iterable[Dependency]) -> None:
    for name in names:
        _set(name, DependencyState())


def current() -> dict[Dependency, DependencyState]:
    """The last recorded state of each dependency that this process has used."""
    return dict(_current)


def _set(name: Dependency, state: DependencyState) -> None:
    from core import metrics  # imported here: commands of the ledger start without it

    _current[name] = state
    metrics.dependency.state(name, state.state)


_SIGNS: Final[dict[OutageState, tuple[str, ...]]] = {
    "full": ("no space left", "disk full", "quota exceeded", "quotaexceeded", "storagefull"),
    "refused": (
        "accessdenied", "access denied", "forbidden", "unauthorized", "invalidaccesskeyid", "signaturedoesnotmatch",
        "expiredtoken", "invalidtoken", "nosuchbucket", "bucket does not exist", "necessary privileges",
        "permission denied", "permissionerror", "nocredentials", "authentication failed", "pg_hba",
    ),
    "slow": ("timed out", "timeout", "slowdown"),
}  # fmt: skip
"""Words in error messages."""
_CODE: Final = re.compile(
    r"<Code>(.*?)</Code>(?:.*?<Message>(.*?)</Message>)?(?:.*?<BucketName>(.*?)</BucketName>)?", re.DOTALL
)
_REQUEST: Final = re.compile(r"Error performing [A-Z]+ (\w+://[^/\s]+)\S* in .*? - (.*)", re.DOTALL)
_SOURCE: Final = re.compile(r",?\s*/\S+\.rs:\d+:\d+")
MOST_CHARS: Final = 300


def outage_state(words: str) -> OutageState:
    """The state implied by an error message: disks, object stores and databases have no distinct exceptions."""
    lower = words.lower()
    return next((state for state, signs in _SIGNS.items() if any(sign in lower for sign in signs)), "away")


def storage_state(error: Exception) -> tuple[OutageState, str]:
    """State of a disk or object store after a client error, and the cause in one line without full stop."""
    kind = type(error).__name__
    cause = _in_short(str(error)) or ("it does not answer in time" if "Timeout" in kind else kind)
    return outage_state(f"{kind} {cause}"), cause


def _in_short(text: str) -> str:
    if code := _CODE.search(text):
        name, message, bucket = code.groups()
        text = ": ".join(each for each in (name, message) if each) + (f" ({bucket})" if bucket else "")
    elif request := _REQUEST.search(text):
        text = ": ".join(request.groups())
    text = " ".join(_SOURCE.sub("", text).split()).rstrip(".")
    return text if len(text) <= MOST_CHARS else f"{text[:MOST_CHARS].rsplit(' ', 1)[0]} …"
