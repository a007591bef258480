"""The state of what Ratchet depends on, in the words that health, status, doctor, metrics, alerts and console share.

>>> noted(StoreUnavailable("the bucket models does not exist.", state="refused"))
>>> current()["store"].state
'refused'
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

from core import metrics
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
"""``away``: no connection, or it fails. ``slow``: no answer in time. ``refused``: it answers, and does not let us;
the detail names what is missing. ``full``: it takes no more data."""
_KINDS: Final[tuple[tuple[type[RatchetError], Dependency], ...]] = (
    (RegistryUnavailable, "registry"), (BrokerError, "broker"), (ArtifactsUnavailable, "artifacts"),
    (StoreError, "store"), (LedgerError, "ledger"),
)  # fmt: skip
"""The first that an error is an instance of is the dependency that it is about."""


@dataclass(frozen=True, slots=True)
class DependencyState:
    """The state of one dependency."""

    state: State = "ok"
    detail: str = ""
    """The event in one sentence; empty when it is ``ok``, or what was found."""
    fix: str = ""

    @classmethod
    def of(cls, error: RatchetError) -> DependencyState:
        """That an error tells of. One that is no outage is of something that answers and cannot be used as it is."""
        return cls(error.state if isinstance(error, Outage) else "refused", error.message, error.fix)


_current: dict[Dependency, DependencyState] = {}


def dependency_of(error: Exception) -> Dependency | None:
    """The dependency that an error is about; None where it is about none."""
    if isinstance(error, (Fenced, RecordTooLarge)):  # of one sender, or one record
        return None
    return next((name for kind, name in _KINDS if isinstance(error, kind)), None)


def noted(error: Exception) -> Dependency | None:
    """Remember, and export, what an outage tells of a dependency. Returns which one an error is about, if any."""
    name = dependency_of(error)
    if name is not None and isinstance(error, Outage):
        _set(name, DependencyState.of(error))
    return name


def answered(names: Iterable[Dependency]) -> None:
    """Remember, and export, that these are well."""
    for name in names:
        _set(name, DependencyState())


def current() -> dict[Dependency, DependencyState]:
    """The state that this process noted last of each dependency that it has used."""
    return dict(_current)


def _set(name: Dependency, state: DependencyState) -> None:
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
"""Words in their errors."""
_CODE: Final = re.compile(
    r"<Code>(.*?)</Code>(?:.*?<Message>(.*?)</Message>)?(?:.*?<BucketName>(.*?)</BucketName>)?", re.DOTALL
)
_REQUEST: Final = re.compile(r"Error performing [A-Z]+ (\w+://[^/\s]+)\S* in .*? - (.*)", re.DOTALL)
_SOURCE: Final = re.compile(r",?\s*/\S+\.rs:\d+:\d+")
MOST_CHARS: Final = 300


def outage_state(words: str) -> OutageState:
    """The state by the words of a client's error: disks, object stores and databases have no errors of their own."""
    lower = words.lower()
    return next((state for state, signs in _SIGNS.items() if any(sign in lower for sign in signs)), "away")


def storage_state(error: Exception) -> tuple[OutageState, str]:
    """State of a disk or an object store after an error of its client, and the cause in a line without full stop."""
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
