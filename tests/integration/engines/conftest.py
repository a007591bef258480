"""A tiny base, three adapters, the answers of transformers + PEFT to them, and a real engine of each kind."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
import torch

from core.settings.serving import Serve
from serving.engines.vlm.generation import GenerationRequest
from serving.engines.vlm.open import VlmEngine, open_engine
from serving.engines.vlm.vlm_base import VlmBase
from tests.support.tiny_vlm import tiny_vlm_adapter, tiny_vlm_base
from tests.support.vlm_reference import Peft, Reference, some_asks

SAFE_MARGIN = 3e-3
"""Every correct engine makes the same greedy choice when its margin is at least this."""
PARTS = (("text",), ("text", "image", "connector"), ("image", "connector"))


@dataclass
class VlmCases:
    """Requests and their expected answers."""

    base: VlmBase
    directories: dict[str, Path]
    """By name, in the order of :data:`PARTS`."""
    asks: list[GenerationRequest]
    references: dict[str | None, list[Reference]]
    models: dict[str | None, Peft]

    @property
    def names(self) -> list[str]:
        return list(self.directories)


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> VlmCases:
    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("vlm")
    base = tiny_vlm_base(home)
    directories = {}
    for seed, parts in enumerate(PARTS, 1):
        directory = home / f"adapter-{seed}"
        directories[tiny_vlm_adapter(base, directory, seed, parts=parts)] = directory
    models: dict[str | None, Peft] = {None: Peft(base)}
    models |= {name: Peft(base, directory) for name, directory in directories.items()}
    asks = some_asks(16)
    answers = {name: [model.greedy(ask) for ask in asks] for name, model in models.items()}
    # Tests that look for mixed-up adapters see one only if no two of them give the same answer.
    kept = [
        i
        for i in range(len(asks))
        if all(answers[name][i].margin > SAFE_MARGIN for name in models)
        and len({answers[name][i].tokens for name in models}) == len(models)
    ]
    assert len(kept) >= 6
    references = {name: [answers[name][i] for i in kept] for name in models}
    return VlmCases(base, directories, [asks[i] for i in kept], references, models)


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["vllm", "transformers"])
async def engine(request: pytest.FixtureRequest, cases: VlmCases) -> AsyncIterator[VlmEngine]:
    engine = open_engine(cases.base, Serve(vlm_batch=8), kind=request.param)
    await engine.start()
    yield engine
    await engine.close()
