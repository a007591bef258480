"""``ratchet bench vqa``: questions about images per second, and the time to the first token.

Compared on the same cores, with the same model and adapter: Ratchet (HTTP, release protocol, Ray Serve, vLLM), vLLM's
own OpenAI server with the same settings, and transformers' ``generate`` on whole batches without any server. Both
servers run all the time and are asked in turns, so that a slower minute of the machine slows both.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks.chat import ChatRun, closed_loop
from benchmarks.command import bench_parser, show_table
from benchmarks.machine import machine
from benchmarks.vllm_server import vllm_server
from core.artifacts import Artifacts
from core.errors import RatchetError
from core.ledger import Ledger
from core.progress import step, track
from core.settings import Settings
from ratchet_client import Client, data_uri
from ratchet_client.images import decode_image
from serving.app import start
from serving.engines.vlm.generation import GenerationRequest, question
from serving.engines.vlm.vlm_base import VlmBase, load_vlm_base
from tests.support.inputs import pictures, random_adapter

LEVELS = (1, 8, 32)
QUESTIONS = ("what is this?", "which colour is it?", "is there a dog?", "which category is this?")
IMAGES = 16
MAX_TOKENS = 8
WARM_SECONDS = 2.0


def run(settings: Settings, rounds: int = 3, seconds: float = 5.0, levels: Sequence[int] = LEVELS) -> dict[str, Any]:
    """Measure on a new home with the settings' bases. Returns the figures. Raises RatchetError if a base is not
    registered, or a server does not start.
    """
    with tempfile.TemporaryDirectory(prefix="ratchet-bench-") as folder:
        ours, base, name = _settle(settings, Path(folder))
        directory = Artifacts(ours.artifacts).fetch(f"adapters/{name}")
        asked = [(image, text) for image in pictures(IMAGES) for text in QUESTIONS]
        bodies = [_body(image, text) for image, text in asked]
        server = start(ours)
        try:
            server.wait_ready()
            with Client(server.url, ours.operator_key().get_secret_value(), actor="bench") as client:
                client.release(vlm=name, reason="benchmark", force=True)
            with step("starting vLLM's own server"):
                own = vllm_server(base, ours.serve, name, directory, Path(folder) / "vllm.log")
            with own as url:
                sides = {"ratchet": (server.url, "vlm"), "vllm": (url, name)}
                runs = _compare(sides, bodies, levels, rounds, seconds)
        finally:
            server.stop()
        alone = {level: _generate(base, directory, ours, asked, level, seconds) for level in levels}
    return _figures(runs, alone, levels, settings.base.vlm)


def _settle(settings: Settings, home: Path) -> tuple[Settings, VlmBase, str]:
    for name in (settings.base.clip, settings.base.vlm):
        source = settings.home / "bases" / name
        if not name or not source.is_dir():
            raise RatchetError(f"base {name!r} is not in {settings.home}.", "Run `ratchet base build`.")
        shutil.copytree(source, home / "bases" / name)
    serve = settings.serve.model_copy(update={"encoder_replicas": 1, "vlm_engine": "vllm"})
    urls = {"ledger_url": None, "artifacts_url": None, "lake_url": None}
    ours = settings.model_copy(update={"home": home, "serve": serve, **urls})
    base = load_vlm_base(home, settings.base.vlm)
    name = random_adapter(base, home / "random", seed=0, parts=["text"])
    Artifacts(ours.artifacts).put_directory(home / "random", f"adapters/{name}")
    Ledger.open(ours.ledger).register_adapter(
        name, family="vlm", base=base.digest, image_space="", text_space="", meta={"made_by": "ratchet bench"}
    )
    return ours, base, name


def _body(image: bytes, text: str) -> dict[str, Any]:
    content = [{"type": "image_url", "image_url": {"url": data_uri(image)}}, {"type": "text", "text": text}]
    return {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": MAX_TOKENS}


Key = tuple[str, int, bool]
"""Side, concurrency, whether it streams."""


def _compare(
    sides: dict[str, tuple[str, str]], bodies: list[dict[str, Any]], levels: Sequence[int], rounds: int, seconds: float
) -> dict[Key, ChatRun]:
    runs: dict[Key, ChatRun] = {
        (side, level, stream): ChatRun() for side in sides for level in levels for stream in _MODES
    }
    for url, model in sides.values():
        closed_loop(url, [{**body, "model": model} for body in bodies], max(levels), WARM_SECONDS, stream=True)
    turns = [
        (side, level, stream)
        for number in range(rounds)
        for level in levels
        for stream in _MODES
        for side in (list(sides) if number % 2 == 0 else list(reversed(sides)))
    ]
    for key in track(turns, "asking both servers in turns"):
        url, model = sides[key[0]]
        runs[key].add(closed_loop(url, [{**body, "model": model} for body in bodies], key[1], seconds, key[2]))
    return runs


_MODES = (False, True)


def _generate(
    base: VlmBase, directory: Path, settings: Settings, asked: Sequence[tuple[bytes, str]], size: int, seconds: float
) -> dict[str, float]:
    """Transformers and PEFT alone: whole batches of ``size``, preprocessing included, on as many threads as vLLM."""
    import torch
    from peft import PeftModel

    from serving.engines.vlm.prompts import inputs

    torch.set_num_threads(settings.serve.vlm_threads)
    model = PeftModel.from_pretrained(base.build_model(), str(directory)).eval()
    processor = base.processor()

    def timed(asks: Sequence[GenerationRequest], tokens: int) -> float:
        began = time.perf_counter()
        with torch.inference_mode():
            model.generate(**inputs(processor, asks), max_new_tokens=tokens, do_sample=False)
        return time.perf_counter() - began

    asks = [question(np.array(decode_image(image).convert("RGB")), text, MAX_TOKENS) for image, text in asked]
    batches = [[asks[(start + n) % len(asks)] for n in range(size)] for start in range(0, len(asks), size)]
    timed(batches[0], MAX_TOKENS)
    first = float(np.median([timed(batch, 1) for batch in batches[:5]]))
    done, spent = 0, 0.0
    for number in range(10_000):
        spent += timed(batches[number % len(batches)], MAX_TOKENS)
        done += size
        if spent >= seconds:
            break
    return {"rate": done / spent, "first_seconds": first}


def _figures(
    runs: dict[Key, ChatRun], alone: dict[int, dict[str, float]], levels: Sequence[int], base: str
) -> dict[str, Any]:
    figures: dict[str, Any] = {"base": base, "max_tokens": MAX_TOKENS}
    for level in levels:
        ours, theirs = runs["ratchet", level, False], runs["vllm", level, False]
        ours_streamed, theirs_streamed = runs["ratchet", level, True], runs["vllm", level, True]
        figures |= {
            f"ratchet_c{level}": round(ours.rate, 2),
            f"vllm_c{level}": round(theirs.rate, 2),
            f"transformers_c{level}": round(alone[level]["rate"], 2),
            f"ratio_to_vllm_c{level}": round(ours.rate / theirs.rate, 3),
            f"ratio_to_transformers_c{level}": round(ours.rate / alone[level]["rate"], 3),
            f"ratchet_stream_c{level}": round(ours_streamed.rate, 2),
            f"vllm_stream_c{level}": round(theirs_streamed.rate, 2),
            f"stream_ratio_to_vllm_c{level}": round(ours_streamed.rate / theirs_streamed.rate, 3),
            f"first_token_seconds_c{level}": round(ours_streamed.first_seconds, 4),
            f"vllm_first_token_seconds_c{level}": round(theirs_streamed.first_seconds, 4),
            f"transformers_first_token_seconds_c{level}": round(alone[level]["first_seconds"], 4),
        }
    problems = {side: [p for key, made in runs.items() if key[0] == side for p in made.problems] for side in _SIDES}
    figures |= {
        "requests": sum(made.answered for made in runs.values()),
        "failed": len(problems["ratchet"]),
        "vllm_failed": len(problems["vllm"]),
        "different_answers": _different(runs),
        "problems": [*problems["ratchet"][:3], *problems["vllm"][:3]],
        "machine": machine(),
    }
    return figures


_SIDES = ("ratchet", "vllm")


def _different(runs: dict[Key, ChatRun]) -> int:
    answers: dict[int, set[str]] = {}
    for made in runs.values():
        for number, text in made.answers.items():
            answers.setdefault(number, set()).add(text.strip())
    return sum(len(texts) > 1 for texts in answers.values())


def show(figures: dict[str, Any]) -> None:
    table = Table("at once", "", "Ratchet", "vLLM's server", "transformers", "of vLLM", title="Visual questions")
    levels = [int(name.removeprefix("ratchet_c")) for name in figures if name.startswith("ratchet_c")]
    rows: tuple[tuple[str, Callable[[int], tuple[Any, Any, Any, Any]]], ...] = (
        ("answers a second", lambda c: (
            figures[f"ratchet_c{c}"], figures[f"vllm_c{c}"], figures[f"transformers_c{c}"],
            figures[f"ratio_to_vllm_c{c}"])),
        ("streamed, a second", lambda c: (
            figures[f"ratchet_stream_c{c}"], figures[f"vllm_stream_c{c}"], "",
            figures[f"stream_ratio_to_vllm_c{c}"])),
        ("first token, s", lambda c: (
            figures[f"first_token_seconds_c{c}"], figures[f"vllm_first_token_seconds_c{c}"],
            figures[f"transformers_first_token_seconds_c{c}"], "")),
    )  # fmt: skip
    for level in levels:
        for name, cells in rows:
            table.add_row(str(level), name, *(str(cell) for cell in cells(level)))
    show_table(table, figures)


def main(settings: Settings, arguments: Sequence[str]) -> None:
    parser = bench_parser("vqa", __doc__)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each server at each level (3)")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of a turn (5)")
    options = parser.parse_args(arguments)
    show(run(settings, rounds=options.rounds, seconds=options.seconds))
