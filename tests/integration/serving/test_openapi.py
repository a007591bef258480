"""Hundreds of valid and invalid calls (thousands in `make long`) generated from the API's schema: none causes a server
error, and each answer matches the schema.

The application is the real one, in this process without Ray and sockets, so that many calls are possible. For each call
of schemathesis, two more are sent with changed headers, query or body.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx
import jsonschema_rs
import numpy as np
import pytest
import requests
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from pydantic import SecretStr
from schemathesis import Case, GenerationMode

from serving.engines.bridge import bridge_key, dump_bridge
from serving.http.answer_receipts import AnswerReceipts
from tests.support.hostile_images import PLAIN, REFUSED, TAKEN
from tests.support.in_process_app import KEY, InProcessApp

CALLS = 500
KEYED = ("/admin/", "/v1/records")
RIGHT, WRONG = 6, 4
"""Examples of an operation with a body; other operations get half as many."""
ROUNDS = 40
"""Valid examples to try until one gets a result; which are drawn depends on the constants of all imported modules."""
MEANT = {503, 504}
"""Statuses in the schema other than results and 4xx. Any other status from 500 on is a bug of the server."""
FILES = [PLAIN, *(each.data for each in (*TAKEN, *REFUSED) if len(each.data) < 20_000)]
URIS = ["data:image/png;base64," + base64.b64encode(data).decode() for data in FILES]
OTHERS = ["", "http://169.254.169.254/", "https://[::1/", "file:///etc/passwd", "data:;base64,",
          "data:image/png;base64,%"]  # fmt: skip
MODELS = ["clip", "vlm", "clip@1", "vlm@1", "base", "clip@0", "clip-0123456789ab", ""]
NAMES = ["content-type", "accept", "content-length", "x-ratchet-actor", "authorization", "expect", "range", "cookie",
         "transfer-encoding", "content-encoding", "x-forwarded-for", "host", "connection"]  # fmt: skip
VALUES = ["", "0", "-1", "99999999999999999999", "application/json", "application/json; charset=utf-16", "text/plain",
          "multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=x", "gzip", "chunked",
          "Bearer", f"Bearer {KEY}", "Bearer ü", "bytes=0-", "100-continue", "*/*", "a=b; c", "\xff"]  # fmt: skip
QUERIES = ["", "size=64", "size=0", "size=a", "limit=3", "limit=-1", "limit=1e9", "size=1&size=2", "%00", "a" * 300,
           "&&==", "limit=%FF", "model=clip&stream=true", "size=99999999999999999999999"]  # fmt: skip
MAX_URL = 60_000
"""httpx sends nothing longer, and no server accepts it. Fields of an image body are in the query."""


@dataclass(frozen=True)
class Twist:
    """A change to a request on its way."""

    headers: dict[str, str] = field(default_factory=dict)
    query: str = ""
    cut: float = 1.0
    put: bytes = b""


TWISTS = st.builds(
    Twist,
    st.dictionaries(st.sampled_from(NAMES), st.sampled_from(VALUES), max_size=2),
    st.sampled_from(QUERIES),
    st.sampled_from([1.0, 1.0, 0.0, 0.3, 0.9]),
    st.sampled_from([b"", b"\0", b"\xff\xfe", b"]}", b'"\\ud800"', b"[" * 2000, b"\r\n--x--\r\n", b"1e999", b"NaN"]),
)


class AnswerSchema:
    """The schemas of answers, by operation and status."""

    def __init__(self, schema: dict[str, Any]) -> None:
        self._operations = {
            f"{method.upper()} {path}": operation["responses"]
            for path, item in schema["paths"].items()
            for method, operation in item.items()
        }
        self._components = schema["components"]
        self._validators: dict[tuple[str, str], jsonschema_rs.Validator] = {}

    def problem(self, label: str, answer: httpx.Response) -> str:
        """Describe how a JSON answer differs from its schema; empty if it does not."""
        responses = self._operations[label]
        exact = str(answer.status_code)
        status = exact if exact in responses else f"{exact[0]}XX"
        if status not in responses:
            return f"no schema for {exact}"
        key = (label, status)
        if key not in self._validators:
            body = responses[status]["content"]["application/json"]["schema"]
            self._validators[key] = jsonschema_rs.validator_for({"allOf": [body], "components": self._components})
        error = next(iter(self._validators[key].iter_errors(answer.json())), None)
        return "" if error is None else f"{list(error.instance_path)}: {error.message[:300]}"


@dataclass
class Caller:
    """Sends requests to the application and keeps count."""

    runner: asyncio.Runner
    http: httpx.AsyncClient
    schema: AnswerSchema
    counts: dict[str, Counter[int]] = field(default_factory=dict)
    mistakes: list[str] = field(default_factory=list)

    def send(self, case: Case, twists: list[Twist]) -> None:
        made = case.as_transport_kwargs(base_url="http://localhost")
        headers = {**made["headers"], **({"authorization": f"Bearer {KEY}"} if case.path.startswith(KEYED) else {})}
        names = ("method", "url", "params", "data", "json", "files", "cookies")
        plain = requests.Request(headers=headers, **{name: made.get(name) for name in names}).prepare()
        body = plain.body.encode() if isinstance(plain.body, str) else plain.body or b""
        self._send(case, str(plain.url), {**plain.headers}, body)
        for twist in twists:
            twisted = body[: int(len(body) * twist.cut)] + (twist.put if twist.cut < 1 else b"")
            without = {name.lower() for name in twist.headers}
            if len(twisted) != len(body):
                without.add("content-length")
            kept = {name: value for name, value in plain.headers.items() if name.lower() not in without}
            url = f"{plain.url}{'&' if '?' in str(plain.url) else '?'}{twist.query}"
            self._send(case, url, kept | twist.headers, twisted)

    def reached(self, label: str) -> bool:
        return any(status < 300 for status in self.counts.get(label, ()))

    def _send(self, case: Case, url: str, headers: dict[str, str], body: bytes) -> None:
        if len(url) > MAX_URL:
            return
        raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]

        async def ask() -> httpx.Response:
            return await self.http.request(case.method, url, headers=raw, content=body)

        answer = self.runner.run(ask())
        self.counts.setdefault(case.operation.label, Counter())[answer.status_code] += 1
        problem = ""
        if answer.status_code >= 500 and answer.status_code not in MEANT:
            problem = "a mistake of the server"
        elif answer.headers.get("content-type") == "application/json":
            json.loads(answer.content, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
            problem = self.schema.problem(case.operation.label, answer)
        if problem:
            self.mistakes.append(f"{case.method} {url[:300]} {headers} {body[:300]!r}: {answer.status_code}: {problem}")


def teach(in_process_app: InProcessApp) -> None:
    """Register strategies for the formats of our schema: otherwise no generated image would be valid."""
    schemathesis.openapi.format("uri", st.sampled_from(URIS) | st.sampled_from(OTHERS))
    schemathesis.openapi.format("binary", st.sampled_from(FILES) | st.binary(max_size=20))
    schemathesis.openapi.format("model", st.sampled_from(MODELS))
    schemathesis.openapi.format(
        "sample", st.sampled_from([sample.id for sample in in_process_app.samples]) | st.text(max_size=9)
    )
    receipt = AnswerReceipts(SecretStr(KEY)).issue("search", 1, b"", [sample.id for sample in in_process_app.samples])
    schemathesis.openapi.format("answer", st.just(receipt) | st.text(max_size=9))
    spaces = in_process_app.engine.spaces(None)
    schemathesis.openapi.format("space", st.sampled_from([spaces.image, spaces.text]) | st.text(max_size=9))
    identity = dump_bridge(np.eye(in_process_app.engine.base.dim, dtype=np.float32))
    in_process_app.artifacts.write_bytes(bridge_key(spaces.image, spaces.image), identity)
    deletion = in_process_app.ledger.request_deletion(
        "deletion-0", {"source": "nobody's"}, actor="ann", reason="asked to"
    )
    schemathesis.openapi.format("deletion", st.just(deletion.id) | st.text(min_size=1, max_size=9))


@pytest.mark.parametrize("times", [1, pytest.param(14, marks=pytest.mark.long)])
@pytest.mark.timeout(600)
def test_no_call_that_the_schema_describes_is_a_mistake_of_the_server(
    in_process_app: tuple[InProcessApp, FastAPI], runner: asyncio.Runner, capsys: pytest.CaptureFixture[str], times: int
) -> None:
    teach(in_process_app[0])
    described = in_process_app[1].openapi()
    transport = httpx.ASGITransport(in_process_app[1], raise_app_exceptions=False)
    http = httpx.AsyncClient(transport=transport, base_url="http://localhost")
    caller = Caller(runner, http, AnswerSchema(described))
    for found in schemathesis.openapi.from_dict(described).get_all_operations():
        operation = found.ok()
        share = times if operation.body else times / 2
        modes = {GenerationMode.POSITIVE: int(RIGHT * share)}
        if operation.body or operation.query:
            modes[GenerationMode.NEGATIVE] = int(WRONG * share)
        for mode, examples in modes.items():
            strategy = operation.as_strategy(generation_mode=mode)
            quiet = settings(
                max_examples=examples, phases=[Phase.generate], database=None, deadline=None,
                suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            for number in range(1, ROUNDS + 1):
                quiet(seed(number)(given(strategy, st.lists(TWISTS, min_size=2, max_size=2))(caller.send)))()
                if mode is GenerationMode.NEGATIVE or caller.reached(operation.label):
                    break
    total = sum((counts for counts in caller.counts.values()), Counter())
    with capsys.disabled():
        print(f"\n{total.total()} calls: {dict(sorted(total.items()))}")
    assert caller.mistakes == []
    assert total.total() >= CALLS * times
    assert len(caller.counts) == sum(len(calls) for calls in described["paths"].values())
    assert [label for label in caller.counts if not caller.reached(label)] == []
