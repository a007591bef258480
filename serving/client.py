"""A small synchronous client of the HTTP API, for the command line, the demo and tests.

>>> with Client("http://127.0.0.1:8000") as client:
...     client.embed(["a red dragon"]).shape
(1, 256)
"""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from types import EllipsisType, TracebackType
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
from pydantic import SecretStr

from ops.errors import RatchetError, ReleaseConflict
from ops.ledger.rows import Family

FAMILIES: tuple[Family, ...] = ("clip", "vlm")


class ServerError(RatchetError):
    """The server refused or failed; ``status`` is the HTTP status, 0 when it could not be reached."""

    def __init__(self, message: str, fix: str = "", status: int = 0) -> None:
        super().__init__(message, fix)
        self.status = status


def data_uri(image: bytes) -> str:
    """An encoded image as the API takes it."""
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


def _error_message(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return answer.text[:300]


class Client:
    """Calls one server. ``operator_key`` is needed for release, rollback, hold and resume."""

    def __init__(
        self, url: str, operator_key: SecretStr | str | None = None, actor: str = "operator", timeout: float = 60.0
    ) -> None:
        headers = {"x-ratchet-actor": actor}
        if operator_key is not None:
            key = operator_key if isinstance(operator_key, str) else operator_key.get_secret_value()
            headers["authorization"] = f"Bearer {key}"
        self.url = url
        self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout, trust_env=False)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def embed(self, inputs: Sequence[str | bytes], model: str = "clip") -> npt.NDArray[np.float32]:
        """Unit vectors float32 [n, dim] of texts (str) and encoded images (bytes)."""
        items = [{"image": data_uri(item)} if isinstance(item, bytes) else item for item in inputs]
        answer = self.post("/v1/embeddings", {"model": model, "input": items, "encoding_format": "base64"})
        rows = [np.frombuffer(base64.b64decode(row["embedding"]), "<f4") for row in answer["data"]]
        return np.stack(rows).astype(np.float32)

    def classify(
        self, images: Sequence[bytes], labels: Sequence[str], templates: Sequence[str] = ("{}",), model: str = "clip"
    ) -> list[dict[str, Any]]:
        """For each image its ``label`` and the ``probabilities``."""
        body = {"images": [data_uri(i) for i in images], "labels": list(labels), "templates": list(templates),
                "model": model}  # fmt: skip
        answer: list[dict[str, Any]] = self.post("/v1/classify", body)["data"]
        return answer

    def search(self, text: str | None = None, image: bytes | None = None, **options: Any) -> list[dict[str, Any]]:
        """Hits, best first. ``options``: k, domain, source, since, until, model."""
        body = {"text": text, "image": data_uri(image) if image is not None else None, **options}
        answer: list[dict[str, Any]] = self.post("/v1/search", body)["data"]
        return answer

    def sample_image(self, sample_id: str, size: int = 256) -> bytes:
        """A sample's image as PNG."""
        return self._send("GET", f"/v1/samples/{sample_id}/image", params={"size": size}).content

    def vqa(
        self, image: bytes, question: str, choices: Sequence[str] | None = None, model: str = "vlm"
    ) -> dict[str, Any]:
        """The ``answer`` to a question about an encoded image; with ``choices`` also their probabilities."""
        body = {"image": data_uri(image), "question": question, "model": model}
        return self.post("/v1/vqa", body if choices is None else {**body, "choices": list(choices)})

    def chat(self, content: str | Sequence[str | bytes], model: str = "vlm", **options: Any) -> dict[str, Any]:
        """One turn of texts (str) and encoded images (bytes); OpenAI's ``chat.completion``, or its options."""
        parts = [content] if isinstance(content, str) else content
        turn = [
            {"type": "image_url", "image_url": {"url": data_uri(part)}}
            if isinstance(part, bytes)
            else {"type": "text", "text": part}
            for part in parts
        ]
        return self.post(
            "/v1/chat/completions", {"model": model, "messages": [{"role": "user", "content": turn}], **options}
        )

    def releases(self, limit: int = 50) -> dict[str, Any]:
        """``live`` and the rows in ``data``, newest first."""
        return self.get("/v1/releases", limit=limit)

    def live(self) -> int:
        """Number of the live release."""
        number: int = self.releases(1)["live"] or 0
        return number

    def status(self) -> dict[str, Any]:
        """Controller, VLM engines and catalog at a glance; needs the key."""
        return self.get("/admin/v1/status")

    def metrics(self) -> str:
        """The server's metrics, as Prometheus scrapes them."""
        return self._send("GET", "/metrics").text

    def release(
        self,
        clip: str | EllipsisType | None = ...,
        reason: str = "",
        expected_live: int | None = None,
        timeout: float = 3600.0,
        *,
        vlm: str | EllipsisType | None = ...,
        share: float = 1.0,
        force: bool = False,
    ) -> dict[str, Any]:
        """Release adapters (None: the base alone; not named: what is live stays); returns when all replicas serve it.

        Args:
            share: of the requests; below 1 a canary, 0 a shadow.
            force: also what no gate passed and was never live.

        >>> client.release(vlm="vlm-0123456789ab", reason="right after all")
        """
        body: dict[str, Any] = {"reason": reason, "expected_live": expected_live, "share": share, "force": force}
        body |= {family: name for family, name in (("clip", clip), ("vlm", vlm)) if name is not ...}
        return self.post("/admin/v1/releases", body, timeout=timeout)

    def promote(self, reason: str, expected_live: int | None = None) -> dict[str, Any]:
        """Let the canary or shadow that is live answer everybody."""
        return self.post("/admin/v1/promote", {"reason": reason, "expected_live": expected_live})

    def rollback(
        self,
        reason: str,
        to: int | None = None,
        expected_live: int | None = None,
        timeout: float = 3600.0,
        *,
        family: Family | None = None,
    ) -> dict[str, Any]:
        """Go back to the newest release with another adapter, or to ``to``; with ``family`` only that adapter."""
        body = {"reason": reason, "to": to, "expected_live": expected_live, "family": family}
        return self.post("/admin/v1/rollback", body, timeout=timeout)

    def hold(self, reason: str) -> None:
        """Let updates wait."""
        self.post("/admin/v1/hold", {"reason": reason})

    def resume(self, reason: str) -> None:
        """Let updates through."""
        self.post("/admin/v1/resume", {"reason": reason})

    def is_ready(self, models: Sequence[Family] = FAMILIES) -> bool:
        """Whether these models answer; the VLM counts where one is served."""
        return not any(map(self.why_not_ready, models))

    def wait_ready(self, seconds: float, models: Sequence[Family] = FAMILIES) -> None:
        """Return when these models answer. Raises ServerError with the server's last answer when it is not in time."""
        end = time.monotonic() + seconds
        last = "nobody listens"
        while time.monotonic() < end:
            last = next(filter(None, map(self.why_not_ready, models)), "")
            if not last:
                return
            time.sleep(0.1)
        raise ServerError(f"{self.url} was not ready within {seconds:.0f} s: {last}", "Look at the server's log.")

    def why_not_ready(self, model: Family) -> str:
        """What keeps a model from answering; empty when nothing does, or when it is a VLM and none is served."""
        try:
            answer = self._http.get(f"/health/ready/{model}", timeout=15.0)
        except httpx.TransportError as error:
            return f"nobody listens ({type(error).__name__})."
        if answer.status_code == 200 or (model == "vlm" and answer.status_code == 404 and "no_vlm" in answer.text):
            return ""
        return _error_message(answer) or f"status {answer.status_code}"

    def get(self, path: str, **query: Any) -> dict[str, Any]:
        """One GET."""
        answer: dict[str, Any] = self._send("GET", path, params=query).json()
        return answer

    def post(self, path: str, body: dict[str, Any], timeout: float | None = None) -> dict[str, Any]:
        """One POST of JSON."""
        options = {} if timeout is None else {"timeout": timeout}
        answer: dict[str, Any] = self._send("POST", path, json=body, **options).json()
        return answer

    def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            answer = self._http.request(method, path, **options)
        except httpx.TransportError as error:
            raise ServerError(f"{self.url} does not answer: {error}", "Is `ratchet serve` running?") from None
        if answer.status_code >= 400:
            message = _error_message(answer)
            if answer.status_code == 409:
                raise ReleaseConflict(message)
            raise ServerError(message, status=answer.status_code)
        return answer
