"""Bases: frozen CLIP checkpoints, each a self-contained directory ``home/bases/<name>``. Loading a base downloads
nothing; ``updater.bases`` registers them.

    base.json           model configuration, preprocessing, tokenizer, digest of every tensor
    model.safetensors   weights and persistent buffers, float32
    text/               Hugging Face tokenizer and config files, for towers that need them
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from core.digests import digest12, digest_json, digest_tensor
from core.errors import BaseModelError
from core.files import folder_next_to
from core.imports import hidden, replaced

if TYPE_CHECKING:  # most processes read only descriptions, and importing torch takes two seconds
    from torch import nn

    from serving.engines.preprocess import Preprocess
    from serving.engines.tokens import Tokenizer

Base = TypeVar("Base")
FORMAT = 1
WEIGHTS = "model.safetensors"
DESCRIPTION = "base.json"
TEXT_FILES = "text"
"""Folder in a base directory with Hugging Face files of the tokenizer and the text tower."""
Tower = Literal["image", "text"]
MERGED = "branches_merged"
"""Key of a vision configuration, true after :func:`merge_branches`."""
_OUTSIDE = ("logit_scale", "logit_bias")
"""Parameters that only scale logits and change no vector."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Spaces:
    """IDs (12 hex digits) of the two embedding spaces of a base or adapter: vectors of equal IDs can be compared. An
    image space is the digest of the image tower's weights (with buffers), the adapter's changes to them, preprocessing
    and dimension; a text space that of everything else behind a text vector. An unchanged tower keeps its space."""

    image: str
    text: str


def tower_of(name: str) -> Tower | None:
    """The tower that owns a tensor or module of an open_clip model; None for logit scale and bias."""
    if name in _OUTSIDE:
        return None
    return "image" if name.split(".", 1)[0] == "visual" else "text"


