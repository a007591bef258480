"""Requests, expected answers and a JSON report, shared by the scripts of the Python clients.

The environment names the server (``RATCHET_CLIENT_URL``) and a file (``RATCHET_CONTRACT``) with the requests and the
answers that plain HTTP got. A script runs all of its checks, even after a failure, and prints one JSON object:
``passed`` or a traceback under the name of each check.
"""

from __future__ import annotations

import base64
import json
import os
import runpy
import struct
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

URL = os.environ["RATCHET_CLIENT_URL"] + "/v1"
CONTRACT: dict[str, Any] = json.loads(Path(os.environ["RATCHET_CONTRACT"]).read_text())
KEY = "none"
TEXTS: list[str] = CONTRACT["texts"]
IMAGE: str = CONTRACT["image"]
QUESTION: str = CONTRACT["question"]
SHORT: int = CONTRACT["short"]
"""The one length, below the full one, that the server allows for vectors."""
MAX_TOKENS: int = CONTRACT["max_tokens"]
WRONG_KEY: str = CONTRACT["wrong_key"]
LIMITED_KEY = os.environ["RATCHET_LIMITED_KEY"]
"""Of a key limited to one request a minute."""
PARTS = [{"type": "image_url", "image_url": {"url": IMAGE}}, {"type": "text", "text": QUESTION}]
MESSAGES = [{"role": "user", "content": PARTS}]
DEFAULTS: dict[str, Any] = {
    "n": 1, "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}, "tools": [], "tool_choice": "none",
    "response_format": {"type": "text"}, "parallel_tool_calls": True, "store": False, "metadata": {"run": "7"},
    "service_tier": "auto", "modalities": ["text"], "reasoning_effort": "none", "verbosity": "medium", "user": "ann",
    "prompt_cache_key": "k", "safety_identifier": "s", "logprobs": False, "max_completion_tokens": MAX_TOKENS,
    "temperature": 0,
}  # fmt: skip
"""Optional fields of OpenAI's chat call, set to values that change nothing."""
COLOURS = ["red", "blue"]
SCHEMA: dict[str, Any] = {
    "title": "color", "type": "object", "properties": {"name": {"type": "string", "enum": COLOURS}},
    "required": ["name"], "additionalProperties": False,
}  # fmt: skip
STRUCTURED: bool = CONTRACT["structured"]
"""Whether the server's engine can make answers follow a schema."""
SCHEMA_TOKENS = 60
CHAT_NULLS = dict.fromkeys(
    [*DEFAULTS, "seed", "stop", "stream", "stream_options", "top_p", "top_logprobs", "max_tokens", "audio",
     "prediction", "web_search_options", "functions", "function_call"]
)  # fmt: skip
EMBEDDING_NULLS = dict.fromkeys(["encoding_format", "dimensions", "user"])

_results: dict[str, str] = {}


def check(function: Callable[[], None]) -> Callable[[], None]:
    try:
        function()
        _results[function.__name__] = "passed"
    except BaseException:  # an exit also fails this check
        _results[function.__name__] = traceback.format_exc(limit=-6)
    return function


@check
def run_snippet() -> None:
    runpy.run_path(os.environ["RATCHET_SNIPPET"], run_name="__main__")


def report() -> None:
    print("\n" + json.dumps(_results))


def defaults_but(*names: str) -> dict[str, Any]:
    return {name: value for name, value in DEFAULTS.items() if name not in names}


def assert_vectors(vectors: Sequence[Sequence[float] | str]) -> None:
    """Compare vectors, as numbers or in base64, with those that plain HTTP got for :data:`TEXTS`."""
    rows = [decoded(row) if isinstance(row, str) else list(row) for row in vectors]
    assert len(rows) == len(TEXTS), len(rows)
    for row, expected in zip(rows, CONTRACT["vectors"], strict=True):
        assert max(abs(a - b) for a, b in zip(row, expected, strict=True)) < 1e-4


def assert_short(rows: Sequence[Sequence[float]]) -> None:
    """Compare vectors of :data:`SHORT` numbers with the beginnings of plain HTTP's, scaled to unit length."""
    assert len(rows) == len(TEXTS), len(rows)
    for row, whole in zip(rows, CONTRACT["vectors"], strict=True):
        norm = sum(number**2 for number in whole[:SHORT]) ** 0.5
        assert max(abs(a - b / norm) for a, b in zip(row, whole[:SHORT], strict=True)) < 1e-4


def decoded(text: str) -> list[float]:
    """Decode little-endian float32 from base64."""
    raw = base64.b64decode(text)
    return list(struct.unpack(f"<{len(raw) // 4}f", raw))


def assert_answer(text: object, usage: Any = None) -> None:
    """Compare an answer, and its usage if given, with what plain HTTP got."""
    assert text == CONTRACT["answer"], text
    if usage is not None:
        expected: dict[str, int] = CONTRACT["usage"]
        found = (usage.prompt_tokens, usage.completion_tokens)
        assert found == (expected["prompt_tokens"], expected["completion_tokens"]), found


def assert_ranked(rows: Sequence[tuple[int, float]], n: int | None = None) -> None:
    """Compare the first ``n`` documents (index, score) of :data:`TEXTS` for the first of them with plain HTTP's."""
    expected: list[list[float]] = CONTRACT["ranked"][:n]
    assert [index for index, _ in rows] == [index for index, _ in expected], rows
    assert all(abs(score - other) < 1e-3 for (_, score), (_, other) in zip(rows, expected, strict=True)), rows


def assert_structured(text: str) -> None:
    """An answer by :data:`SCHEMA`."""
    assert json.loads(text).keys() == {"name"} and json.loads(text)["name"] in COLOURS, text


def assert_wait(seconds: str) -> None:
    assert 1 <= int(seconds) <= 60, seconds


def raised(kind: type[BaseException], call: Callable[[], object]) -> Any:
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__} was raised")
