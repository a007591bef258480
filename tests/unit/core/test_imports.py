"""Imports without what they would bring along."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from core.imports import hidden, replaced

LEAVES_OUT = """
import sys
from serving.engines.clip_base import import_open_clip
import_open_clip({"vision_cfg": {}, "text_cfg": {}})
print(*sorted({"transformers", "timm", "torch._dynamo"} & set(sys.modules)))
import torch
print(torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item())
"""


def test_open_clip_comes_without_the_libraries_of_other_towers_and_torchs_compiler_later_works() -> None:
    done = subprocess.run([sys.executable, "-c", LEAVES_OUT], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.splitlines() == ["", "2.0"], done.stderr


WITH_TIMM = """
from serving.engines.clip_base import import_open_clip
import_open_clip({"vision_cfg": {"timm_model_name": "resnet18"}, "text_cfg": {}})
from open_clip.timm_model import TimmModel
print(TimmModel("resnet18", 64).trunk.__class__.__name__)
"""


def test_a_tower_of_timm_is_built_after_it() -> None:
    done = subprocess.run([sys.executable, "-c", WITH_TIMM], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "ResNet\n", done.stderr


def test_a_module_is_hidden_or_replaced_inside_the_block_alone() -> None:
    sys.modules.pop("this", None)
    with hidden("this"), pytest.raises(ImportError):
        importlib.import_module("this")
    with replaced("this", answer=42):
        from this import answer  # type: ignore[attr-defined]

        assert answer == 42
    assert "this" not in sys.modules
    with replaced("json", answer=42):
        import json

        assert not hasattr(json, "answer")
