"""The process that makes HTTP load for :mod:`demo.load.traffic`. Ends when its standard input closes; a line there, a
JSON list of URLs, sets the servers of further requests.

Open loop: requests start on a schedule regardless of earlier answers, and latency counts from the time a request was
*due*. A closed loop (``concurrency`` in the plan) measures capacity instead.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import IO, Any

import httpx

TIMEOUT_SECONDS = 60.0


Request = tuple[str, bytes]


def content(answer: dict[str, Any]) -> Any:
    """The part to compare: vectors (base64) or label probabilities by input, hits (ID, score), or a text."""
    if "choices" in answer:
        return answer["choices"][0]["message"]["content"]
    data = answer["data"]
    if "space" in answer:
        return [[hit["id"], hit["score"]] for hit in data]
    return [item["embedding"] if "embedding" in item else list(item["probabilities"].values()) for item in data]


async def one(client: httpx.AsyncClient, url: str, probe: int, request: Request, due: float, out: IO[str]) -> None:
    """Send one request and write a row about the answer. ``due``: seconds since the epoch."""
    row: dict[str, Any] = {"t": due, "p": probe, "b": time.time()}
    path, body = request
    try:
        answer = await client.post(url + path, content=body)
        row["c"] = answer.status_code
        if answer.status_code == 200:
            row["r"] = int(answer.headers["x-ratchet-release"])
            row["a"] = answer.headers["x-ratchet-adapter"]
            row["y"] = content(answer.json())
        else:
            row["e"] = answer.text[:300]
    except (httpx.HTTPError, ValueError, KeyError) as error:
        row["c"], row["e"] = 0, f"{type(error).__name__}: {error}"
    row["s"] = time.time() - due
    out.write(json.dumps(row) + "\n")


async def drive(plan: dict[str, Any], out: IO[str], stop: asyncio.Event) -> None:
    """Make the load of a plan: ``urls``, ``requests``, ``key``, and either ``rate`` (per second) or ``concurrency``."""
    requests: list[Request] = [(path, body.encode()) for path, body in plan["requests"]]
    limits = httpx.Limits(max_connections=256, max_keepalive_connections=256)
    headers = {"content-type": "application/json"}
    if plan.get("key"):
        headers["authorization"] = f"Bearer {plan['key']}"
    async with httpx.AsyncClient(timeout=TIMEOUT_SECONDS, limits=limits, headers=headers, trust_env=False) as client:
        if plan.get("concurrency"):
            url = plan["urls"][0]
            await asyncio.gather(*(_loop(client, url, requests, k, out, stop) for k in range(plan["concurrency"])))
            return
        running: set[asyncio.Task[None]] = set()
        began, count = time.time(), 0
        while not stop.is_set():
            due = began + count / plan["rate"]
            if (wait := due - time.time()) > 0:
                try:
                    await asyncio.wait_for(stop.wait(), wait)
                    break
                except TimeoutError:
                    pass
            # Every server must get all kinds of requests, whatever both counts are.
            url = plan["urls"][(count + count // len(requests)) % len(plan["urls"])]
            number = count % len(requests)
            task = asyncio.create_task(one(client, url, number, requests[number], due, out))
            running.add(task)
            task.add_done_callback(running.discard)
            count += 1
        await asyncio.gather(*running)


async def _loop(
    client: httpx.AsyncClient, url: str, requests: list[Request], start: int, out: IO[str], stop: asyncio.Event
) -> None:
    count = start
    while not stop.is_set():
        await one(client, url, count % len(requests), requests[count % len(requests)], time.time(), out)
        count += 1


async def main(plan: dict[str, Any], path: Path) -> None:
    """Run until the parent closes the pipe, also by dying."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)

    async def watch() -> None:
        while line := await reader.readline():
            plan["urls"] = json.loads(line)
        stop.set()

    watcher = asyncio.create_task(watch())
    with path.open("w", buffering=1) as out:
        await drive(plan, out, stop)
    watcher.cancel()


if __name__ == "__main__":
    asyncio.run(main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])))
