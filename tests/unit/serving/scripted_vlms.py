"""The real HTTP application around a scripted VLM."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import httpx
from fastapi import FastAPI
from pydantic import SecretStr
from starlette.types import ASGIApp, Message

from core.access import Access
from core.errors import AdapterError
from core.settings import Settings
from core.settings.serving import Serve
from serving.engines.preprocess import Preprocess
from serving.engines.vlm.generation import PROBE, Finish, GenerationRequest, GenerationResult, TokenChunk, whole
from serving.http.answer_receipts import AnswerReceipts
from serving.http.app import build_app
from serving.http.app_state import AppState
from serving.http.calibrations import Calibrations
from serving.http.image_loader import ImageLoader
from serving.releases.admission import Admission
from serving.releases.types import ReleaseSnapshot
from tests.support import pictures

SETTINGS = Serve(vlm_max_tokens=32, deadline_seconds=5, max_pixels=1_000_000)
WINDOW = (ReleaseSnapshot(3, "clip-a", "i3", "t3", "vlm-b"), ReleaseSnapshot(2, "clip-a", "i3", "t3", None))


@dataclass
class ScriptedVlms:
    """Says ``words`` one by one; raises ``failure`` instead of the word at ``fails_at``, or hangs there."""

    words: Sequence[str] = ("a ", "red ", "bus")
    finish: Finish = "stop"
    start_problem: str = ""
    failure: Exception | None = None
    fails_at: int = 0
    hangs_at: int | None = None
    logits: Sequence[float] = ()
    asked: list[tuple[GenerationRequest, ReleaseSnapshot]] = field(default_factory=list)
    choices: list[str] = field(default_factory=list)
    closed: int = 0
    limit: int = 128
    when_closed: Callable[[], object] = lambda: None
    waiting: asyncio.Event = field(default_factory=asyncio.Event)

    async def stream(
        self, ask: GenerationRequest, snapshot: ReleaseSnapshot, deadline: float
    ) -> AsyncIterator[TokenChunk]:
        self.asked.append((ask, snapshot))
        try:
            for index, word in enumerate(self.words):
                if index == self.hangs_at:
                    self.waiting.set()
                    await asyncio.Event().wait()
                if self.failure is not None and index == self.fails_at:
                    raise self.failure
                last = index == len(self.words) - 1
                yield TokenChunk(word, (index,), (-0.5 * index,), 7, index + 1, self.finish if last else "")
        finally:
            self.closed += 1
            self.when_closed()

    async def reply(self, ask: GenerationRequest, snapshot: ReleaseSnapshot, deadline: float) -> GenerationResult:
        return await whole(self.stream(ask, snapshot, deadline))

    async def probe(self, snapshot: ReleaseSnapshot, deadline: float) -> None:
        await self.reply(PROBE, snapshot, deadline)

    async def score(
        self, ask: GenerationRequest, choices: Sequence[str], snapshot: ReleaseSnapshot, deadline: float
    ) -> list[float]:
        self.asked.append((ask, snapshot))
        self.choices = list(choices)
        if self.failure is not None:
            raise self.failure
        return list(self.logits)


class Words:
    """Stands for a tokenizer: an ID for each word."""

    def rows(self, texts: list[str]) -> list[list[int]]:
        return [[len(word) for word in text.split()] for text in texts]

    def cuts(self, text: str, row: list[int]) -> bool:
        return False


def app_state(vlms: ScriptedVlms | None, settings: Serve = SETTINGS) -> AppState:
    """State of the routes; only the VLM and the admission are used here."""
    admission = Admission()
    admission.adopt(WINDOW)
    unused = cast(Any, None)
    access = Access(unused, Settings(serve=Serve(operator_key=SecretStr("key"))))
    return AppState(
        settings=settings, dim=8, tokenizer=cast(Any, Words()), admission=admission, encoders=unused,
        index=unused, operations=unused,
        image_loader=ImageLoader(Preprocess(size=16), settings), access=access,
        quarantine=unused, receipts=unused, deletions=unused, feedback=unused,
        calibrations=Calibrations(_no_artifact),
        answers=AnswerReceipts(SecretStr("key")), ledger=unused, refresh=unused, vlms=cast(Any, vlms),
        token_text=lambda token: f"<{token}>",
    )  # fmt: skip


def _no_artifact(key: str) -> bytes:
    raise AdapterError(f"there is no {key}.", "None is made here.")


def app_of(at: AppState) -> FastAPI:
    return build_app(at)


def client(at: AppState) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app_of(at)), base_url="http://localhost")


def png(width: int = 6, height: int = 4, colour: tuple[int, int, int] = (200, 30, 30)) -> bytes:
    return pictures.png(colour, (width, height))


def uri(data: bytes | None = None) -> str:
    return "data:image/png;base64," + base64.b64encode(png() if data is None else data).decode()


def about_image(text: str = "what is this?", image: str | None = None) -> list[dict[str, Any]]:
    shown = {"type": "image_url", "image_url": {"url": image or uri()}}
    return [{"role": "user", "content": [shown, {"type": "text", "text": text}]}]


def skip(seconds: float) -> None:
    """Advance the time of everything in this event loop, so that a deadline passes at a defined point instead of after
    a pause, in which a busy machine may not have reached that point.
    """
    loop = asyncio.get_running_loop()
    now = loop.time
    loop.time = lambda: now() + seconds  # type: ignore[method-assign]


class RawRequest:
    """One request at the ASGI level, whose client sends its body at once, in pieces or never, and can hang up."""

    def __init__(
        self, app: ASGIApp, path: str = "/v1/embeddings", body: bytes | None = None, peer: str = "127.0.0.1",
        length: int = 100,
    ) -> None:  # fmt: skip
        length = length if body is None else len(body)
        self.scope: dict[str, Any] = {
            "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
            "headers": [
                (b"host", b"localhost"), (b"content-type", b"application/json"),
                (b"content-length", str(length).encode()),
            ],
            "client": (peer, 1), "server": ("localhost", 80), "scheme": "http", "http_version": "1.1", "root_path": "",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
        }  # fmt: skip
        self.messages: asyncio.Queue[Message] = asyncio.Queue()
        self.sent: list[Message] = []
        self.reads = asyncio.Event()
        self.reads.set()
        if body is not None:
            self.send_body(body, more=False)
        self.task = asyncio.create_task(self._run(app))

    async def _run(self, app: ASGIApp) -> None:
        await app(self.scope, self.receive, self.send)

    async def receive(self) -> Message:
        message = await self.messages.get()
        if message["type"] == "http.disconnect":
            self.hang_up()  # told whenever it is asked for
        return message

    async def send(self, message: Message) -> None:
        await self.reads.wait()
        self.sent.append(message)

    def send_body(self, data: bytes, more: bool = True) -> None:
        self.messages.put_nowait({"type": "http.request", "body": data, "more_body": more})

    def hang_up(self) -> None:
        self.messages.put_nowait({"type": "http.disconnect"})

    async def status(self) -> int:
        await self.task
        return int(self.sent[0]["status"])

    def body(self) -> str:
        return b"".join(message.get("body", b"") for message in self.sent).decode()
