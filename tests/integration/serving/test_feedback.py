"""Random audits of answers, receipts of real answers, and the examples of the page, with a real CLIP and no Ray."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
import threading
from base64 import urlsafe_b64decode
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from prometheus_client import REGISTRY

from core.errors import FeedbackRefused, LedgerUnavailable
from core.ledger import Ledger
from core.ledger import feedback as feedback_queries
from core.ledger.rows import AUDITOR, FeedbackRow, utc_now
from ratchet_client import data_uri
from serving.http import answer_audits
from serving.http.answer_audits import AnswerAudits
from serving.http.answer_receipts import HEADER, PREFIX
from serving.http.app import build_app
from tests.support.clients import NODE_PROGRAM
from tests.support.in_process_app import InProcessApp
from tests.support.inputs import pictures
from tests.support.pages import ROOT, Page

IMAGES = pictures(3)
LABELS = ["cat", "dog"]
OUTCOMES = ("recorded", "repeated", "full", "dropped", "too_large", "url", "failed")


def counted() -> dict[str, float]:
    values = {
        each: REGISTRY.get_sample_value("ratchet_feedback_audits_total", {"outcome": each}) or 0.0 for each in OUTCOMES
    }
    return {name: value for name, value in values.items() if value}


class AuditedApp:
    """The application with audits of all answers."""

    def __init__(self, runner: asyncio.Runner, in_process: InProcessApp, app: FastAPI) -> None:
        self.runner = runner
        self.ledger: Ledger = in_process.ledger
        self.ledger.prune_feedback(utc_now())
        state = app.state.ratchet
        self.answers = state.answers
        self.audits = AnswerAudits(self.ledger, self.answers, 1.0)
        self.app = build_app(replace(state, audits=self.audits))
        self.before = counted()

    def send(self, path: str, method: str = "POST", **body: Any) -> httpx.Response:
        async def call() -> httpx.Response:
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
                return await http.request(method, path, **body)

        answer = self.runner.run(call())
        assert answer.status_code < 300, answer.text
        return answer

    def classify(self, *images: bytes, labels: list[str] = LABELS) -> httpx.Response:
        return self.send("/v1/classify", json={"images": [data_uri(each) for each in images], "labels": labels})

    def written(self) -> dict[str, float]:
        """Outcomes once all audits are written."""

        async def end() -> None:
            await asyncio.gather(*self.audits.pending)

        self.runner.run(end())
        now = counted()
        return {name: now[name] - self.before.get(name, 0) for name in now if now[name] > self.before.get(name, 0)}


@pytest.fixture
def audited(runner: asyncio.Runner, in_process_app: tuple[InProcessApp, FastAPI]) -> AuditedApp:
    return AuditedApp(runner, *in_process_app)


def test_a_drawn_answer_waits_for_a_review_with_one_of_its_images(audited: AuditedApp) -> None:
    answer = audited.classify(*IMAGES)
    assert audited.written() == {"recorded": 1}
    (row,) = audited.ledger.corrections("waiting", images=True)
    receipt = audited.answers.read(answer.headers[HEADER])
    assert (row.caller, row.verdict, row.state) == ("audit", "audit", "waiting")
    assert (row.release, row.route, row.input, row.answered_at) == (
        receipt.release, "classify", receipt.input, receipt.at,
    )  # fmt: skip
    assert row.image in IMAGES
    label = answer.json()["data"][IMAGES.index(row.image)]["label"]
    assert row.detail == {"answered": label, "image_digest": sha256(row.image).hexdigest()[:12]}

    form = {"labels": json.dumps(LABELS)}
    audited.send("/v1/classify", files=[("images", ("a.png", IMAGES[1]))], data=form)
    assert audited.written() == {"recorded": 2}
    assert IMAGES[1] in {row.image for row in audited.ledger.corrections("waiting", images=True)}


def test_an_audit_is_no_report_until_a_person_has_decided(audited: AuditedApp) -> None:
    waiting = audited.ledger.count_waiting_events()
    audited.classify(IMAGES[0])
    audited.classify(IMAGES[1])
    assert audited.written() == {"recorded": 2}
    rows = audited.ledger.corrections("waiting")
    release = rows[0].release

    def said() -> tuple[list[Any], list[Any]]:
        reports = audited.ledger.feedback_by_caller(release, ["classify"])
        return [(each.wrong, each.of) for each in reports], [row["verdict"] for row in audited.ledger.feedback_counts()]

    assert said() == ([], []) and audited.ledger.count_waiting_events() == waiting
    right, wrong = (row.detail["answered"] for row in rows)
    audited.ledger.review_correction(rows[0].id, True, actor="ann", reason="seen", label=right)
    assert said() == ([(0, 1)], ["right"])
    audited.ledger.review_correction(rows[1].id, True, actor="ann", reason="seen", label=f"not {wrong}")
    assert said() == ([(1, 2)], ["correct", "right"])


def test_neither_a_probe_nor_another_route_is_audited_and_a_share_is_drawn(
    audited: AuditedApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in ("/health/ready", "/health/ready/clip"):
        audited.send(path, "GET")
    audited.send("/v1/embeddings", json={"input": ["a bus"]})
    assert audited.written() == {}
    audited.audits.share = 0.25
    drawn = iter([0.5, 0.25, 0.2, 0.9])
    monkeypatch.setattr(answer_audits.RANDOM, "random", lambda: next(drawn))
    for image in (*IMAGES, IMAGES[0]):
        audited.classify(image)
    assert audited.written() == {"recorded": 1}
    assert [row.image for row in audited.ledger.corrections("waiting", images=True)] == [IMAGES[2]]


def test_large_images_and_those_of_urls_are_left_out_and_a_ledger_that_is_away_fails_no_answer(
    audited: AuditedApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def offer(image: str | bytes) -> None:
        audited.audits.offer("", [image], ["cat"])

    with monkeypatch.context() as small:
        small.setattr(answer_audits, "MAX_IMAGE_BYTES", 100)
        audited.classify(IMAGES[0])
        audited.runner.run(offer(IMAGES[0]))
    audited.runner.run(offer("https://example.com/a.png"))
    assert audited.written() == {"too_large": 2, "url": 1}

    def away(_: object) -> None:
        raise LedgerUnavailable("the ledger cannot be used now: test.", "Wait.")

    with monkeypatch.context() as hanging:
        hanging.setattr(audited.ledger, "record_feedback", away)
        audited.classify(IMAGES[0])
        assert audited.written() == {"too_large": 2, "url": 1, "failed": 1}
    assert audited.ledger.feedback() == []


def test_no_answer_waits_for_the_ledger_and_what_does_not_fit_is_dropped(
    audited: AuditedApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, record = threading.Event(), audited.ledger.record_feedback

    def hang(row: FeedbackRow) -> tuple[FeedbackRow, bool]:
        answers.wait()
        return record(row)

    monkeypatch.setattr(audited.ledger, "record_feedback", hang)
    monkeypatch.setattr(answer_audits, "PENDING", 2)
    for number in range(5):
        audited.classify(IMAGES[0], labels=[f"label {number}", "cat"])
    assert audited.ledger.feedback() == []
    answers.set()
    assert audited.written() == {"recorded": 2, "dropped": 3}


def test_audits_fill_half_of_the_room_and_leave_the_rest_to_callers(
    audited: AuditedApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feedback_queries, "WAITING", 10)
    for number in range(6):
        audited.classify(IMAGES[0], labels=[f"label {number}", "cat"])
    assert audited.written() == {"recorded": 5, "full": 1}
    rows = [row(number) for number in range(3)]
    assert [audited.ledger.record_feedback(each)[1] for each in rows[:2]] == [True, True]
    with pytest.raises(FeedbackRefused, match="2 of app's corrections"):
        audited.ledger.record_feedback(rows[2])


def row(number: int) -> FeedbackRow:
    return FeedbackRow(
        id=f"{number:064x}", caller="app", release=1, route="classify", input="", answered_at=utc_now(),
        verdict="wrong", detail={}, state="waiting", image=b"",
    )  # fmt: skip


def test_nothing_of_a_request_or_an_answer_is_in_its_receipt(audited: AuditedApp) -> None:
    marker = "a-marker-that-no-one-else-writes"
    question = {"image": data_uri(IMAGES[0]), "question": marker, "choices": [marker, "no"]}
    searched = audited.send("/v1/search", json={"text": marker, "k": 100})
    headers = [
        audited.classify(IMAGES[0], labels=[marker, "cat"]).headers,
        audited.send("/v1/embeddings", json={"input": [marker]}).headers,
        audited.send("/v1/vqa", json=question).headers,
        audited.send("/v1/chat/completions", json={"messages": [{"role": "user", "content": marker}]}).headers,
        searched.headers,
    ]
    texts = [marker, *(hit["text"] for hit in searched.json()["data"])]
    pieces = [text.encode()[start : start + 8] for text in texts for start in range(len(text) - 7)]
    pieces += [IMAGES[0][start : start + 8] for start in range(len(IMAGES[0]) - 7)]
    for each in headers:
        raw = urlsafe_b64decode(each[HEADER].removeprefix(PREFIX))
        assert not [piece for piece in pieces if piece in raw]
        assert marker not in each[HEADER]


PAGE = Page(ROOT / "docs" / "client" / "feedback.md")
CURL = [block.text for block in PAGE.blocks if block.language == "" and "/v1/feedback" in block.text]
PROGRAMS: dict[str, tuple[str | Path, str, str]] = {
    "python": (sys.executable, "", next(block.text for block in PAGE.blocks if block.language == "python")),
    "js": (NODE_PROGRAM, ".mjs", next(block.text for block in PAGE.blocks if block.language == "js")),
    "curl": ("bash", "", CURL[0]),
    "ubi": ("bash", "", CURL[1]),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_examples_of_the_page_run(
    audited: AuditedApp,
    in_process_app: tuple[InProcessApp, FastAPI],
    name: str,
    tmp_path: Path,
    unused_tcp_port: int,
) -> None:
    program, suffix, text = PROGRAMS[name]
    script = tmp_path / f"example{suffix}"
    script.write_text(re.sub(r"(127\.0\.0\.1|localhost):8000", f"127.0.0.1:{unused_tcp_port}", text))

    async def run() -> str:
        await in_process_app[0].reconcile()
        server = uvicorn.Server(uvicorn.Config(audited.app, "127.0.0.1", unused_tcp_port, log_level="warning"))
        serving = asyncio.create_task(server.serve())
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        process = await asyncio.create_subprocess_exec(
            program, script, cwd=tmp_path, env={**os.environ, "NO_PROXY": "127.0.0.1"}, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        output, _ = await process.communicate()
        server.should_exit = True
        await serving
        assert process.returncode == 0, output.decode()
        return output.decode()

    output = audited.runner.run(run())
    reported = [row for row in audited.ledger.feedback() if row.caller != AUDITOR]
    assert [row.verdict for row in reported] == ["correct" if name == "python" else "chosen"], output
    if name == "ubi":
        assert json.loads(output) == next(json.loads(block.text) for block in PAGE.blocks if block.language == "json")
