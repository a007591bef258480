"""Request an embedding four times a second, each on a new connection, until a file exists, and print the failures.

Runs in a pod of the cluster with the standard library alone: ``python - HOST:PORT KEY FILE < load.py``.
"""

from __future__ import annotations

import http.client
import json
import sys
import time
from pathlib import Path

SECONDS_BETWEEN = 0.25
BODY = json.dumps({"model": "clip", "input": ["a red dragon"]})


def ask(host: str, key: str) -> str:
    """Send a request and return an error message; empty if it succeeded."""
    connection = http.client.HTTPConnection(host, timeout=20)
    try:
        headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
        connection.request("POST", "/v1/embeddings", BODY, headers)
        answer = connection.getresponse()
        text = answer.read()
        return "" if answer.status == 200 else f"{answer.status} {text[:120]!r}"
    except (OSError, http.client.HTTPException) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        connection.close()


def main() -> None:
    """Print one line of JSON: ``requests`` and ``failed``, a list of texts."""
    host, key, end = sys.argv[1:]
    asked, failed = 0, []
    while not Path(end).exists():
        asked += 1
        began = time.monotonic()
        problem = ask(host, key)
        if problem:
            failed.append(f"{time.strftime('%H:%M:%S', time.gmtime())} {problem}")
        time.sleep(max(0.0, SECONDS_BETWEEN - (time.monotonic() - began)))
    print(json.dumps({"requests": asked, "failed": failed}))


if __name__ == "__main__":
    main()
