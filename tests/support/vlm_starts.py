"""The start of a VLM engine, in a process of its own: to be killed, or to answer."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

from core.settings.serving import Serve
from serving.engines.vlm.adapters import golden_requests
from serving.engines.vlm.open import SyncVlm, open_engine
from serving.engines.vlm.vlm_base import load_vlm_base


def start_in_group(home: Path, base: str, environment: dict[str, str], result: Path | None) -> None:
    """Answer into the file ``result``, or without one wait to be killed. Its children are in its process group."""
    os.setsid()
    os.environ.update(environment)
    print(f"started {os.getpid()}", flush=True)
    with SyncVlm(open_engine(load_vlm_base(home, base), Serve(), kind="vllm")) as vlm:
        tokens = [list(reply.tokens) for reply in vlm.replies(golden_requests(), None)]
    if result is None:
        signal.pause()
    else:
        result.write_text(json.dumps(tokens))
