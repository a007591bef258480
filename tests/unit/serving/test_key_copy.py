"""Clients' keys while the ledger is away."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr

from core.access import Access
from core.artifacts import Artifacts
from core.errors import LedgerUnavailable
from core.ledger import KeyRow, Ledger
from core.settings import Settings
from serving.http.auth import KEY, KeyCopy


class Node:
    """A ledger with keys, and a copy of them."""

    def __init__(self, folder: Path) -> None:
        self.settings = Settings(home=folder, serve={"operator_key": "bootstrap"})
        self.ledger = Ledger.open(self.settings.ledger)
        self.file = folder / "serving" / "keys.json"
        self.artifacts = Artifacts(self.settings.artifacts)

    def key(self, name: str) -> str:
        return self.ledger.create_key(name, ["infer"], actor="t")[1]

    def copy(self, secret: str = "bootstrap") -> KeyCopy:
        """The copy of a process that begins now."""
        return KeyCopy(self.file, self.artifacts, SecretStr(secret))

    def keep(self) -> None:
        self.copy().keep(self.ledger.api_keys())


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path)
    yield node
    node.ledger.close()


def names(rows: list[KeyRow]) -> list[str]:
    return sorted(row.name for row in rows)


class Away:
    def api_keys(self) -> list[KeyRow]:
        raise LedgerUnavailable("no route to host")

    def touch_keys(self, used: object) -> None:
        raise LedgerUnavailable("no route to host")


def test_a_process_that_starts_while_the_ledger_is_away_knows_the_clients(node: Node) -> None:
    token, leaver = node.key("ann"), node.key("leaver")
    copy = node.copy()
    copy.keep(node.ledger.api_keys())
    node.ledger.revoke_key("leaver", actor="t", reason="left")
    copy.keep(node.ledger.api_keys())
    access = Access(Away(), node.settings, recall=node.copy().read)
    caller = access.identify(token)
    assert caller is not None and (caller.name, caller.scopes) == ("ann", {"infer"})
    for stranger in (leaver, f"rk_ffffffff_{'0' * 64}"):
        assert access.identify(stranger) is None and access.unread(stranger, came=0.0)


def test_a_new_node_takes_the_copy_of_the_artifacts_and_one_without_artifacts_its_own(node: Node) -> None:
    node.key("ann")
    node.keep()
    node.file.unlink()
    assert names(node.copy().read()) == ["ann"]
    node.keep()
    shutil.rmtree(node.settings.artifacts)
    assert names(node.copy().read()) == ["ann"]


@pytest.mark.parametrize(
    "data", [b"", b"null", b"[]", b"\xff", b"[" * 100_000, b'{"format": 1, "hmac": "", "keys": []}']
)
def test_any_bytes_name_nobody(node: Node, data: bytes) -> None:
    node.key("ann")
    node.keep()
    for write in (node.file.write_bytes, lambda data: node.artifacts.write_bytes(KEY, data)):
        write(data)
    assert node.copy().read() == []


def test_a_copy_that_was_changed_or_signed_with_another_key_names_nobody(node: Node) -> None:
    node.key("ann")
    node.keep()
    assert node.copy("another").read() == []
    forged = node.file.read_text().replace('"infer"', '"operate"').encode()
    node.artifacts.write_bytes(KEY, forged)
    assert [row.scopes for row in node.copy().read()] == [["infer"]]  # of the node's own
    node.file.write_bytes(forged)
    assert node.copy().read() == []


def test_it_has_no_secret_and_a_nodes_is_its_owners(node: Node) -> None:
    token = node.key("ann")
    node.keep()
    assert node.file.stat().st_mode & 0o777 == 0o600
    for text in (node.file.read_text(), node.artifacts.read_bytes(KEY).decode()):
        assert "ann" in text and token.split("_")[2] not in text and "bootstrap" not in text


def test_a_copy_that_could_not_be_written_is_written_later(node: Node) -> None:
    node.key("ann")
    copy = node.copy()
    node.file.parent.parent.joinpath("serving").write_text("a file where the folder should be")
    copy.keep(node.ledger.api_keys())
    node.file.parent.unlink()
    copy.keep(node.ledger.api_keys())
    assert names(node.copy().read()) == ["ann"]
