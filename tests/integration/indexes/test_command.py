"""``ratchet index`` with a real table."""

from __future__ import annotations

import json
from pathlib import Path

import psycopg
import pytest
from typer.testing import CliRunner

from core.errors import ConfigError, LedgerError, StoreUnavailable
from core.ledger import Ledger
from ops.cli.main import app
from tests.support.postgres import PostgresServer

TABLE = "drop schema public cascade; create schema public; create table photos (id int primary key, url text)"


def run(home: Path, *words: str) -> str:
    result = CliRunner().invoke(app, ["--set", f"home={home}", "index", *words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_an_index_is_added_shown_paused_and_removed(tmp_path: Path, pgvector: PostgresServer) -> None:
    Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}").close()
    with psycopg.connect(pgvector.url, autocommit=True) as user:
        user.execute(TABLE)
    fields = ("--table", "photos", "--image", "url")
    assert "registered" in run(tmp_path, "add", "found", "--to", pgvector.url, *fields)
    run(tmp_path, "pause", "found")
    (row,) = json.loads(run(tmp_path, "list", "--json"))
    assert (row["name"], row["paused"], row["spaces"]) == ("found", True, [])
    run(tmp_path, "resume", "found")
    assert "photos" in run(tmp_path, "show", "found")
    run(tmp_path, "remove", "found")
    assert json.loads(run(tmp_path, "list", "--json")) == []
    with pytest.raises(LedgerError, match="no index"):
        run(tmp_path, "pause", "found")


@pytest.mark.parametrize(
    ("to", "options", "words"),
    [
        ("postgresql://me:secret@host/db", {}, "must not have a password"),
        ("postgresql://host/db?password=secret", {}, "must not have a password"),
        ("mysql://host/db", {}, "is no index"),
        ("", {"--table": "nothing"}, "lacks the field"),
        ("", {"--image": "nothing"}, "lacks the field"),
        ("", {"--image": "id"}, "of type text or bytea"),
        ("qdrant:///FOLDER", {"--table": "nothing"}, "no collection"),
    ],
)
def test_wrong_options_are_told(
    tmp_path: Path, pgvector: PostgresServer, to: str, options: dict[str, str], words: str
) -> None:
    Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}").close()
    with psycopg.connect(pgvector.url, autocommit=True) as user:
        user.execute(TABLE)
    given = {
        "--to": to.replace("/FOLDER", str(tmp_path)) or pgvector.url,
        "--table": "photos",
        "--image": "url",
        **options,
    }
    with pytest.raises(ConfigError, match=words) as raised:
        run(tmp_path, "add", "found", *(word for option in given.items() for word in option))
    assert "secret" not in str(raised.value)


def test_a_database_that_is_away_is_told(tmp_path: Path) -> None:
    Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}").close()
    with pytest.raises(StoreUnavailable, match="PostgreSQL of index found"):
        run(tmp_path, "add", "found", "--to", "postgresql://127.0.0.1:1/a", "--table", "photos", "--image", "url")
