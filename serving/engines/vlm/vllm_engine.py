"""The VLM engine on vLLM: batched, paged, with many adapters in one batch. The model lives in a process of its own.

Rules that keep every answer that of its own adapter, each the fence around something vLLM does otherwise:

- a name is a digest of content and has one content for ever: vLLM's caches of image features go by name;
- vLLM's integer ids are never used twice, and an adapter is never loaded over another;
- a request names an adapter only when vLLM has confirmed that it is loaded, and vLLM is never asked to hold more than
  it has slots for: an adapter that it must read again, from a directory that went, ends the engine for everybody;
- an adapter is removed when its last request has ended;
- requests for the base run under an adapter whose delta is zero.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from ops.errors import AdapterError, ConfigError
from ops.settings import Serve
from serving.engines.vlm.ask import Ask, AskError, EngineDead, Finish, Piece, Reply
from serving.engines.vlm.base import VlmBase
from serving.engines.vlm.fit import Shapes, linear_shapes, parts_of, read_fitting
from serving.engines.vlm.golden import fingerprint, golden_asks
from serving.engines.vlm.probes import PROBED, ZERO_ID, write_probe
from serving.engines.vlm.vllm_prompts import Prompts
from serving.engines.vlm.vllm_start import child_environment, engine_arguments, import_vllm, slots_of
from serving.engines.vlm.words import Words

ZERO = "zero"
SAME = 1e-4
"""A probe that moves no log-probability by more than this is one that vLLM ignores."""
CLOSE_SECONDS = 5.0
"""What the engine's process gets to end by itself before it is killed."""
_RESTART = "Start a new engine."


@dataclass(eq=False)
class _Resident:
    request: Any
    """vLLM's LoRARequest."""
    users: int = 0
    leaving: bool = False
    idle: asyncio.Event = field(default_factory=asyncio.Event)


