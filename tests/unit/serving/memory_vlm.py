"""An in-memory VLM engine that implements the engine protocol and answers with its adapter's name."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from core.errors import AdapterError
from serving.engines.vlm.generation import GenerationRequest, GenerationResult, TokenChunk, whole
from serving.errors import EngineDead, InvalidRequest


@dataclass
class MemoryVlm:
    """Holds at most ``most`` adapters. ``gate`` delays answers; ``bad`` adapters fail golden inputs."""

    most: int = 4
    kind: Literal["vllm", "transformers"] = "transformers"
    precision = "float32"
    base: Any = field(default_factory=lambda: SimpleNamespace(name="memory"))
    names: set[str] = field(default_factory=set)
    bad: set[str] = field(default_factory=set)
    loads: list[str] = field(default_factory=list)
    gate: asyncio.Event | None = None
    dead: str = ""
    inside: int = 0
    passed_at: float = 0.0

    async def start(self) -> None:
        pass

    async def load(self, name: str, directory: Path) -> None:
        if not (directory / "adapter_model.safetensors").is_file():
            raise AdapterError(f"{directory} is no adapter directory.")
        if len(self.names) >= self.most:
            raise AdapterError(f"there is no room for {name}.")
        await asyncio.sleep(0)
        self.names.add(name)
        self.loads.append(name)

    async def unload(self, name: str) -> None:
        await asyncio.sleep(0)
        self.names.discard(name)

    def resident(self) -> frozenset[str]:
        return frozenset(self.names)

    async def stream(self, ask: GenerationRequest, adapter: str | None) -> AsyncIterator[TokenChunk]:
        words = self._words(ask, adapter)
        self.inside += 1
        try:
            for index, word in enumerate(words):
                if self.gate is not None:
                    await self.gate.wait()
                if self.dead:
                    raise EngineDead(self.dead)
                last = index == len(words) - 1
                yield TokenChunk(word, (index,), (-0.5,), 7, index + 1, "stop" if last else "")
        finally:
            self.inside -= 1

    async def reply(self, ask: GenerationRequest, adapter: str | None) -> GenerationResult:
        return await whole(self.stream(ask, adapter))

    async def score(self, ask: GenerationRequest, choices: Sequence[str], adapter: str | None) -> list[float]:
        self._words(ask, adapter)
        return [-float(len(choice)) for choice in choices]

    async def golden(self, adapter: str | None) -> str:
        if adapter in self.bad:
            raise AdapterError(f"{adapter}: log-probabilities are not finite.")
        return f"golden-{adapter}"

    def running(self) -> int:
        return self.inside

    def last_error(self) -> str:
        return self.dead

    async def close(self) -> None:
        self.dead = "closed"

    def _words(self, ask: GenerationRequest, adapter: str | None) -> list[str]:
        if self.dead:
            raise EngineDead(self.dead)
        if adapter is not None and adapter not in self.names:
            raise AdapterError(f"{adapter} is not resident.")
        if ask.max_tokens > 100:
            raise InvalidRequest("too many tokens.", "Ask for fewer.")
        return [adapter or "base", " ", "says", " ", "yes"]
