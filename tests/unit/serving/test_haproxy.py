"""HAProxy's configuration, and how the real program behaves with it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import socket
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE
from starlette.types import Scope

from core.settings.serving import Serve
from serving.http.client_address import came_from_here
from serving.http.request_ids import ALPHABET, MAX_CHARS
from serving.ray import ray_session
from serving.ray.haproxy import REQUEST_ID, add_limits, close_binds
from serving.ray.ray_session import front_limits, haproxy_binary, write_launcher

BINARY = haproxy_binary()
pytestmark = pytest.mark.skipif(BINARY is None, reason="needs HAProxy")

RAYS = """\
global
    maxconn 1000
defaults
    mode http
    timeout connect 5s
    timeout client 3600s
    timeout http-keep-alive 90s
    option abortonclose
    option splice-request
    option redispatch 1
    retry-on conn-failure
    errorfile 503 /nowhere/500.http
frontend prometheus
    bind :{metrics}
    mode http
    no log
frontend http_frontend
    bind 127.0.0.1:{port}
    default_backend app
backend app
    balance leastconn
    http-reuse always
    default-server inter 1h fall 2 rise 2
    {gone}
    server one 127.0.0.1:{app} {backup}
"""
"""The sections of Ray's template that matter."""


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


@dataclass
class Front:
    """HAProxy in front of an application that answers 200 and records the headers."""

    port: int
    requests: list[str] = field(default_factory=list)
    late: asyncio.Event = field(default_factory=asyncio.Event)
    """``/admin/late`` is answered after this."""
    dying: bool = False
    """Whether the next request is read, and not answered."""
    listener: asyncio.Server | None = None

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                self.requests.append((await reader.readuntil(b"\r\n\r\n")).decode())
                if " /slow " in self.requests[-1]:
                    await reader.read()
                if " /admin/late " in self.requests[-1]:
                    await self.late.wait()
                if self.dying:
                    self.dying = False
                    writer.close()
                    return
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")

    async def send(self, data: bytes, source: str = "127.0.0.1") -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, local_addr=(source, 0))
        try:
            writer.write(data)
            return await reader.read(4096)
        finally:
            writer.close()


@contextlib.asynccontextmanager
async def front(
    folder: Path,
    gone: int = 0,
    header_ms: int = 10_000,
    probes_per_second: int = 50,
    per_address: int = 512,
    **serve: object,
) -> AsyncIterator[Front]:
    """``gone``: replicas that refuse connections, before Serve's own proxy, which is otherwise the only backend."""
    assert BINARY is not None
    port, metrics, app, *nobody = free_ports(3 + gone)
    watched = "check observe layer4 error-limit 3 on-error mark-down"
    lines = "\n    ".join(f"server gone{n} 127.0.0.1:{each} {watched}" for n, each in enumerate(nobody))
    config = folder / "haproxy.cfg"
    config.write_text(RAYS.format(port=port, metrics=metrics, app=app, gone=lines, backup="backup" if gone else ""))
    made = Front(port)
    made.listener = server = await asyncio.start_server(made.answer, "127.0.0.1", app)
    launcher = write_launcher(
        folder, BINARY,
        front_limits(Serve(**serve))
        | {"header_ms": header_ms, "probes_per_second": probes_per_second, "per_address": per_address},
    )  # fmt: skip
    process = subprocess.Popen([launcher, "-db", "-f", config], stderr=subprocess.PIPE)
    try:
        while True:
            with contextlib.suppress(OSError):
                (await asyncio.open_connection("127.0.0.1", port))[1].close()
                break
            assert process.poll() is None, process.stderr and process.stderr.read()
            await asyncio.sleep(0.01)
        yield made
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        server.close()


def get(path: str = "/v1/models", *headers: str) -> bytes:
    return "\r\n".join([f"GET {path} HTTP/1.1", "Host: localhost", *headers, "", ""]).encode()


