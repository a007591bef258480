"""``ratchet bench chaos``: failures while parts of Ratchet die and their dependencies are down, slow or full."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

from core.settings import Settings

PARTS = {"stream": "benchmarks.stream.chaos", "serving": "benchmarks.serving.chaos"}


def main(settings: Settings, arguments: Sequence[str]) -> None:
    """Run the part that ``--part`` names, with all other flags."""
    parser = argparse.ArgumentParser(prog="ratchet bench chaos", add_help=False)
    parser.add_argument("--part", choices=sorted(PARTS), default="stream")
    options, others = parser.parse_known_args(arguments)
    importlib.import_module(PARTS[options.part]).main(settings, others)
