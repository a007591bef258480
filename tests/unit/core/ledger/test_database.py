from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import event, text
from sqlalchemy.exc import OperationalError

from core.errors import LedgerError, LedgerUnavailable
from core.ledger import Ledger
from core.ledger.database import MIGRATIONS, alembic_config
from core.ledger.rows import Base
from tests.support.ledger_limits import patient, patient_limits
from tests.support.waiting import patiently
from tests.unit.core.ledger.steps import of_revision, race, release


def test_a_database_without_an_encoding_keeps_texts_of_any_script(ascii_url: str) -> None:
    with patient_limits(), closing(Ledger.open(patient(ascii_url))) as ledger:
        ledger.hold("Zoë", "смена 検査")
        [row] = ledger.audit_rows()
        assert row.actor == "Zoë" and "смена 検査" in str(row.detail) and ledger.held()


def test_the_migrations_make_exactly_the_tables_that_the_code_expects(ledger: Ledger) -> None:
    with ledger.database.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []


def test_a_ledger_of_the_first_schema_keeps_its_rows(url: str) -> None:
    with of_revision(url, "0014", release):
        pass
    with closing(Ledger.open(url)) as upgraded:
        assert [row.number for row in upgraded.releases()] == [1]
        assert upgraded.distrusted() == []


def test_a_ledger_of_a_time_before_the_first_version_is_refused(url: str) -> None:
    with of_revision(url, "0014") as connection:
        connection.execute(text("update alembic_version set version_num = '0013'"))
    with pytest.raises(LedgerError, match="0013, older than the first version's 0014"):
        Ledger.open(url)


def test_only_its_user_can_read_a_new_ledger_and_its_folder_and_old_ones_stay_as_they_are(tmp_path: Path) -> None:
    def modes() -> dict[str, int]:
        return {path.name: path.stat().st_mode & 0o777 for path in (home, *home.iterdir())}

    home = tmp_path / "home"
    with closing(Ledger.open(f"sqlite:///{home}/ledger.db")) as opened:
        release(opened)
        assert modes() == {"home": 0o700, "ledger.db": 0o600, "ledger.db-wal": 0o600, "ledger.db-shm": 0o600}
    home.chmod(0o755)
    (home / "ledger.db").chmod(0o640)
    Ledger.open(f"sqlite:///{home}/ledger.db").close()
    assert modes() == {"home": 0o755, "ledger.db": 0o640}


def test_the_newest_migration_is_the_last_file_so_that_a_ledger_is_known_to_be_up_to_date() -> None:
    script = ScriptDirectory.from_config(alembic_config())
    newest = sorted(path.name for path in MIGRATIONS.glob("versions/[0-9]*.py"))[-1]
    assert newest.startswith(f"{script.get_current_head()}_")


def test_a_ledger_that_a_newer_version_migrated_is_used_as_it_is(url: str) -> None:
    """The software was rolled back; the tables were not."""
    with closing(Ledger.open(url)) as opened:
        release(opened)
        with opened.database.write() as session:
            session.execute(text("update alembic_version set version_num = '9999'"))
    with closing(Ledger.open(url)) as again:
        assert [row.number for row in again.releases()] == [1]


def test_processes_that_start_together_migrate_once(url: str) -> None:
    def start() -> None:
        patiently(lambda: Ledger.open(url).close(), LedgerUnavailable)

    assert race(*[start] * 6) == [None] * 6


def test_starting_together_on_a_new_file_never_finds_it_locked(tmp_path: Path) -> None:
    """One start in twelve lost this race; two dozen show it."""
    for number in range(24):
        url = f"sqlite:///{tmp_path / str(number)}.db"
        assert race(*[lambda url=url: Ledger.open(url).close()] * 6) == [None] * 6  # type: ignore[misc]


def test_a_database_that_cannot_be_used_is_a_clear_error_without_the_password() -> None:
    with pytest.raises(LedgerUnavailable) as caught:
        Ledger.open("postgresql://ratchet:hunter2@127.0.0.1:1/none")
    assert "hunter2" not in str(caught.value)
    assert caught.value.fix
    with pytest.raises(LedgerError, match="ledger_url"):
        Ledger.open("nonsense")


def test_reads_of_one_block_share_a_connection_and_other_threads_have_their_own(ledger: Ledger) -> None:
    checkouts: list[object] = []
    event.listen(ledger.database.engine, "checkout", lambda *parts: checkouts.append(parts[0]))
    with ledger.reading():
        ledger.live()
        with ledger.reading():
            ledger.releases()
        ledger.held()
        assert len(checkouts) == 1
        with ThreadPoolExecutor(1) as pool:
            pool.submit(ledger.live).result()
        assert len(checkouts) == 2
        with pytest.raises(LedgerUnavailable, match="gone"), ledger.database.read():  # an outage is named as anywhere
            raise OperationalError("select", {}, Exception("gone"))
    ledger.live()
    assert len(checkouts) == 3