def post(path: str, length: int) -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n".encode()


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ")[1])


def error_of(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head.lower()
    return status_of(answer), str(json.loads(body)["error"]["code"])


def request_ids(data: bytes | str) -> list[str]:
    text = data if isinstance(data, str) else data.decode()
    return [line.split(": ")[1] for line in text.split("\r\n") if line.lower().startswith("x-request-id:")]


async def test_headers_and_bodies_that_do_not_come_are_408_before_the_application_sees_them(tmp_path: Path) -> None:
    async with front(tmp_path, header_ms=300, idle_seconds=5) as server:
        cut, late, later, whole = await asyncio.gather(
            *map(server.send, (b"GET /v1/mod", post("/", 5) + b"ab", post("/", 5), post("/", 2) + b"ab"))
        )
        assert [status_of(answer) for answer in (cut, late, later, whole)] == [408, 408, 408, 200]
        assert error_of(late) == (408, "request_timeout")
        (first,), (second,) = map(request_ids, (late, later))
        assert first != second, "answers of HAProxy itself have an ID"
        assert len(server.requests) == 1


async def test_a_hanging_replica_is_given_up_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_session, "ANSWER_GRACE_SECONDS", 0.2)
    async with front(tmp_path, deadline_seconds=0.2) as server, asyncio.timeout(50):
        operators = asyncio.create_task(server.send(get("/admin/late")))
        assert error_of(await server.send(get("/slow"))) == (504, "deadline_exceeded")
        server.late.set()
        assert status_of(await operators) == 200


async def test_without_a_replica_it_answers_with_an_error_object_of_its_own(tmp_path: Path) -> None:
    async with front(tmp_path) as server:
        assert server.listener is not None
        server.listener.close()
        away = await server.send(get())
    assert error_of(away) == (503, "unavailable")
    assert b"retry-after: 1" in away.lower()


async def test_an_address_has_a_bound_of_connections_and_the_others_have_theirs(tmp_path: Path) -> None:
    async with front(tmp_path, per_address=5) as server:
        open_ones = []
        with contextlib.suppress(ConnectionError):
            for _ in range(30):
                reader, writer = await asyncio.open_connection("127.0.0.1", server.port, local_addr=("127.0.0.2", 0))
                writer.write(get())
                if not await reader.read(100):
                    writer.close()
                    break
                open_ones.append(writer)
        assert len(open_ones) == 5
        assert status_of(await server.send(get())) == 200
        for writer in open_ones:
            writer.close()


async def test_probes_of_one_address_are_bounded_and_other_requests_are_not(tmp_path: Path) -> None:
    async with front(tmp_path, probes_per_second=3) as server:
        probes = [await server.send(get("/health/ready", "x-request-id: mine"), "127.0.0.2") for _ in range(40)]
        refused = next(answer for answer in probes if status_of(answer) != 200)
        assert error_of(refused) == (429, "rate_limited")
        assert b"retry-after: 1" in refused.lower() and request_ids(refused) == ["mine"]
        others = [await server.send(get(), "127.0.0.2") for _ in range(10)]
        assert {status_of(answer) for answer in [*others, await server.send(get("/health/ready"))]} == {200}


async def test_only_what_changes_nothing_is_asked_again_when_a_replica_dies(tmp_path: Path) -> None:
    async with front(tmp_path) as server:
        for request, times in ((post("/v1/embeddings", 0), 2), (get(), 2), (post("/admin/v1/rollback", 0), 1)):
            server.dying, before = True, len(server.requests)
            answer = await server.send(request)
            assert len(server.requests) - before == times, request
            assert (b"200 OK" in answer) == (times > 1), request


async def test_where_all_replicas_are_gone_serves_own_proxy_is_asked(tmp_path: Path) -> None:
    async with front(tmp_path, gone=3) as server:
        assert status_of(await server.send(get())) == 200


