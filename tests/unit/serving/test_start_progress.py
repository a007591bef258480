"""What a start says of each model. The server is a script."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, cast

import pytest

from core.errors import ConfigError
from core.ledger import Family
from ratchet_client import ServerError
from serving import start_progress
from serving.ray.deployment_status import DeploymentStatus
from serving.start_progress import StartProgress, Statuses
from tests.support.clock import Clock

UP = DeploymentStatus({"RUNNING": 1}, failed=False, cause="")
STARTS = DeploymentStatus({"STARTING": 1}, failed=False, cause="")
FAILED = DeploymentStatus({}, failed=True, cause="OSError: no file")


class Server:
    """Says for each model the next thing of its script, and the last one for ever."""

    url = "http://there"

    def __init__(self, **script: list[str]) -> None:
        self.script = script

    def why_not_ready(self, model: Family) -> str:
        words = self.script[model]
        return words.pop(0) if len(words) > 1 else words[0]

    def progress(self, *models: Family, statuses: Statuses | None = None) -> StartProgress:
        return StartProgress(cast(Any, self), models, statuses)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_progress, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(start_progress, "STATUS_SECONDS", 0.0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Time passes where it is waited for."""
    made = Clock()
    monkeypatch.setattr("core.waiting.time", SimpleNamespace(monotonic=made, sleep=made.sleep))
    monkeypatch.setattr(start_progress, "LOOK_SECONDS", 1.0)
    return made


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_it_says_when_each_model_answers_and_once_why_it_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    server = Server(clip=["nobody listens.", ""], vlm=["it is starting.", "it is starting.", "it is starting.", ""])
    progress = server.progress("clip", "vlm")
    progress.wait_for("clip", int)
    words = said(capsys)
    assert "CLIP after 0 s: nobody listens." in words and "CLIP answers on http://there after" in words
    assert words.count("it is starting.") == 1
    while not progress.look():
        continue
    assert "the VLM answers on http://there" in said(capsys)


def test_a_server_that_says_something_new_is_waited_for_beyond_any_limit(clock: Clock) -> None:
    words = [f"{loaded} of 40 adapters loaded" for loaded in range(40) for _ in range(100)]
    Server(clip=[*words, ""]).progress("clip").wait_for("clip", int)
    assert clock.now > 4000


def test_a_server_that_does_nothing_is_given_up_with_its_last_answer(clock: Clock) -> None:
    with pytest.raises(ServerError, match=r"CLIP does not start: nothing has moved for 121 s; last: nobody listens\."):
        Server(clip=["nobody listens."]).progress("clip").wait_for("clip", int)


def test_a_server_that_computes_in_vain_is_given_up_later(clock: Clock) -> None:
    with pytest.raises(ServerError, match=r"nothing has come of what is computed for 9\d\d s; last: it is starting"):
        Server(clip=["it is starting"]).progress("clip").wait_for("clip", lambda: clock.now)


def test_a_check_ends_the_wait() -> None:
    def ended() -> None:
        raise ConfigError("serve ended while starting")

    with pytest.raises(ConfigError, match="ended while starting"):
        Server(clip=["nobody listens."]).progress("clip").wait_for("clip", int, ended)


def test_a_deployment_that_serve_gave_up_ends_the_start_of_clip() -> None:
    def statuses() -> Mapping[str, DeploymentStatus]:
        return {"Encoder": FAILED, "Vlm": STARTS}

    with pytest.raises(ConfigError, match="Encoder cannot start: OSError: no file"):
        Server(clip=["no release"]).progress("clip", statuses=statuses).look()


def test_once_clip_answers_a_deployment_that_fails_is_said_and_ends_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    states = {"Encoder": UP, "Catalog": STARTS}
    progress = Server(clip=[""], vlm=["it is starting."]).progress("clip", "vlm", statuses=lambda: states)
    assert not progress.look()
    states["Catalog"] = FAILED
    assert not progress.look()
    words = said(capsys)
    assert "Encoder runs after" in words
    assert words.count("Catalog cannot start: OSError: no file") == 1


def test_a_controller_of_serve_that_cannot_be_asked_delays_nothing() -> None:
    def statuses() -> Mapping[str, DeploymentStatus]:
        raise ConnectionError("busy")

    assert Server(clip=[""]).progress("clip", statuses=statuses).look()
