from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from core import access as module
from core.access import KEYS_SECONDS, NEW_KEY_SECONDS, OPERATOR, Access, Principal
from core.errors import AccessError, LedgerUnavailable
from core.ledger import KeyRow, Ledger
from core.settings import Settings
from core.settings.serving import Serve
from tests.support.clock import Clock


class AccessSetup:
    """A ledger that can be unavailable, and an access that reads it."""

    def __init__(self, home: Path) -> None:
        self.settings = Settings(home=home, serve={"operator_key": "bootstrap"}, access={"requests_per_minute": 30})
        self.ledger = Ledger.open(self.settings.ledger)
        self.away = False
        self.reads = 0
        self.clock = Clock()
        self.access = Access(self, self.settings, self.clock, pause=self.clock.sleep)

    def api_keys(self) -> list[KeyRow]:
        self.reads += 1
        if self.away:
            raise LedgerUnavailable("no route to host")
        return self.ledger.api_keys()

    def touch_keys(self, used: Mapping[str, datetime]) -> None:
        self.ledger.touch_keys(used)

    def key(self, name: str, *scopes: str, limit: int | None = None) -> str:
        return self.ledger.create_key(name, scopes or ["infer"], actor="t", requests_per_minute=limit)[1]


@pytest.fixture
def setup(tmp_path: Path) -> Iterator[AccessSetup]:
    made = AccessSetup(tmp_path)
    yield made
    made.ledger.close()


def test_a_key_is_its_holder_with_scopes_and_limit_and_keys_are_read_once(setup: AccessSetup) -> None:
    own, common, free = setup.key("own", "infer", "operate", limit=60), setup.key("common"), setup.key("free", limit=0)
    found = setup.access.identify(own)
    assert found is not None
    assert (found.name, found.scopes, found.kind) == ("own", {"infer", "operate"}, "key")
    assert found.key_id == own.split("_")[1]
    limits = [who.requests_per_minute for who in map(setup.access.identify, (own, common, free)) if who]
    assert limits == [60, 30, 0]
    setup.away = True
    assert setup.access.identify("bootstrap") is OPERATOR
    assert OPERATOR.may("operate") and OPERATOR.may("infer") and OPERATOR.may("publish")
    assert setup.reads == 1