@dataclass(frozen=True)
class ClipBase:
    """A registered base. Holds no weights; :meth:`build_model` reads them."""

    family: ClassVar[str] = "clip"

    name: str
    directory: Path
    digest: str
    """64 hex digits over weights, architecture, preprocessing and tokenizer."""
    model_cfg: dict[str, Any]
    """open_clip's model configuration; its ``hf_model_name`` is a folder inside ``directory``."""
    preprocess: Preprocess
    context_length: int
    dim: int
    lora_targets: dict[str, str]
    """Regular expressions over module names (PEFT full match) for ``image`` and ``text``."""
    tokenizer_cfg: dict[str, Any]
    tokenizer_digest: str
    tensors: dict[str, str] = field(repr=False)
    """SHA-256 of every tensor by name."""
    weights_bytes: int
    about: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def spaces(self) -> Spaces:
        return self.spaces_with({})

    def spaces_with(self, changed: Mapping[str, str]) -> Spaces:
        """Spaces after an adapter changes weights. ``changed``: digest of the change by weight name."""
        digests = self.tensors | {name: digest_json([self.tensors[name], how]) for name, how in changed.items()}

        def tower(which: Tower, how: Mapping[str, object]) -> str:
            weights = {name: digest for name, digest in digests.items() if tower_of(name) == which}
            return digest12(digest_json({"weights": weights, "how": how, "dim": self.dim}))

        text = {"tokenizer": self.tokenizer_digest, "context_length": self.context_length}
        return Spaces(tower("image", self.preprocess.to_json()), tower("text", text))

    def build_model(self) -> nn.Module:
        """Build the model: ``eval`` mode, float32, no gradients, weights memory-mapped from the directory. Raises
        :class:`BaseModelError` when files are missing, truncated or of another model."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        from serving.engines.layers import SkipInit

        path = self.directory / WEIGHTS
        if not path.is_file() or path.stat().st_size != self.weights_bytes:
            state = f"has {path.stat().st_size} bytes" if path.is_file() else "is missing"
            raise BaseModelError(
                f"Base {self.name!r}: {path} {state}, expected {self.weights_bytes}.",
                "Remove the directory and run `ratchet base build` (or `ratchet base add`) again.",
            )
        with SkipInit():
            model = construct(self.model_cfg, self.directory)
        try:
            model.load_state_dict(load_file(path), strict=True, assign=True)
        except (RuntimeError, SafetensorError) as error:
            raise BaseModelError(
                f"Base {self.name!r}: the weights in {path} do not fit its configuration: {error}",
                "Remove the directory and register the base again.",
            ) from error
        return model.eval().requires_grad_(False)

    def tokenizer(self) -> Tokenizer:
        """``list[str]`` -> ``int64 [n, at most context_length]``, trimmed to the longest text where the tower can."""
        from serving.engines.tokens import make_tokenizer

        return make_tokenizer(self.tokenizer_cfg, self.directory, self.context_length)


def base_directory(home: Path | str, name: str) -> Path:
    """``home/bases/<name>``; raises :class:`BaseModelError` for names that could leave that folder."""
    if not _NAME.fullmatch(name):
        raise BaseModelError(
            f"{name!r} is not a name for a base.", "Use letters, digits, dot, dash, underscore; at most 64."
        )
    return Path(home) / "bases" / name


def load_base(home: Path | str, name: str) -> ClipBase:
    """Load the registered base ``name``. Raises :class:`BaseModelError` when it is missing or damaged."""
    from serving.engines.preprocess import Preprocess

    return load_described(home, name, ClipBase, preprocess=Preprocess.from_json)


def load_described(home: Path | str, name: str, kind: type[Base], **read: Callable[[Any], Any]) -> Base:
    """Load a registered base of class ``kind``. ``read``: converters of fields. Raises :class:`BaseModelError`."""
    described: Any = kind
    directory = base_directory(home, name)
    path = directory / DESCRIPTION
    if not path.is_file():
        raise BaseModelError(
            f"There is no base {name!r} in {directory.parent}.",
            "Make the shipped ones with `ratchet base build`, or register one with `ratchet base add`.",
        )
    try:
        value = json.loads(path.read_text())
        if value.get("family", "clip") != described.family:
            fix = f"Set base.{described.family} to another one (`ratchet base list`)."
            raise BaseModelError(f"Base {name!r} is not a {described.family.upper()}.", fix)
        if value["format"] != FORMAT:
            raise ValueError(f"format {value['format']} is not {FORMAT}")
        plain = {each.name: value[each.name] for each in fields(described) if each.name not in ("name", "directory")}
        made = {key: convert(value[key]) for key, convert in read.items()}
        base: Base = described(**plain | made, name=name, directory=directory)
        return base
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BaseModelError(
            f"{path} cannot be read: {error!r}.", "Remove the directory and register the base again."
        ) from error


def list_bases(home: Path | str, family: str | None = None) -> list[str]:
    described = _all_described(home)
    return sorted(name for name, about in described.items() if family in (None, about.get("family", "clip")))


def names_by_digest(home: Path | str) -> dict[str, str]:
    """Name by digest of every registered base, CLIP and VLM, without those whose description cannot be read."""
    return {str(about["digest"]): name for name, about in sorted(_all_described(home).items()) if "digest" in about}


def base_of(home: Path, digest: str) -> ClipBase | None:
    """The registered CLIP base with a digest (the ledger's name for it), or None."""
    name = names_by_digest(home).get(digest)
    return load_base(home, name) if name in list_bases(home, "clip") else None


def digest_of(home: Path, name: str) -> str | None:
    return load_base(home, name).digest if name in list_bases(home, "clip") else None


def shown(home: Path, digest: str) -> str:
    """A base for display: its name if registered here, and 12 digits of its digest."""
    name = names_by_digest(home).get(digest)
    return digest12(digest) if name is None else f"{name!r} ({digest12(digest)})"


def need_base(home: Path, digest: str, name: str) -> ClipBase:
    """The CLIP base with a digest; ``name`` is for the BaseModelError that is raised when it is not registered."""
    base = base_of(home, digest)
    if base is None:
        raise BaseModelError(
            f"base {name!r} ({digest12(digest)}) is not registered in {home} any more.",
            f"Register it again: `ratchet base add {name} ...`, or `ratchet base pull {name}`.",
        )
    return base


def _all_described(home: Path | str) -> dict[str, dict[str, Any]]:
    return {path.parent.name: _described(path.parent) for path in (Path(home) / "bases").glob(f"*/{DESCRIPTION}")}


def save_base(
    home: Path | str,
    name: str,
    model: nn.Module,
    model_cfg: dict[str, Any],
    preprocess: Preprocess,
    tokenizer_cfg: dict[str, Any],
    *,
    text_files: Path | None = None,
    lora_targets: dict[str, str] | None = None,
    about: dict[str, Any] | None = None,
    replace: bool = False,
) -> ClipBase:
    """Register a model as base ``name``; its directory is moved into place when complete. ``text_files``: Hugging Face
    files to copy into ``text/``. The same content is left as it is; other content under the name raises
    :class:`BaseModelError` unless ``replace``."""
    import torch
    from safetensors.torch import save_file

    from serving.engines.tokens import tokenizer_digest

    target = base_directory(home, name)
    with folder_next_to(target) as work:
        if text_files is not None:
            shutil.copytree(text_files, work / TEXT_FILES)
        state = {
            key: (value.float() if value.is_floating_point() else value).detach().cpu().contiguous().clone()
            for key, value in model.state_dict().items()
        }
        bad = sorted(k for k, v in state.items() if v.is_floating_point() and not torch.isfinite(v).all())
        if bad:
            raise BaseModelError(
                f"Base {name!r}: {bad[0]!r} holds values that are not finite.", "Use another checkpoint."
            )
        save_file(state, work / WEIGHTS)
        text_cfg = model_cfg["text_cfg"]
        described: dict[str, Any] = {
            "model_cfg": model_cfg,
            "preprocess": preprocess.to_json(),
            "tokenizer_cfg": tokenizer_cfg,
            "tokenizer_digest": tokenizer_digest(tokenizer_cfg, work),
            "context_length": int(text_cfg.get("context_length", 77)),
            "dim": int(model_cfg["embed_dim"]),
            "tensors": {key: digest_tensor(key, value) for key, value in state.items()},
        }
        digest = digest_json(described)
        described |= {
            "format": FORMAT,
            "digest": digest,
            "lora_targets": lora_targets or find_lora_targets(model),
            "weights_bytes": (work / WEIGHTS).stat().st_size,
            "about": about or {},
        }
        (work / DESCRIPTION).write_text(json.dumps(described, indent=1) + "\n")
        move_into_place(work, target, digest, replace)
    return load_base(home, name)


def move_into_place(work: Path, target: Path, digest: str, replace: bool) -> None:
    """Rename a finished base into place. Raises :class:`BaseModelError` when the name has other content."""
    work.chmod(0o755)
    for _ in range(10):  # another process may register or replace the same name meanwhile
        there = str(_described(target).get("digest", ""))
        if there == digest:
            return
        if target.exists():
            if not replace:
                raise BaseModelError(
                    f"Base {target.name!r} exists with other content ({digest12(there)}, not {digest12(digest)}).",
                    "Register under another name: adapters of the old one belong to its content.",
                )
            # Renamed before it is deleted: readers never see half a base, and mapped weights stay mapped.
            old = target.with_name(f"{work.name}-old")
            with contextlib.suppress(FileNotFoundError):
                target.rename(old)
            shutil.rmtree(old, ignore_errors=True)
        with contextlib.suppress(OSError):
            work.rename(target)
            return
    raise BaseModelError(f"{target} cannot be written.", "Check the permissions of its folder.")


def _described(directory: Path) -> dict[str, Any]:
    try:
        value = json.loads((directory / DESCRIPTION).read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def import_open_clip(model_cfg: Mapping[str, Any]) -> None:
    """Import open_clip without the libraries of towers that this model does not have: transformers and timm take three
    seconds of a processor; and torchvision without torch's compiler, which takes another. Only for a process that will
    build no other model."""
    vision, text = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    needed = {"timm": vision.get("timm_model_name"), "transformers": text.get("hf_model_name")}
    # It asks the compiler only about regions of interest, which no CLIP has. Apart: timm needs the whole compiler.
    with replaced("torch._dynamo.utils", is_compile_supported=lambda device: False):
        import torchvision  # noqa: F401
    with hidden(*(name for name, model in needed.items() if not model)):  # open_clip catches the ImportError
        import open_clip.model  # noqa: F401


def construct(model_cfg: dict[str, Any], directory: Path) -> nn.Module:
    """Build an open_clip model with random weights from its configuration, without downloads."""
    import open_clip.model  # takes seconds; processes that only read descriptions do without

    cfg = copy.deepcopy(model_cfg)
    if "multimodal_cfg" in cfg:
        raise BaseModelError("CoCa models have a decoder and are not served.", "Use a CLIP or SigLIP model.")
    cfg["vision_cfg"]["timm_model_pretrained"] = False
    text_cfg = cfg["text_cfg"]
    custom, merged = bool(cfg.pop("custom_text", False)), bool(cfg["vision_cfg"].pop(MERGED, False))
    if text_cfg.get("hf_model_name"):
        custom = True
        text_cfg["hf_model_name"] = str(directory / text_cfg["hf_model_name"])
        text_cfg["hf_model_pretrained"] = False
    kind = open_clip.model.CustomTextCLIP if custom else open_clip.model.CLIP
    try:
        model: nn.Module = kind(**cfg)
    except (TypeError, ValueError, RuntimeError, OSError) as error:
        raise BaseModelError(
            f"open_clip cannot build this configuration: {error}", "Check model_cfg in base.json."
        ) from error
    if merged:
        merge_branches(model)
    return model


def merge_branches(model: nn.Module) -> bool:
    """Merge, in place, the parallel convolutions and batch norms that an image tower of timm has for training alone
    into one convolution each, as its authors do to serve it (RepVGG, CVPR 2021; MobileOne, CVPR 2023): vectors differ
    by rounding only. True if there were any; the configuration then needs :data:`MERGED`."""
    from timm.utils.model import reparameterize_model

    before = list(model.state_dict())
    reparameterize_model(model.get_submodule("visual"), inplace=True)
    return list(model.state_dict()) != before


def find_lora_targets(model: nn.Module) -> dict[str, str]:
    """Regular expressions for the layers that can carry LoRA, by tower. PEFT selects by name, so a layer's last name
    counts only if all its layers in the tower are Linear, 1x1 convolution or MultiheadAttention. Layers inside a
    MultiheadAttention are left to it: its ``out_proj`` never runs its own ``forward``, so LoRA there gets no
    gradient."""
    from torch import nn

    good: dict[str, set[str]] = {"image": set(), "text": set()}
    bad: dict[str, set[str]] = {"image": set(), "text": set()}
    inside = [n for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)]
    for name, module in model.named_modules():
        tower = tower_of(name)
        if tower is None or not name or any(name.startswith(f"{outer}.") for outer in inside):
            continue
        leaf = name.rsplit(".", 1)[-1]
        (good if can_carry_lora(module) else bad)[tower].add(leaf)
    patterns = {}
    for tower_name, start in (("image", r"visual\."), ("text", r"(?!visual\.)")):
        leaves = sorted(re.escape(leaf) for leaf in good[tower_name] - bad[tower_name])
        patterns[tower_name] = rf"{start}(?:.*\.)?(?:{'|'.join(leaves)})"
    return patterns


def can_carry_lora(module: nn.Module) -> bool:
    """True for Linear, ungrouped 1x1 convolution, or MultiheadAttention with one width for query, key and value."""
    from torch import nn

    if isinstance(module, nn.MultiheadAttention):
        return module.in_proj_weight is not None
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1) and module.groups == 1
    return isinstance(module, nn.Linear)
