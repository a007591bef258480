"""The real application with authentication: a ledger with keys, and a clock that stands still."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import httpx
from fastapi import FastAPI

from core.access import Access
from core.ledger import KeyRow, Ledger
from core.settings import Settings
from serving.http.app_state import AppState
from serving.releases.types import HoldingCommand
from tests.support.clock import Clock
from tests.unit.serving.scripted_vlms import app_of, app_state

OPERATOR = "bootstrap-key"


@dataclass
class Recorder:
    """Operations and quarantine that record who asked; ``failure`` is raised instead of an answer."""

    actors: list[str] = field(default_factory=list)
    failure: Exception | None = None

    async def hold(self, command: HoldingCommand) -> None:
        self.actors.append(command.actor)

    async def newest(self, limit: int, reason: str | None, source: str | None) -> list[dict[str, Any]]:
        return [{"place": "t:0:1", "limit": limit, "reason": reason, "source": source}]

    async def counts(self, reason: str | None, source: str | None) -> dict[str, dict[str, int]]:
        return {"reason": {"schema": 2}, "source": {"cam": 2}}

    async def resubmit_many(self, which: Any, *, actor: str, reason: str, dry_run: bool) -> dict[str, Any]:
        self.actors.append(actor)
        return {"limit": which.limit, "source": which.source, "dry_run": dry_run}

    async def resubmit(self, place: str, *, actor: str, reason: str, force: bool) -> dict[str, Any]:
        self.actors.append(actor)
        if self.failure is not None:
            raise self.failure
        return {"topic": "t", "partition": 0, "offset": 9}


class AuthApp:
    def __init__(self, ledger: Ledger, home: Path, host: str = "0.0.0.0", **rules: Any) -> None:
        self.ledger = ledger
        self.settings = Settings(home=home, serve={"host": host, "operator_key": OPERATOR}, access=rules)
        self.clock = Clock()
        self.access = Access(self, self.settings, self.clock)
        self.desk = Recorder()
        self.slow: threading.Event | None = None
        self.app: FastAPI = app_of(self.app_state())

    def app_state(self) -> AppState:
        desk = cast(Any, self.desk)
        return replace(
            app_state(None, self.settings.serve),
            access=self.access,
            ledger=self.ledger,
            operations=desk,
            quarantine=desk,
        )

    def api_keys(self) -> list[KeyRow]:
        if self.slow is not None:
            self.slow.wait(30)
        return self.ledger.api_keys()

    def touch_keys(self, used: Mapping[str, datetime]) -> None:
        self.ledger.touch_keys(used)

    async def send(self, method: str, path: str, key: str = "", said: str = "", **options: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        headers |= options.pop("headers", {})
        if said:
            headers["x-ratchet-actor"] = said
        async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://localhost") as http:
            return await http.request(method, path, headers=headers, **options)

    async def get(self, path: str, key: str = "") -> httpx.Response:
        return await self.send("GET", path, key)


@dataclass
class Keys:
    """Tokens of one ledger for all tests of this module."""

    ledger: Ledger
    made: dict[str, str] = field(default_factory=dict)

    def of(self, *scopes: str, limit: int | None = None) -> str:
        name = "-".join([*scopes, str(limit)]).lower()
        if name not in self.made:
            self.made[name] = self.ledger.create_key(name, scopes, actor="t", requests_per_minute=limit)[1]
        return self.made[name]


def refusal(answer: httpx.Response, status: int, code: str) -> str:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["code"] == code
    return str(error["message"])
