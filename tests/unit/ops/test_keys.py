"""API keys, the audit log and the claims of refused records, in the ledger and on the command line."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from core.errors import AlreadyResubmitted, ConfigError, LedgerError
from core.ledger import Ledger
from core.ledger.keys import RESERVED, SCOPES, parse_token
from ops.cli import context
from ops.cli.access import Allowed
from tests.support.command_line import ratchet

PLACE = "samples@1:0:7"


def test_a_token_is_told_once_and_only_its_digest_is_kept(ledger: Ledger) -> None:
    row, token = ledger.create_key("ci-bot", ["operate", "infer", "infer"], actor="ann", requests_per_minute=60)
    parsed = parse_token(token)
    assert parsed is not None
    key_id, secret = parsed
    assert token == f"rk_{key_id}_{secret}"
    assert (row.id, row.scopes, row.requests_per_minute) == (key_id, ["infer", "operate"], 60)
    assert row.digest == hashlib.sha256(secret.encode()).hexdigest() and row.digest not in repr(row)
    assert ledger.api_keys() == [row] and row.last_used_at is None
    with ledger.database.engine.connect() as connection:
        for table in ("api_keys", "audit"):
            assert secret not in str(connection.exec_driver_sql(f"select * from {table}").fetchall())
    assert ledger.create_key("other", ["infer"], actor="ann")[1].split("_")[2] != secret
    when = datetime(2026, 5, 1, 12, 0, tzinfo=UTC)
    ledger.touch_keys({row.id: when, "unknown": when})
    assert ledger.api_keys()[1].last_used_at == when


def test_names_that_could_be_taken_for_others_unknown_scopes_and_wrong_limits_are_refused(ledger: Ledger) -> None:
    names = ("", "Ann", "a b", "key:x", "a/b", "-x", "x" * 65, "é", *RESERVED)
    wrong: list[tuple[dict[str, Any], str]] = [({"name": name}, "name of a key") for name in names]
    all_scopes = "Scopes are infer, search, feedback, publish, operate"
    wrong += [({"scopes": scopes}, all_scopes) for scopes in ([], ["infer", "fly"])]
    wrong += [({"days": days}, "cannot be valid for") for days in (0, -1, float("nan"), float("inf"), 1e9)]
    for what, message in [*wrong, ({"requests_per_minute": -1}, "-1 requests per minute")]:
        with pytest.raises(LedgerError, match=message):
            ledger.create_key(**{"name": "x", "scopes": ["infer"], "actor": "ann", **what})
    assert ledger.api_keys(ended=True) == ledger.audit_rows() == []


def test_a_key_that_expired_or_was_revoked_is_none_and_its_name_stays_taken(ledger: Ledger) -> None:
    short, _ = ledger.create_key("short", ["infer"], actor="root", days=1e-9)
    long, _ = ledger.create_key("long", ["infer"], actor="root", days=90)
    assert long.expires_at is not None and timedelta(days=89) < long.expires_at - datetime.now(UTC) < timedelta(days=91)
    assert short.expired() and not long.expired()
    assert ledger.api_keys() == [long] and ledger.api_keys(ended=True) == [long, short]
    revoked = ledger.revoke_key("long", actor="root", reason="left")
    assert revoked.revoked_at is not None
    assert ledger.api_keys() == [] and ledger.api_keys(ended=True) == [revoked, short]
    for key, message in ((long.id, "was revoked at"), ("eve", "no key 'eve'")):
        with pytest.raises(LedgerError, match=message):
            ledger.revoke_key(key, actor="root", reason="again")
    for name in ("long", "short"):
        with pytest.raises(LedgerError, match=f"is or was a key named '{name}'"):
            ledger.create_key(name, ["infer"], actor="root")
    rows = [(row.actor, row.action, row.subject) for row in ledger.audit_rows()]
    made = [("root", "create key", "key long"), ("root", "create key", "key short")]
    assert rows == [("root", "revoke key", "key long"), *made]
    told = [row.detail for row in ledger.audit_rows(limit=2)]
    assert told[0]["reason"] == "left" and told[1]["expires_at"] == long.expires_at.isoformat(timespec="seconds")


def test_of_two_keys_of_one_name_made_at_once_one_is_made(ledger: Ledger) -> None:
    def make(_: int) -> bool:
        try:
            ledger.create_key("twin", ["infer"], actor="root")
        except LedgerError:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(make, range(4))) == [False, False, False, True]
    assert len(ledger.audit_rows()) == 1


def test_the_audit_log_is_asked_by_subject_and_by_actor(ledger: Ledger) -> None:
    for actor, subject in [("ann", "release 1"), ("ann", "release 12"), ("key:ci", "release 1"), ("ann", "releases")]:
        ledger.audit(actor, "did", subject, {})
    assert [row.actor for row in ledger.audit_rows(subject="release 1")] == ["key:ci", "ann"]
    assert len(ledger.audit_rows(subject="release")) == 3
    assert [row.subject for row in ledger.audit_rows(actor="ann", limit=2)] == ["releases", "release 12"]
    assert ledger.audit_rows(subject="release_") == ledger.audit_rows(subject="%") == []


def test_a_record_is_claimed_once_and_again_after_a_failure_or_by_force(ledger: Ledger) -> None:
    assert ledger.begin_resubmission(PLACE, actor="ann", reason="mended").times == 1
    with pytest.raises(AlreadyResubmitted, match="is being sent again by ann"):
        ledger.begin_resubmission(PLACE, actor="bob", reason="me too")
    ledger.end_resubmission(PLACE, error="the broker is away")
    assert ledger.begin_resubmission(PLACE, actor="bob", reason="again").times == 2
    ledger.end_resubmission(PLACE)
    with pytest.raises(AlreadyResubmitted, match="was sent again by bob"):
        ledger.begin_resubmission(PLACE, actor="ann", reason="more")
    assert ledger.begin_resubmission(PLACE, actor="ann", reason="more", force=True).times == 3
    actions = [(row.actor, row.action) for row in ledger.audit_rows(subject=f"record {PLACE}")]
    assert actions == [("ann", "resubmit"), ("bob", "resubmit"), ("ann", "resubmit failed"), ("ann", "resubmit")]
    assert set(ledger.resubmissions([PLACE, "t:0:8"])) == {PLACE}
    with pytest.raises(LedgerError, match="never claimed"):
        ledger.end_resubmission("t:0:8")
    longest = f"{'t' * 249}@999:999999999:{10**17}"  # that Kafka allows
    ledger.begin_resubmission(longest, actor="ann", reason="r")
    assert ledger.resubmissions([longest])[longest].state == "sending"


def test_the_commands_make_list_and_revoke_keys_and_show_the_audit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("controller", "key:page", ""):
        monkeypatch.setattr(context.getpass, "getuser", lambda name=name: name)
        assert context.person() == "operator", "a system user with the name of a part of Ratchet"
    monkeypatch.setattr(context.getpass, "getuser", lambda: "ann")

    def run(*words: str) -> str:
        done = ratchet(tmp_path, *words)
        assert done.exit_code == 0, done.output
        return done.stdout

    with pytest.raises(ConfigError, match="there is no installation at"):
        run("keys", "create", "page", "-s", "infer")
    assert not list(tmp_path.iterdir())
    Ledger.open(f"sqlite:///{tmp_path}/ledger.db").close()
    token = run("keys", "create", "page", "-s", "infer", "-s", "publish", "--per-minute", "600")
    assert parse_token(token.removesuffix("\n")) is not None, "it is alone on standard output"
    run("keys", "create", "ops", "--scope", "operate", "--days", "1.5")
    assert [each.value for each in Allowed] == list(SCOPES)
    assert "no limit" in run("keys", "list")
    run("keys", "revoke", "page", "--reason", "in a [red]screenshot")
    valid, everything = run("keys", "list"), run("keys", "list", "--all")
    assert "page" not in valid and "ops" in valid
    assert (datetime.now(UTC) + timedelta(days=1.5)).strftime("%Y-%m-%d") in valid
    assert "infer, publish" in everything and "600" in everything and "ann" in everything
    assert token.split("_")[2].strip() not in everything
    shown = run("audit")
    assert "revoke key" in shown and "in a [red]screenshot" in shown and "ann" in shown
    rows = json.loads(run("audit", "--json", "--subject", "key page", "--limit", "1"))
    assert [(row["actor"], row["action"]) for row in rows] == [("ann", "revoke key")]
