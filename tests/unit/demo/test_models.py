"""The demo's two bases: how they are made, and that what serves them computes what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import open_clip.tokenizer
import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from PIL import Image

from demo.clip import build_base, towers
from demo.clip.projections import Pairs, ProjectionRecipe, train_projections
from demo.clip.shipped import ASSETS, PROJECTIONS, read_projections
from demo.vlm.model import make_model, make_processor, make_tokenizer
from demo.vlm.questions import learn, tokenize
from demo.vlm.recipe import VlmRecipe
from demo.vlm.scores import accuracy, answer
from serving.engines.adapters import write_adapter
from serving.engines.clip import ClipEngine
from serving.engines.clip_base import ClipBase, load_base
from serving.engines.processor import golden_pixels
from serving.engines.vlm.prompts import answer_tokens
from streams.publish.folders import FolderItem

TEXTS = ["a red bus", "Côte d'Ivoire   flag", "x " * 200, ""]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ClipBase:
    return build_base(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def engine(base: ClipBase) -> ClipEngine:
    return ClipEngine(base, device="cpu")


def test_the_base_has_the_committed_projections_each_time(base: ClipBase, tmp_path: Path) -> None:
    about = base.directory / "base.json"
    before = about.stat().st_mtime_ns
    assert build_base(base.directory.parent.parent).digest == build_base(tmp_path).digest == base.digest
    assert about.stat().st_mtime_ns == before
    state = base.build_model().state_dict()
    for name, tensor in read_projections(ASSETS / PROJECTIONS).items():
        assert torch.equal(state[name], tensor.float()), name
    assert state["visual.trunk.conv_stem.weight"].std() > 0.1


def test_nothing_is_asked_of_the_network_or_the_packages(base: ClipBase, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a registered base must not need this")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr(towers, "_packaged", refuse)
    engine = ClipEngine(load_base(base.directory.parent.parent, base.name), device="cpu")
    assert engine.encode_texts(["a cat"]).shape == (1, base.dim)


def test_tokens_are_those_of_open_clip_and_padding_changes_no_vector(base: ClipBase, engine: ClipEngine) -> None:
    ours = base.tokenizer()
    theirs = open_clip.tokenizer.HFTokenizer(str(base.directory / "text"), context_length=base.context_length)
    for texts in (TEXTS, TEXTS[:2], TEXTS[3:]):
        mine, full = ours(texts), theirs(texts)
        assert mine.shape[1] == int((full != 0).sum(dim=1).max())
        assert torch.equal(mine, full[:, : mine.shape[1]])
        assert not full[:, mine.shape[1] :].any()
    together = engine.encode_texts(TEXTS)
    for i, text in enumerate(TEXTS):
        np.testing.assert_allclose(engine.encode_texts([text])[0], together[i], atol=1e-5)


def test_adapters_on_its_own_targets_merge_as_in_peft(base: ClipBase, engine: ClipEngine, tmp_path: Path) -> None:
    torch.manual_seed(0)
    targets = "|".join(f"(?:{pattern})" for pattern in base.lora_targets.values())
    lora = LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False)
    wrapped = get_peft_model(base.build_model(), lora).eval()
    for key, parameter in wrapped.named_parameters():
        if "lora_" in key:
            parameter.data.mul_(0.3)
    state = get_peft_model_state_dict(wrapped)
    for name in ("visual.head.proj", "text.proj", "visual.trunk.blocks.1.0.conv_pw", "attention.self.query"):
        assert any(f"{name}.lora_A" in key for key in state), name
    name = write_adapter(tmp_path / "a", state, lora.to_dict(), base)
    engine.load(name, tmp_path / "a")
    pixels = golden_pixels(base.preprocess.size)
    with torch.inference_mode():
        images = wrapped.base_model.model.encode_image(base.preprocess.normalise(pixels), normalize=True)
        texts = wrapped.base_model.model.encode_text(base.tokenizer()(TEXTS), normalize=True)
    np.testing.assert_allclose(engine.encode_images(pixels, name), images, atol=1e-5)
    np.testing.assert_allclose(engine.encode_texts(TEXTS, name), texts, atol=1e-5)
    assert np.abs(engine.encode_texts(TEXTS) - texts.numpy()).max() > 1e-2


def _recall(images: torch.Tensor, texts: torch.Tensor) -> float:
    images, texts = (torch.nn.functional.normalize(v, dim=1) for v in (images, texts))
    return float(((images @ texts.T).argmax(dim=1) == torch.arange(len(images))).float().mean())


def test_projections_match_pairs_that_were_never_seen() -> None:
    """Images are an unknown linear map of texts on a sphere, and never negative, as pooled features are."""
    made = torch.Generator().manual_seed(0)
    mixing = torch.randn(16, 40, generator=made)
    texts = torch.randn(320, 16, generator=made)
    images = (texts @ mixing * 0.3 + 1).clamp(min=0)
    how = ProjectionRecipe(class_weight=0.0, epochs=20, batch=64, warmup_steps=5, dropout=0.1, lr=0.02)
    found = train_projections(Pairs(images[:256], texts[:256], torch.arange(256)), recipe=how)
    assert _recall(images[256:] @ found.image.T, texts[256:] @ found.text.T) > 0.8
    assert found.losses[-1] < found.losses[0] / 2


WORDS = ["what colour is this?", "is there anything red here?", "red", "blue", "yes", "no", "an ankle boot"]
Parts = tuple[Any, Any]


@pytest.fixture(scope="module")
def parts() -> Parts:
    torch.manual_seed(0)
    tokenizer = make_tokenizer(WORDS * 3)
    return make_model(tokenizer), make_processor(tokenizer)


def ask(answer: str) -> FolderItem:
    return FolderItem(Path("x"), "", question=WORDS[0], answer=answer)


def test_any_text_goes_into_tokens_and_back_and_an_answer_has_the_same_alone_and_after_the_prompt(parts: Parts) -> None:
    processor = parts[1]
    tokenizer = processor.tokenizer
    for text in (*WORDS, "Größe: 42 ✓", "  two  spaces"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    (row,) = tokenize(processor, [ask("an ankle boot")])
    prompt = tokenizer.decode(row.prompt)
    joint = tokenizer(prompt + "an ankle boot<end_of_utterance>", add_special_tokens=False)["input_ids"]
    assert joint == [*row.prompt, *row.answer]
    assert list(row.answer) == answer_tokens(processor, "an ankle boot")
    assert row.prompt.count(processor.image_token_id) == 16


@pytest.mark.long
@pytest.mark.timeout(600)  # Muon multiplies in bfloat16: eight times slower on processors without AVX-512
def test_the_vlm_learns_colours_in_a_few_steps(parts: Parts, tmp_path: Path) -> None:
    model, processor = parts
    rows = []
    for number in range(24):  # red and blue squares in 24 places, with a question about the colour of each
        colour = ("red", "blue")[number % 2]
        image = Image.new("RGB", (128, 128), "white")
        image.paste(colour, (8 + number, 20, 70 + number, 90))
        path = tmp_path / f"{number}.png"
        image.save(path)
        rows.append(FolderItem(path, "", "colour", colour, "train", question=WORDS[0], answer=colour))
    learn(model, processor, rows, VlmRecipe(steps=(14,), pictures=16, warmup_steps=3, lr=3e-3))
    assert accuracy(rows, answer(model, processor, rows)) > 0.9
    assert accuracy(rows, answer(model, processor, rows, blank=True)) < 0.6