class VllmEngine:
    """See :class:`serving.engines.vlm.ask.VlmEngine`."""

    kind: ClassVar[Literal["vllm", "transformers"]] = "vllm"

    def __init__(self, base: VlmBase, serve: Serve) -> None:
        self.base = base
        self.tower_lora = True
        """Whether adapters of the vision tower and the connector are applied; known after :meth:`start`."""
        self._serve = serve
        self._engine: Any = None
        self._prompts: Prompts | None = None
        self._shapes: Shapes = {}
        self._ignored: frozenset[str] = frozenset()
        self._residents: dict[str, _Resident] = {}
        self._ids = itertools.count(ZERO_ID)
        self._requests = itertools.count()
        self._running = 0
        self._changing = asyncio.Lock()
        self._closed = False

    async def start(self) -> None:
        """Start vLLM (5 to 30 s), load the zero adapter, and find out which parts take adapters.

        Raises :class:`ConfigError` for a broken installation, and when the base does not load.
        """
        processor = await asyncio.to_thread(self._start)
        asks = golden_asks()
        self._prompts = Prompts(processor, self._engine.renderer, self._model_type(), self._serve.vlm_context)
        await asyncio.to_thread(self._prompts.check, asks)
        with tempfile.TemporaryDirectory(prefix="ratchet-vlm-") as folder:
            await self._add(ZERO, write_probe(Path(folder) / ZERO, self._shapes, 0.0))
            plain = await self._golden(None)
            ignored = set()
            for part in PROBED:
                shapes = {name: shape for name, shape in self._shapes.items() if self.base.part_of(name) == part}
                if not shapes:
                    continue
                probe = f"probe-{part}"
                await self._add(probe, write_probe(Path(folder) / part, shapes, 0.1))
                if not _differ(plain, await self._golden(probe)):
                    ignored.add(part)
                await self.unload(probe)
        self._ignored = frozenset(ignored)
        self.tower_lora = not ignored

    def _start(self) -> Any:
        import_vllm()
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        processor = self.base.processor()
        self._shapes = linear_shapes(self.base)
        try:
            with child_environment(self._serve):
                arguments = AsyncEngineArgs(**engine_arguments(self.base, self._serve))
                self._engine = AsyncLLM.from_engine_args(arguments)
        except (RuntimeError, ValueError, OSError) as error:
            raise ConfigError(
                f"vLLM does not start with the base {self.base.name!r}: {error}",
                "Set VLLM_LOGGING_LEVEL=INFO to see why, or serve.vlm_engine to transformers.",
            ) from error
        return processor

    async def load(self, name: str, directory: Path) -> None:
        """Make an adapter resident; twice is once."""
        self._alive()
        async with self._changing:
            there = self._residents.get(name)
            if there is not None:
                there.leaving = False
                there.idle.set()
                return
            if len(self._residents) >= slots_of(self._serve):
                raise AdapterError(
                    f"There is no room for {name}: {', '.join(sorted(self._residents))} are resident or still in use.",
                    "Unload one, wait for its last request, or raise serve.rollback_window.",
                )
            files = await asyncio.to_thread(
                read_fitting, self.base, self._shapes, name, directory, self._serve.vlm_max_rank
            )
            unserved = sorted(parts_of(self.base, files) & self._ignored)
            if unserved:
                raise AdapterError(
                    f"Adapter {name} changes the {' and the '.join(unserved)} part, which vLLM does not apply here.",
                    "Train the text part only, or set serve.vlm_engine to transformers.",
                )
            await self._add(name, directory)

    async def _add(self, name: str, directory: Path) -> None:
        from vllm.lora.request import LoRARequest

        request = LoRARequest(name, next(self._ids), str(directory.resolve()))
        try:
            added = await self._engine.add_lora(request)
        except Exception as error:
            self._alive()
            raise AdapterError(f"vLLM refuses the adapter {name}: {error}", "Train a plain LoRA adapter.") from error
        if not added:
            raise AdapterError(f"vLLM did not load the adapter {name}.", "Look at the server's log.")
        self._residents[name] = _Resident(request)

    async def unload(self, name: str) -> None:
        """Forget an adapter when its last request has ended."""
        resident = self._residents.get(name)
        if resident is None or resident.leaving:
            return
        resident.leaving = True
        while resident.users and resident.leaving:
            resident.idle.clear()
            await resident.idle.wait()
        async with self._changing:
            if not resident.leaving or resident.users:
                return  # it was loaded again
            del self._residents[name]
            if not self.trouble():
                await self._engine.remove_lora(resident.request.lora_int_id)

    def resident(self) -> frozenset[str]:
        """Names that requests may use."""
        return frozenset(name for name, one in self._residents.items() if not one.leaving and name != ZERO)

    @contextlib.contextmanager
    def _using(self, adapter: str | None) -> Iterator[Any]:
        """vLLM's request object of a resident adapter, which stays for as long as it is used."""
        self._alive()
        resident = self._residents.get(adapter or ZERO)
        if resident is None or resident.leaving:
            raise AdapterError(
                f"Adapter {adapter} is not resident (resident: {', '.join(sorted(self.resident())) or 'none'}).",
                "Load it first.",
            )
        resident.users += 1
        self._running += 1
        try:
            yield resident.request
        finally:
            self._running -= 1
            resident.users -= 1
            if not resident.users:
                resident.idle.set()

    async def stream(self, ask: Ask, adapter: str | None) -> AsyncIterator[Piece]:
        """Answer piece by piece."""
        with self._using(adapter) as lora:
            (prompt,) = await self._made(ask)
            words = Words(self._tokenizer, ask.stop)
            length, done = len(prompt["prompt_token_ids"]), 0
            outputs = self._outputs(prompt, _sampling(ask, every=True), lora)
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    one = output.outputs[0]
                    tokens, finish = tuple(one.token_ids), _finish(one.finish_reason)
                    text = words.take(tokens, bool(finish))
                    done += len(tokens)
                    finish = "stop" if words.stopped else finish
                    if tokens or finish:
                        yield Piece(text, tokens, _logprobs(one), length, done, finish)
                    if words.stopped:
                        return

    async def reply(self, ask: Ask, adapter: str | None) -> Reply:
        """The whole answer."""
        if ask.stop:
            return await whole(self.stream(ask, adapter))
        with self._using(adapter) as lora:
            (prompt,) = await self._made(ask)
            one = (await self._last(prompt, _sampling(ask, every=False), lora)).outputs[0]
            text = self._tokenizer.decode(one.token_ids, skip_special_tokens=True)
            finish = _finish(one.finish_reason)
            return Reply(text, tuple(one.token_ids), _logprobs(one), len(prompt["prompt_token_ids"]), finish)

    async def score(self, ask: Ask, choices: Sequence[str], adapter: str | None) -> list[float]:
        """Log-probability of each choice: the sum over its tokens and its end."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(
            max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
        )
        with self._using(adapter) as lora:
            (plain,) = await self._made(ask)
            prompts = await self._made(ask, choices)

            async def one(prompt: dict[str, Any]) -> float:
                output = await self._last(prompt, sampling, lora)
                start = len(plain["prompt_token_ids"])
                tokens = prompt["prompt_token_ids"]
                return float(sum(output.prompt_logprobs[i][tokens[i]].logprob for i in range(start, len(tokens))))

            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(prompt)) for prompt in prompts]
            return [task.result() for task in tasks]

    async def golden(self, adapter: str | None) -> str:
        """Answer fixed inputs."""
        return fingerprint(adapter, await self._golden(adapter))

    async def _golden(self, adapter: str | None) -> list[Reply]:
        return [await self.reply(ask, adapter) for ask in golden_asks()]

    def running(self) -> int:
        """Requests inside."""
        return self._running

    def trouble(self) -> str:
        """Why the engine is dead; empty while it lives."""
        if self._closed:
            return "The engine was closed."
        if self._engine is None:
            return "The engine was not started."
        if not self._engine.errored:
            return ""
        manager = self._engine.engine_core.resources.engine_manager
        codes = [p.exitcode for p in getattr(manager, "processes", []) if p.exitcode is not None]
        ended = f" (exit code {codes[0]})" if codes else ""
        return f"vLLM's engine process ended{ended}: its own message is in the log."

    async def close(self) -> None:
        """End it, and every process it started."""
        if self._closed:
            return
        self._closed = True
        if self._prompts is not None:
            self._prompts.close()
        engine, self._engine = self._engine, None
        if engine is not None:
            await asyncio.to_thread(engine.shutdown, timeout=CLOSE_SECONDS)

    def _alive(self) -> None:
        trouble = self.trouble()
        if trouble:
            raise EngineDead(trouble, _RESTART)

    @property
    def _tokenizer(self) -> Any:
        return self._engine.renderer.tokenizer

    def _model_type(self) -> str:
        return str(self._engine.model_config.hf_config.model_type)

    async def _made(self, ask: Ask, answers: Sequence[str] | None = None) -> list[dict[str, Any]]:
        assert self._prompts is not None
        try:
            return await self._prompts.make(ask, answers)
        except ValueError as error:
            raise AskError(f"The request cannot be read: {error}", "Change the messages or the image.") from error

    async def _outputs(self, prompt: dict[str, Any], sampling: Any, lora: Any) -> AsyncIterator[Any]:
        """vLLM's outputs, its errors as ours. Closing it aborts the request inside vLLM."""
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        outputs = self._engine.generate(prompt, sampling, f"r{next(self._requests)}", lora_request=lora)
        try:
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    yield output
        except VLLMClientError as error:
            raise AskError(f"vLLM refuses the request: {error}", "Change the request.") from error
        except (EngineDeadError, EngineGenerateError) as error:
            raise EngineDead(self.trouble() or f"vLLM could not answer: {error!r}", _RESTART) from error

    async def _last(self, prompt: dict[str, Any], sampling: Any, lora: Any) -> Any:
        outputs = self._outputs(prompt, sampling, lora)
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                return output  # FINAL_ONLY: there is one
        raise EngineDead(self.trouble() or "vLLM ended a request without an answer.", _RESTART)


async def whole(pieces: AsyncIterator[Piece]) -> Reply:
    """A stream as one reply."""
    parts = [piece async for piece in pieces]
    return Reply(
        "".join(part.text for part in parts),
        tuple(token for part in parts for token in part.tokens),
        tuple(value for part in parts for value in part.logprobs),
        parts[-1].prompt_tokens,
        parts[-1].finish,
    )


def _sampling(ask: Ask, every: bool) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=max(1, ask.max_tokens),
        temperature=ask.temperature,
        top_p=ask.top_p,
        seed=ask.seed,
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA if every else RequestOutputKind.FINAL_ONLY,
    )


def _logprobs(output: Any) -> tuple[float, ...]:
    flat = output.logprobs
    return tuple(flat.logprobs[start] for start in flat.start_indices) if flat else ()


def _finish(reason: str | None) -> Finish:
    return "" if reason is None else "stop" if reason == "stop" else "length"


def _differ(some: Sequence[Reply], others: Sequence[Reply]) -> bool:
    for one, other in zip(some, others, strict=True):
        if one.tokens != other.tokens:
            return True
        if any(abs(a - b) > SAME for a, b in zip(one.logprobs, other.logprobs, strict=True)):
            return True
    return False