def test_a_token_that_differs_anywhere_is_nobodys_and_secrets_are_compared_in_constant_time(
    setup: AccessSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    token, other = setup.key("ann"), setup.key("bob")
    assert setup.access.identify(token) is not None
    last = "0" if token[-1] != "0" else "1"
    swapped = "_".join([*token.split("_")[:2], other.split("_")[2]])
    for wrong in (token[:-1], token[:-1] + last, token + "0", swapped, "rk_", f"rk_00000000_{'0' * 64}"):
        assert setup.access.identify(wrong) is None
    compared: list[int] = []
    real = module.hmac.compare_digest
    monkeypatch.setattr(module.hmac, "compare_digest", lambda a, b: compared.append(len(b)) or real(a, b))
    for each in (token, f"rk_ffffffff_{'0' * 64}"):
        setup.access.identify(each)
    assert compared == [9, 64, 9, 64]  # an unknown id is compared, too


def test_a_key_expires_also_while_the_ledger_is_away(setup: AccessSetup, monkeypatch: pytest.MonkeyPatch) -> None:
    _, token = setup.ledger.create_key("ann", ["search"], actor="t", days=1)
    assert setup.access.identify(token) is not None
    setup.away = True
    setup.clock.now += KEYS_SECONDS
    assert setup.access.identify(token) is not None
    monkeypatch.setattr(KeyRow, "expired", lambda row: row.expires_at < datetime.now(UTC) + timedelta(days=2))
    assert setup.access.identify(token) is None


def test_a_new_key_works_at_once_and_made_up_ones_do_not_flood_the_ledger(setup: AccessSetup) -> None:
    setup.access.identify(setup.key("ann"))
    setup.clock.now += NEW_KEY_SECONDS / 4
    assert setup.access.identify(setup.key("bob")) is not None, "though the keys have just been read"
    reads, began = setup.reads, setup.clock.now
    for number in range(100):
        assert setup.access.identify(f"rk_{number:08x}_{'0' * 64}") is None
        setup.clock.now += NEW_KEY_SECONDS / 10
    assert setup.reads - reads <= (setup.clock.now - began) / NEW_KEY_SECONDS


def test_a_key_that_is_made_while_the_keys_are_read_is_known_to_the_next_reading(setup: AccessSetup) -> None:
    setup.access.refresh()
    setup.clock.now += KEYS_SECONDS
    fresh: list[str] = []

    def read() -> list[KeyRow]:
        rows = setup.ledger.api_keys()
        if not fresh:  # it is made after the rows have been read and before the reading ends
            setup.clock.now += NEW_KEY_SECONDS / 4
            fresh.append(setup.key("bob"))
        return rows

    setup.api_keys = read  # type: ignore[method-assign]
    setup.access.refresh()
    assert setup.access.identify(fresh[0]) is not None


def test_a_copy_and_keys_read_last_stay_good_only_while_the_ledger_is_away(setup: AccessSetup) -> None:
    token = setup.key("ann")
    setup.access.refresh()
    recalled = setup.ledger.api_keys()
    setup.away = True
    started = Access(setup, setup.settings, setup.clock, recall=lambda: recalled)
    for _ in range(3):
        setup.clock.now += KEYS_SECONDS
        for access in (setup.access, started):
            assert access.identify(token) is not None and access.current() is None
    setup.away = False
    setup.ledger.revoke_key("ann", actor="t", reason="left")
    setup.clock.now += KEYS_SECONDS
    for access in (setup.access, started):
        assert access.identify(token) is None and access.current() == []


def test_nobody_waits_for_a_reading_that_hangs(setup: AccessSetup) -> None:
    token = setup.key("ann")
    setup.access.refresh()
    let_go, entered = threading.Event(), threading.Event()

    def hang() -> list[KeyRow]:
        entered.set()
        let_go.wait(30)
        return []

    setup.clock.now += KEYS_SECONDS
    setup.api_keys = hang  # type: ignore[method-assign]
    thread = threading.Thread(target=setup.access.refresh)
    thread.start()
    entered.wait(30)
    assert setup.access.identify(token) is not None  # this would hang as well if it read
    let_go.set()
    thread.join()
    assert setup.access.known(token) is None


def test_use_is_noted_at_most_once_a_minute(setup: AccessSetup, monkeypatch: pytest.MonkeyPatch) -> None:
    token = setup.key("ann")
    touched: list[Mapping[str, datetime]] = []
    monkeypatch.setattr(setup, "touch_keys", lambda used: touched.append(used) or setup.ledger.touch_keys(used))
    for _ in range(5):
        setup.access.identify(token)
        setup.clock.now += KEYS_SECONDS
    setup.access.refresh()
    assert len(touched) == 1
    used = setup.ledger.api_keys()[0].last_used_at
    assert used is not None and datetime.now(UTC) - used < timedelta(minutes=1)
    setup.ledger.touch_keys({token.split("_")[1]: used - timedelta(minutes=2)})
    setup.access.identify(token)
    for _ in range(2):
        setup.clock.now += KEYS_SECONDS
        setup.access.identify(token)
    assert len(touched) == 2


NO_KEYS: Any = SimpleNamespace(api_keys=list, touch_keys=dict)


@pytest.mark.parametrize(
    ("host", "require", "limit"),
    [
        ("127.0.0.1", "auto", 0), ("localhost", "auto", 0), ("::1", "auto", 0), ("127.0.0.5", "auto", 0),
        ("0.0.0.0", "auto", None), ("::", "auto", None), ("", "auto", None), ("10.0.0.7", "auto", None),
        ("server.example", "auto", None), ("127.0.0.1.example", "auto", None),
        ("127.0.0.1", "always", None), ("127.0.0.1", "never", 0), ("0.0.0.0", "never", 7),
    ],
)  # fmt: skip
def test_a_server_is_open_only_on_loopback_unless_told_and_limits_only_strangers_from_elsewhere(
    tmp_path: Path, host: str, require: str, limit: int | None
) -> None:
    rules = {"require_keys": require, "anonymous_per_minute": 7}
    access = Access(NO_KEYS, Settings(home=tmp_path, serve=Serve(host=host), access=rules))
    assert access.open == (limit is not None)
    for token in (None, "", "none", "sk-anything"):
        found = access.identify(token)
        assert (None if found is None else found.requests_per_minute) == limit
        assert found is None or found.scopes == {"infer", "search", "feedback"}


KEY = Principal("ci", frozenset({"operate"}))
KEYLIKE = ["key:ci", "KEY:ci", " key:ci", "\uff4bey\uff1aci"]
PARTS = ["controller", "Updater", "guard", "anonymous"]


@pytest.mark.parametrize("said", [*KEYLIKE, *PARTS, "a\x07", "\n", "x" * 101, "\u202eann"])
def test_nobody_can_say_that_he_is_a_key_or_a_part_of_ratchet(said: str) -> None:
    for who in (OPERATOR, KEY, replace(KEY, kind="anonymous")):
        with pytest.raises(AccessError):
            who.actor(said)
