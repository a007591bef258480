from __future__ import annotations

from pathlib import Path

import numpy as np
import open_clip.tokenizer
import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

from demo.clip import build_base, towers
from demo.clip.shipped import ASSETS, PROJECTIONS, read_projections
from serving.engines.adapters import write_adapter
from serving.engines.backends import golden_pixels
from serving.engines.clip import ClipEngine
from serving.engines.clip_base import ClipBase, load_base

TEXTS = ["a red bus", "Côte d'Ivoire   flag", "x " * 200, ""]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ClipBase:
    return build_base(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def engine(base: ClipBase) -> ClipEngine:
    return ClipEngine(base, device="cpu")


def test_building_again_finds_the_same_base(base: ClipBase, tmp_path: Path) -> None:
    home = base.directory.parent.parent
    before = (base.directory / "base.json").stat().st_mtime_ns
    assert build_base(home).digest == base.digest
    assert (base.directory / "base.json").stat().st_mtime_ns == before
    assert build_base(tmp_path).digest == base.digest


def test_the_base_holds_the_committed_projections_and_the_packages_towers(base: ClipBase) -> None:
    state = base.build_model().state_dict()
    for name, tensor in read_projections(ASSETS / PROJECTIONS).items():
        assert torch.equal(state[name], tensor.float()), name
    assert state["visual.trunk.conv_stem.weight"].std() > 0.1
    assert (ASSETS / PROJECTIONS).stat().st_size < 4 << 20


def test_nothing_is_asked_of_the_network_or_the_packages(base: ClipBase, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a registered base must not need this")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr(towers, "_packaged", refuse)
    engine = ClipEngine(load_base(base.directory.parent.parent, base.name), device="cpu")
    assert engine.encode_texts(["a cat"]).shape == (1, base.dim)


def test_tokens_are_those_of_open_clip_without_the_padding(base: ClipBase) -> None:
    ours = base.tokenizer()
    theirs = open_clip.tokenizer.HFTokenizer(str(base.directory / "text"), context_length=base.context_length)
    for texts in (TEXTS, TEXTS[:2], TEXTS[3:]):
        mine, full = ours(texts), theirs(texts)
        assert mine.shape[1] == int((full != 0).sum(dim=1).max())
        assert torch.equal(mine, full[:, : mine.shape[1]])
        assert not full[:, mine.shape[1] :].any()


def test_padding_does_not_change_a_vector(engine: ClipEngine) -> None:
    together = engine.encode_texts(TEXTS)
    for i, text in enumerate(TEXTS):
        np.testing.assert_allclose(engine.encode_texts([text])[0], together[i], atol=1e-5)


def test_adapters_on_its_own_targets_merge_as_in_peft(base: ClipBase, engine: ClipEngine, tmp_path: Path) -> None:
    torch.manual_seed(0)
    targets = "|".join(f"(?:{pattern})" for pattern in base.lora_targets.values())
    lora = LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False)
    wrapped = get_peft_model(base.build_model(), lora).eval()
    state = get_peft_model_state_dict(wrapped)
    for name in ("visual.head.proj", "text.proj", "visual.trunk.blocks.1.0.conv_pw", "attention.self.query"):
        assert any(f"{name}.lora_A" in key for key in state), name
    name = write_adapter(tmp_path / "a", {k: v * 0.3 for k, v in state.items()}, lora.to_dict(), base)
    for key, parameter in wrapped.named_parameters():
        if "lora_" in key:
            parameter.data.mul_(0.3)
    engine.load(name, tmp_path / "a")
    pixels = golden_pixels(base.preprocess.size)
    with torch.inference_mode():
        images = wrapped.base_model.model.encode_image(base.preprocess.normalise(pixels), normalize=True)
        texts = wrapped.base_model.model.encode_text(base.tokenizer()(TEXTS), normalize=True)
    np.testing.assert_allclose(engine.encode_images(pixels, name), images, atol=1e-5)
    np.testing.assert_allclose(engine.encode_texts(TEXTS, name), texts, atol=1e-5)
    assert np.abs(engine.encode_texts(TEXTS) - texts.numpy()).max() > 1e-2
