"""Who holds a token, what he may do, and what the audit log calls him."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from ops import access as module
from ops.access import KEYS_SECONDS, NEW_KEY_SECONDS, OPERATOR, Access, Principal
from ops.errors import AccessError, LedgerUnavailable
from ops.ledger import KeyRow, Ledger
from ops.settings import Serve, Settings


class Clock:
    """Time that stands still until it is moved."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


class NoKeys:
    """A ledger without keys."""

    def api_keys(self) -> list[KeyRow]:
        return []

    def touch_keys(self, used: Mapping[str, datetime]) -> None:
        assert not used


class House:
    """A ledger that can be away, and an access that reads it."""

    def __init__(self, home: Path, **settings: Any) -> None:
        self.settings = Settings(home=home, **{"serve": {"operator_key": "bootstrap"}, **settings})
        self.ledger = Ledger.open(self.settings.ledger)
        self.away = False
        self.reads = 0
        self.clock = Clock()
        self.access = Access(self, self.settings, self.clock)

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
def house(tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path)
    yield made
    made.ledger.close()


def test_a_key_is_its_holder_with_its_scopes_and_its_limit(tmp_path: Path) -> None:
    house = House(tmp_path, access={"requests_per_minute": 30})
    own, common, free = house.key("own", "infer", "operate", limit=60), house.key("common"), house.key("free", limit=0)
    found = house.access.identify(own)
    assert found is not None
    assert (found.name, found.scopes, found.kind) == ("own", {"infer", "operate"}, "key")
    assert found.key_id == own.split("_")[1]
    limits = [who.requests_per_minute for who in map(house.access.identify, (own, common, free)) if who]
    assert limits == [60, 30, 0]


def test_a_token_that_differs_anywhere_is_nobodys(house: House) -> None:
    token, other = house.key("ann"), house.key("bob")
    assert house.access.identify(token) is not None
    last = "0" if token[-1] != "0" else "1"
    swapped = "_".join([*token.split("_")[:2], other.split("_")[2]])
    for wrong in (token[:-1], token[:-1] + last, token + "0", swapped, "rk_", f"rk_00000000_{'0' * 64}"):
        assert house.access.identify(wrong) is None


