from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from core.errors import RatchetError
from core.settings import Settings
from core.waiting import BUSY_SECONDS, STILL_SECONDS
from demo.story.stage import Stage
from demo.story.story import _free_ports, _settle
from ops.cli.context import Context
from ratchet_client import ServerError
from tests.support.clock import Clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("core.waiting.time", SimpleNamespace(monotonic=made, sleep=made.sleep))
    return made


class Server:
    """Embeds a picture a minute for a release that is being prepared, and sometimes fails to answer."""

    def __init__(self, clock: Clock, corpus: int = 60, stops_at: int = 1000) -> None:
        self.clock, self.began, self.corpus, self.stops_at = clock, clock.now, corpus, stops_at
        self.asked = 0
        self.state, self.error = "preparing", ""

    @property
    def rows(self) -> int:
        return min(self.stops_at, self.corpus, int((self.clock.now - self.began) / 60))

    def status(self) -> dict[str, Any]:
        catalog = {"corpus_rows": self.corpus, "spaces": {"new": {"rows": self.rows}}}
        return {"controller": {"resident": [{"release": 1}], "trouble": ""}, "catalog": catalog}

    def releases(self, limit: int) -> dict[str, Any]:
        self.asked += 1
        if self.asked % 5 == 0:
            raise ServerError("the server does not answer: timed out")
        return {"data": [{"clip": "clip-new" if self.rows == self.corpus else None, "vlm": None}]}

    def live(self) -> int:
        return 2

    def proposals(self, limit: int) -> list[Any]:
        return [SimpleNamespace(id=1, update_id="u", state=self.state, error=self.error)]

    def audit_rows(self) -> list[Any]:
        return [SimpleNamespace(subject="release 2", action="released", detail={"prepare_seconds": 1.0})]

    def stage(self, home: Path, check: Callable[[], None] = lambda: None, work: Callable[[], Any] = int) -> Stage:
        parts = SimpleNamespace(check=check, work=work)
        context = Context(None, [f"home={home}"])
        made = cast(Any, self)
        return Stage(context, cast(Any, None), cast(Any, parts), made, made, cast(Any, None))


VERDICT = cast(Any, SimpleNamespace(outcome="passed", adapter="clip-new", update_id="u"))


def test_a_release_that_takes_an_hour_on_a_busy_machine_is_waited_for(
    clock: Clock, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = Server(clock)
    assert server.stage(tmp_path).await_release("clip", VERDICT) == {"prepare_seconds": 1.0}
    assert clock.now - server.began > BUSY_SECONDS
    assert "proposal 1 is preparing; resident releases: 1; pictures embedded for search: 30 of 60" in " ".join(
        capsys.readouterr().err.split()
    )


def test_a_release_that_gets_no_further_ends_the_demo_and_is_named(clock: Clock, tmp_path: Path) -> None:
    server = Server(clock, stops_at=7)
    stands = r"preparing the release stands still: nothing has moved for 12\d s; last: .* 7 of 60"
    with pytest.raises(RatchetError, match=stands):
        server.stage(tmp_path).await_release("clip", VERDICT)
    assert clock.now - server.began < 7 * 60 + 2 * STILL_SECONDS


def test_a_release_that_failed_is_not_waited_for(clock: Clock, tmp_path: Path) -> None:
    server = Server(clock)
    server.state, server.error = "failed", "golden inputs differ"
    with pytest.raises(RatchetError, match="was not released: golden inputs differ"):
        server.stage(tmp_path).await_release("clip", VERDICT)


def test_a_part_that_ended_is_not_waited_for(clock: Clock, tmp_path: Path) -> None:
    def check() -> None:
        raise RatchetError("serve ended: out of memory")

    with pytest.raises(RatchetError, match="serve ended: out of memory"):
        Server(clock).stage(tmp_path, check).await_release("clip", VERDICT)


def test_a_taken_port_is_replaced_by_a_free_one_and_none_is_given_out_twice() -> None:
    usual = Settings()
    with socket.create_server(("127.0.0.1", 0)) as first:
        held = first.getsockname()[1]
        assert usual.serve.port + 1 == usual.console.port  # so that a server that gives way would meet the console
        serve, console = _free_ports(f"127.0.0.1:{held}", f"127.0.0.1:{held + 1}")
    assert serve != f"127.0.0.1:{held}" and serve != console


def test_the_demo_writes_the_ports_it_found_into_its_settings(tmp_path: Path) -> None:
    settings = _settle(tmp_path, with_vlm=False).settings
    ports = {settings.serve.port, settings.console.port, int(settings.kafka.bootstrap.rpartition(":")[2])}
    assert len(ports) == 3
