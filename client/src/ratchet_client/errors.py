"""Errors that the client raises on purpose.

    RatchetError
    ├── ConfigError        an option is wrong or missing
    ├── RecordError        a sample (or its image) is not acceptable; ``reason`` is its code
    ├── Outage             something that is needed cannot be used now; ``state`` says how
    │   └── BrokerError        Kafka cannot be reached or refuses
    └── ServerError        the server refused or failed; ``status`` and ``code`` say how
        ├── Unreachable        no connection, or it broke off: status 0
        │   └── TimedOut       no answer in time
        ├── Overloaded         429 or 503; ``retry_after`` says when to try again
        ├── Denied             401 or 403: the key is missing or revoked, or lacks the scope
        └── Conflict           409: someone else released first

Every error says what happened, what it was about, and (``fix``) what to do. A server's own errors have the same base.
"""

from __future__ import annotations

from typing import Literal

OutageState = Literal["away", "slow", "refused", "full"]


class RatchetError(Exception):
    """Base of all. ``fix`` tells the reader what to do; it is shown after the message."""

    def __init__(self, message: str, fix: str = "") -> None:
        super().__init__(f"{message} {fix}" if fix else message)
        self.message = message
        self.fix = fix

    def __reduce__(self) -> tuple[object, ...]:
        """Keep message and fix apart when the error crosses a process boundary."""
        return (_rebuild, (type(self), self.message, self.fix, self.__dict__))


def _rebuild(kind: type[RatchetError], message: str, fix: str, state: dict[str, object]) -> RatchetError:
    error = kind.__new__(kind)
    Exception.__init__(error, f"{message} {fix}" if fix else message)
    error.__dict__.update(state)
    return error


class ConfigError(RatchetError):
    """An option or a setting is wrong or missing."""


class RecordError(RatchetError):
    """A record or an image from outside is not acceptable. ``reason`` is a stable, bounded code."""

    def __init__(self, reason: str, message: str, fix: str = "") -> None:
        super().__init__(message, fix)
        self.reason = reason


class Outage(RatchetError):
    """Something that is needed cannot be used now.

    ``state``: it is ``away`` or ``slow``, it answers and has ``refused``, or it is ``full``.
    """

    state: OutageState = "away"

    def __init__(self, message: str, fix: str = "", state: OutageState | None = None) -> None:
        super().__init__(message, fix)
        if state is not None:
            self.state = state


class BrokerError(Outage):
    """Kafka cannot be reached or refuses."""


class ServerError(RatchetError):
    """The server refused or failed."""

    def __init__(
        self,
        message: str,
        fix: str = "",
        status: int = 0,
        *,
        code: str = "",
        request_id: str = "",
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message, fix)
        self.status = status
        """HTTP status; 0 when there was no answer."""
        self.code = code
        """The server's stable name of the failure, such as ``rate_limited``; empty where it gave none."""
        self.request_id = request_id
        """ID by which operators find the request in the server's log."""
        self.retry_after = retry_after
        """Seconds after which the server wants to be asked again; None where it did not say."""


class Unreachable(ServerError):
    """There was no connection, or it broke off before the answer was there."""


class TimedOut(Unreachable):
    """The answer was not there in time. The server may still have done what it was asked for."""


class Overloaded(ServerError):
    """The server has too much to do, or is starting: status 429 or 503."""


class Denied(ServerError):
    """The key is missing, wrong or revoked (401), or lacks the scope (403)."""


class Conflict(ServerError):
    """Someone else released first (409), so that what was asked for does not fit what is live."""