@pytest.mark.parametrize(("trusted", "forwarded"), [([], ["127.0.0.2"]), (["127.0.0.2"], ["192.0.2.1", "127.0.0.2"])])
async def test_earlier_hops_are_of_trusted_proxies(tmp_path: Path, trusted: list[str], forwarded: list[str]) -> None:
    async with front(tmp_path, trusted_proxies=trusted) as server:
        await server.send(get("/", "X-Forwarded-For: 192.0.2.1"), "127.0.0.2")
        sent = [line.lower().split(": ") for line in server.requests[0].split("\r\n")]
        lines = [value for name, *values in sent if name == "x-forwarded-for" for value in values]
    assert lines == forwarded


async def test_what_another_proxy_forwards_is_known_as_such_behind_it(tmp_path: Path) -> None:
    """nginx on this machine, as documented and as installed; its address is that of a local caller."""
    old = b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n"
    async with front(tmp_path) as server:
        for data in (get("/"), get("/", "X-Forwarded-For: 198.51.100.7"), old):
            await server.send(data)
    assert [came_from_here(scope_of(each)) for each in server.requests] == [True, False, False]


def scope_of(request: str) -> Scope:
    first, *lines = request.strip().split("\r\n")
    headers = [tuple(part.strip().encode() for part in line.lower().split(":", 1)) for line in lines]
    return {"type": "http", "http_version": first[-3:], "headers": headers, "client": ("127.0.0.1", 1)}


async def test_a_request_keeps_its_id_if_it_is_sane_and_the_answer_has_it_once(tmp_path: Path) -> None:
    sane = ("0f8fad5b-d9cb.Root=1~a:b@c/d+e", "a" * 128)
    async with front(tmp_path) as server:
        for sent in (None, *sane, "a" * 129, "two words", "<b>", "a, b", "", "ü"):
            headers = [] if sent is None else [f"X-Request-Id: {sent}"]
            (answered,) = request_ids(await server.send(get("/v1/models", *headers)))
            assert request_ids(server.requests[-1]) == [answered]
            assert (answered == sent) == (sent in sane)
            assert re.fullmatch(REQUEST_ID, answered)
    assert f"^[{ALPHABET}]{{1,{MAX_CHARS}}}$" == REQUEST_ID, "the application takes the same ones"


def test_a_frontend_for_other_machines_stays_open_and_rays_pages_do_not() -> None:
    """``serve.host: 0.0.0.0``, as in a container."""
    values = {"frontend_host": "*", "frontend_port": "8000", "metrics_port": "9101"}
    rays = re.sub(r"{{ config\.(\w+) }}", lambda match: values.get(match[1], match[0]), HAPROXY_CONFIG_TEMPLATE)
    assert re.findall(r"bind \*?:\d+", rays) == ["bind :9101", "bind *:8000"]
    assert re.findall(r"bind ([\d.*]*:\d+)", close_binds(rays)) == ["127.0.0.1:9101", "*:8000"]


def test_rays_own_template_has_the_sections_that_are_corrected() -> None:
    limits = front_limits(Serve(idle_seconds=7))
    text = add_limits(HAPROXY_CONFIG_TEMPLATE, limits)
    head = text.index("frontend http_frontend")
    assert head < text.index("option http-buffer-request") < text.index("# Per-backend path ACLs")
    assert re.findall(r"^\s*(timeout .*\dm?s|retry-on .*|retries .*)$", text, re.MULTILINE) == [
        "timeout connect 250ms", "timeout client 7000ms", "timeout http-request 10000ms",
        "timeout http-keep-alive 7000ms", "timeout server 40000ms", "retry-on conn-failure empty-response", "retries 3",
    ], "and none of Ray's own"  # fmt: skip
    assert set(re.findall(r"error-limit (.*?) on-error", text)) == {"1"}
    assert "errorfile" not in text
    assert "status 404" not in text
    assert add_limits("global\n", limits) == "global\n"