def test_secrets_are_compared_in_constant_time(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    token = house.key("ann")
    compared: list[tuple[bytes, bytes]] = []
    real = module.hmac.compare_digest

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return real(a, b)

    monkeypatch.setattr(module.hmac, "compare_digest", compare)
    house.access.identify(token)
    house.access.identify(f"rk_ffffffff_{'0' * 64}")
    assert [len(right) for _, right in compared] == [9, 64, 9, 64]  # an unknown id is compared, too


def test_the_bootstrap_key_has_every_scope_and_no_ledger_is_asked(house: House) -> None:
    house.away = True
    assert house.access.identify("bootstrap") is OPERATOR
    assert OPERATOR.may("operate") and OPERATOR.may("infer") and OPERATOR.may("publish")
    assert house.reads == 0


def test_a_revoked_key_stops_within_seconds(house: House) -> None:
    token = house.key("ann")
    assert house.access.identify(token) is not None
    house.ledger.revoke_key("ann", actor="t", reason="r")
    house.clock.now += KEYS_SECONDS
    assert house.access.identify(token) is None


def test_keys_are_not_read_again_for_every_request(house: House) -> None:
    token = house.key("ann")
    for _ in range(100):
        house.access.identify(token)
    assert house.reads == 1


def test_a_new_key_works_at_once_and_made_up_ones_do_not_flood_the_ledger(house: House) -> None:
    house.access.identify(house.key("ann"))
    fresh = house.key("bob")
    house.clock.now += NEW_KEY_SECONDS
    assert house.access.identify(fresh) is not None
    before = house.reads
    for number in range(100):
        assert house.access.identify(f"rk_{number:08x}_{'0' * 64}") is None
    assert house.reads == before


def test_a_copy_counts_only_until_the_ledger_was_read(house: House) -> None:
    token, recalled = house.key("ann"), house.ledger.api_keys()
    house.ledger.revoke_key("ann", actor="t", reason="left")
    house.away = True
    access = Access(house, house.settings, house.clock, recall=lambda: recalled)
    assert access.identify(token) is not None and access.current() is None
    house.away = False
    house.clock.now += KEYS_SECONDS
    assert access.identify(token) is None and access.current() == []


def test_keys_stay_good_while_the_ledger_is_away(house: House) -> None:
    token = house.key("ann")
    house.access.refresh()
    house.away = True
    for _ in range(3):
        house.clock.now += KEYS_SECONDS
        assert house.access.identify(token) is not None
    house.away = False
    house.ledger.revoke_key("ann", actor="t", reason="r")
    house.clock.now += KEYS_SECONDS
    assert house.access.identify(token) is None


def test_nobody_waits_for_a_reading_that_hangs(house: House) -> None:
    token = house.key("ann")
    house.access.refresh()
    let_go, entered = threading.Event(), threading.Event()

    def hang() -> list[KeyRow]:
        entered.set()
        let_go.wait(30)
        return []

    house.clock.now += KEYS_SECONDS
    house.api_keys = hang  # type: ignore[method-assign]
    thread = threading.Thread(target=house.access.refresh)
    thread.start()
    entered.wait(30)
    assert house.access.identify(token) is not None  # this would hang as well if it read
    let_go.set()
    thread.join()
    assert house.access.known(token) is None


def test_use_is_noted_at_most_once_a_minute(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    token = house.key("ann")
    touched: list[Mapping[str, datetime]] = []
    monkeypatch.setattr(house, "touch_keys", lambda used: touched.append(used) or house.ledger.touch_keys(used))
    for _ in range(5):
        house.access.identify(token)
        house.clock.now += KEYS_SECONDS
    house.access.refresh()
    assert len(touched) == 1
    used = house.ledger.api_keys()[0].last_used_at
    assert used is not None and datetime.now(UTC) - used < timedelta(minutes=1)
    house.ledger.touch_keys({token.split("_")[1]: used - timedelta(minutes=2)})
    house.access.identify(token)
    for _ in range(2):
        house.clock.now += KEYS_SECONDS
        house.access.identify(token)
    assert len(touched) == 2


@pytest.mark.parametrize(
    ("host", "require", "is_open"),
    [
        ("127.0.0.1", "auto", True), ("localhost", "auto", True), ("::1", "auto", True), ("127.0.0.5", "auto", True),
        ("0.0.0.0", "auto", False), ("::", "auto", False), ("", "auto", False), ("10.0.0.7", "auto", False),
        ("server.example", "auto", False), ("127.0.0.1.example", "auto", False),
        ("127.0.0.1", "always", False), ("0.0.0.0", "never", True),
    ],
)  # fmt: skip
def test_a_server_is_open_only_on_loopback_unless_told(tmp_path: Path, host: str, require: str, is_open: bool) -> None:
    settings = Settings(home=tmp_path, serve=Serve(host=host), access={"require_keys": require})
    access = Access(NoKeys(), settings)
    assert access.open == is_open
    for token in (None, "", "none", "sk-anything"):
        found = access.identify(token)
        assert (found is not None) == is_open
        assert found is None or found.scopes == {"infer"}


def test_only_strangers_from_elsewhere_are_limited(tmp_path: Path) -> None:
    def limit(host: str) -> int:
        rules = {"require_keys": "never", "anonymous_per_minute": 7}
        anonymous = Access(NoKeys(), Settings(home=tmp_path, serve=Serve(host=host), access=rules)).anonymous
        assert anonymous is not None
        return anonymous.requests_per_minute

    assert (limit("127.0.0.1"), limit("0.0.0.0")) == (0, 7)


KEY = Principal("ci", frozenset({"operate"}))


def test_the_audit_names_the_key_whatever_is_said() -> None:
    assert KEY.actor() == KEY.actor("") == "key:ci"
    assert KEY.actor("ann") == "key:ci/ann"
    assert OPERATOR.actor() == "operator"
    assert OPERATOR.actor(" ann ") == "ann"


KEYLIKE = ["key:ci", "KEY:ci", " key:ci", "\uff4bey\uff1aci"]
PARTS = ["controller", "Updater", "guard", "anonymous"]


@pytest.mark.parametrize("said", [*KEYLIKE, *PARTS, "a\x07", "\n", "x" * 101, "\u202eann"])
def test_nobody_can_say_that_he_is_a_key_or_a_part_of_ratchet(said: str) -> None:
    for who in (OPERATOR, KEY, replace(KEY, kind="anonymous")):
        with pytest.raises(AccessError):
            who.actor(said)
