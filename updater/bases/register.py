"""Register open_clip models and Hugging Face VLMs as bases, and keep them in the artifacts for other machines. Only
safetensors are read, and no code that comes with a model is run. A registered base needs no network."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import open_clip.factory
from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model
from safetensors import SafetensorError, safe_open
from torch import nn

from core.artifacts import Artifacts, directory_digest
from core.errors import BaseModelError
from core.progress import progress_log, step
from serving.engines.clip_base import (
    MERGED,
    TEXT_FILES,
    ClipBase,
    base_directory,
    construct,
    list_bases,
    merge_branches,
    save_base,
)
from serving.engines.preprocess import Preprocess
from serving.engines.vlm.vlm_base import VlmBase, save_vlm_base

HUB, LOCAL = "hf-hub:", "local-dir:"
HUB_CONFIG = "open_clip_config.json"
HUB_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "model.safetensors")
_TEXT_KEPT = ("*.json", "*.txt", "*.model")
_VLM_KEPT = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")
"""Files fetched from a hub repository; no pickled weights, no code."""
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def add_base(home: Path | str, name: str, model: str, weights: Path | None = None) -> ClipBase:
    """Register an open_clip model as base ``name`` and return it; registering the same content again is fine.
    ``model``: a built-in name, ``hf-hub:OWNER/NAME``, or ``local-dir:PATH`` with open_clip_config.json and a
    safetensors file. ``weights``: a safetensors file of the whole model; required for built-in names, otherwise it
    replaces the weights of the hub or folder. Raises :class:`BaseModelError`."""
    if weights is not None:
        check_safetensors(Path(weights))
    with tempfile.TemporaryDirectory(prefix="ratchet-base-") as temporary:
        work = Path(temporary)
        with step(f"reading {model}"):
            config, weights_file, text_source = _locate(model, weights)
        model_cfg = copy.deepcopy(config["model_cfg"])
        text_cfg = model_cfg["text_cfg"]
        tokenizer, text_files = _text_side(text_cfg, text_source, work)
        prepared = dict(config.get("preprocess_cfg") or {})
        prepared.setdefault("size", model_cfg["vision_cfg"].get("image_size", 224))
        with step(f"loading {weights_file.name}"):
            built = construct(model_cfg, work)
            _load(built, weights_file, model)
            if merge_branches(built.eval()):
                model_cfg["vision_cfg"][MERGED] = True
        with step(f"writing base {name}"):
            return save_base(
                home,
                name,
                built,
                model_cfg,
                Preprocess.from_json(prepared),
                tokenizer,
                text_files=text_files,
                about={"model": model, "weights": weights_file.name},
            )


def check_safetensors(path: Path) -> None:
    """Raise :class:`BaseModelError` unless ``path`` is a safetensors file with that suffix."""
    if not path.is_file():
        raise BaseModelError(f"There is no weights file {path}.", "Correct --weights.")
    try:
        with safe_open(path, framework="pt") as file:
            file.keys()
    except (SafetensorError, OSError) as error:
        raise BaseModelError(
            f"{path} is not a safetensors file ({error}). Pickle files can run code and are not read.",
            "Convert it where you trust it: safetensors.torch.save_file(torch.load(path, weights_only=True), "
            "'model.safetensors').",
        ) from error
    if path.suffix != ".safetensors":
        raise BaseModelError(f"{path} is not called *.safetensors.", "Rename it.")


def _locate(model: str, weights: Path | None) -> tuple[dict[str, Any], Path, str | None]:
    """Configuration, weights file, and the source of Hugging Face text files if it differs from their own name."""
    if model.startswith(LOCAL):
        folder = Path(model.removeprefix(LOCAL))
        candidates = [folder / n for n in HUB_WEIGHTS] + sorted(folder.glob("*.safetensors"))
        weights_file = weights or next((path for path in candidates if path.is_file()), None)
        if weights_file is None:
            others = [p.name for p in folder.glob("*") if p.suffix in {".bin", ".pt", ".pth"}]
            raise BaseModelError(
                f"{folder} has no safetensors weights" + (f", only {others[0]}." if others else "."),
                "Convert the weights to safetensors, or name a file with --weights.",
            )
        check_safetensors(weights_file)
        return _read_config(folder / HUB_CONFIG), weights_file, str(folder)
    if model.startswith(HUB):
        return _from_hub(model.removeprefix(HUB), weights)
    known = open_clip.get_model_config(model.replace("/", "-"))
    if known is None:
        raise BaseModelError(
            f"open_clip has no model {model!r}.",
            "`python -c 'import open_clip; print(open_clip.list_models())'` lists them; hub names start with hf-hub:.",
        )
    if weights is None:
        raise BaseModelError(
            f"{model} is an architecture without weights.", "Name its safetensors file with --weights."
        )
    return {"model_cfg": known, "preprocess_cfg": published_preprocess(model)}, Path(weights), None


def published_preprocess(model: str) -> dict[str, Any]:
    """Most common preprocessing (mean, deviation, geometry) of the architecture's published checkpoints. A weights file
    does not say how its images were normalised; if checkpoints differ, the choice is reported."""
    fields = ("mean", "std", "interpolation", "resize_mode")
    published = Counter(
        json.dumps({key: config.get(key) for key in fields})
        for config in (get_pretrained_cfg(model, tag) for tag in list_pretrained_tags_by_model(model))
    )
    if not published:
        return {}
    chosen: dict[str, Any] = json.loads(published.most_common(1)[0][0])
    if len(published) > 1:
        progress_log.info(
            f"checkpoints of {model} have {len(published)} different preprocessings; taking mean {chosen['mean']}, "
            f"{chosen['resize_mode']}. If yours differs, register it as hf-hub:NAME or local-dir:FOLDER."
        )
    return chosen


def _from_hub(repository: str, weights: Path | None) -> tuple[dict[str, Any], Path, str | None]:
    from huggingface_hub import hf_hub_download, list_repo_files

    with _fetching(repository, "use local-dir:FOLDER"):
        config = _read_config(Path(hf_hub_download(repository, HUB_CONFIG)))
        if weights is not None:
            return config, weights, repository
        files = set(list_repo_files(repository))
        wanted = next((name for name in HUB_WEIGHTS if name in files), None)
        if wanted is None:
            raise BaseModelError(
                f"{repository} has no safetensors weights.", "Convert them and name the file with --weights."
            )
        return config, Path(hf_hub_download(repository, wanted)), repository


@contextmanager
def _fetching(repository: str, instead: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise BaseModelError(
            f"{repository} cannot be fetched from the hub: {type(error).__name__}: {error}",
            f"Check the name and the network, or download the repository and {instead}.",
        ) from error


def _read_config(path: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(path.read_text())
        missing = {"text_cfg", "vision_cfg", "embed_dim"} - set(value["model_cfg"])
        if missing:
            raise ValueError(f"model_cfg has no {sorted(missing)[0]}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BaseModelError(
            f"{path} is not an open_clip configuration: {error!r}.", "Use a model that open_clip published."
        ) from error
    return value


def _text_side(text_cfg: dict[str, Any], source: str | None, work: Path) -> tuple[dict[str, Any], Path | None]:
    """Tokenizer description, and the folder of the files to copy; points ``text_cfg`` at them."""
    kwargs = dict(text_cfg.get("tokenizer_kwargs") or {})
    tower, vocabulary = text_cfg.get("hf_model_name"), text_cfg.get("hf_tokenizer_name")
    if not tower and not vocabulary:
        return {"kind": "simple", "kwargs": kwargs}, None
    folder = work / TEXT_FILES
    folder.mkdir()
    local = Path(source) if source and Path(source).is_dir() else None
    if local is not None:
        for path in (path for pattern in _TEXT_KEPT for path in local.glob(pattern) if path.name != HUB_CONFIG):
            shutil.copyfile(path, folder / path.name)
    else:
        _fetch_text_files(tower, source or vocabulary or tower, folder)
    if tower:
        text_cfg["hf_model_name"] = TEXT_FILES
    if vocabulary:
        text_cfg["hf_tokenizer_name"] = TEXT_FILES
    described = {
        "kind": "hf",
        "directory": TEXT_FILES,
        # Only Hugging Face towers mask padding; the others learned with its positions.
        "trim": bool(tower),
        "mode": text_cfg.get("tokenizer_mode"),
        "kwargs": kwargs,
    }
    return described, folder


def _fetch_text_files(tower: str | None, vocabulary: str | None, folder: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(vocabulary, trust_remote_code=False).save_pretrained(folder)
        if tower:
            AutoConfig.from_pretrained(tower, trust_remote_code=False).save_pretrained(folder)
    except (OSError, ValueError) as error:
        raise BaseModelError(
            f"The tokenizer {vocabulary!r} cannot be fetched: {error}", "Check the network, or use local-dir:FOLDER."
        ) from error


def _load(model: nn.Module, path: Path, name: str) -> None:
    try:
        open_clip.factory.load_checkpoint(model, str(path), strict=True)
    except (RuntimeError, KeyError, ValueError, AttributeError, StopIteration, SafetensorError) as error:
        # open_clip looks at the first tensor, and ends with StopIteration where there is none
        raise BaseModelError(
            f"{path} does not hold the weights of {name}: {str(error)[:500]}",
            "Use the model name these weights were trained as (mind -quickgelu for OpenAI's).",
        ) from error


def add_vlm(home: Path | str, name: str, source: Path | str) -> VlmBase:
    """Register a Hugging Face VLM as base ``name`` and return it; registering the same content again is fine. Raises
    :class:`BaseModelError`: no such folder or repository, only pickled weights, custom code, weights that are not
    finite, or another base of this name."""
    text = str(source)
    folder = Path(text)
    if text.startswith(HUB):
        from huggingface_hub import snapshot_download

        repository = text.removeprefix(HUB)
        with _fetching(repository, "give its folder"), step(f"fetching {repository}"):
            folder = Path(snapshot_download(repository, allow_patterns=list(_VLM_KEPT)))
    if not folder.is_dir():
        raise BaseModelError(
            f"There is no folder {folder}.", f"Give a folder with config.json, or {HUB}NAME for a model of the hub."
        )
    if not any(folder.glob("*.safetensors")):
        pickled = next((path.name for pattern in _PICKLED for path in sorted(folder.glob(pattern))), None)
        if pickled is not None:
            raise BaseModelError(
                f"{folder} has only pickled weights ({pickled}). Pickle files can run code and are not read.",
                "Convert them where you trust them: load the model and save_pretrained(folder).",
            )
    with step(f"writing base {name}"):
        return save_vlm_base(home, name, folder, about={"model": text})


def push_base(home: Path, name: str, artifacts: Artifacts) -> None:
    """Store a registered base under ``bases/<name>``. The same content again is fine. Raises BaseModelError: there is
    no such base; AdapterError: the name is taken by another base; adapters of one do not fit the other."""
    if name not in list_bases(home):
        raise BaseModelError(
            f"there is no base {name!r} in {home}.", "`ratchet base add` or `ratchet base build` first."
        )
    with step(f"storing base {name}"):
        artifacts.put_directory(base_directory(home, name), f"bases/{name}")


def pull_base(home: Path, name: str, url: str) -> Path:
    """Fetch a base from the artifacts into ``home``, atomically. Raises BaseModelError: it was never pushed, or
    ``home`` has another base of that name."""
    target = base_directory(home, name)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".pull-", dir=target.parent) as temporary:
        artifacts = Artifacts(url, cache=Path(temporary))
        if not artifacts.exists(f"bases/{name}"):
            raise BaseModelError(f"there is no base {name!r} in {artifacts.root}.", f"Run `ratchet base push {name}`.")
        with step(f"fetching base {name}"):
            fetched = artifacts.fetch(f"bases/{name}")
        if target.exists():
            if directory_digest(target) != directory_digest(fetched):
                raise BaseModelError(
                    f"{target} is another base than the one in {artifacts.root}.", "Rename one of them."
                )
            return target
        if artifacts.local is not None:
            fetched = Path(shutil.copytree(fetched, Path(temporary) / "copy"))
        fetched.rename(target)
    return target
