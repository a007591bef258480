from __future__ import annotations

import pytest

from tests.outside.__main__ import HEADING, PAGE, PEERS, Ran, peer_of, written


def test_each_peer_has_a_row_and_its_tests_are_there() -> None:
    table = PAGE.read_text().partition(HEADING)[2]
    for peer in PEERS:
        assert table.count(f"\n| {peer.name} | ") == 1
        assert all((PAGE.parents[1] / path).exists() for path in peer.tests)


def test_a_run_replaces_the_rows_of_its_peers_and_no_other() -> None:
    page = PAGE.read_text()
    nginx, minio = Ran({"passed": 2, "failed": 1}, 7.4), Ran({"left out": 9}, 0.1)
    after = written(page, {"Kubernetes": Ran({"passed": 1}, 5), "nginx": nginx, "MinIO": minio})
    changed = [line for line in after.splitlines() if line not in page.splitlines()]
    assert [line.split(" | ")[0] for line in changed] == ["| Kubernetes", "| nginx"]
    assert "| 2 passed, 1 failed | 7 s |" in changed[1] and after.partition(HEADING)[0] == page.partition(HEADING)[0]


@pytest.mark.parametrize(
    ("test", "name"),
    [
        ("tests/integration/ledger/test_pgbouncer.py::test_x", "PgBouncer"),
        ("tests/integration/ledger/test_outages.py::test_x", "PostgreSQL"),
        ("tests/outside/s3/test_minio.py::test_x", "MinIO"),
        ("tests/unit/ops/test_cli.py::test_x", ""),
    ],
)
def test_a_test_belongs_to_the_peer_that_names_it_most_closely(test: str, name: str) -> None:
    peer = peer_of(test)
    assert (peer.name if peer else "") == name
