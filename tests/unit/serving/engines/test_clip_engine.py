from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip.model
import pytest
import torch
from torch import nn

from core.errors import AdapterError
from serving.engines import lora, torch_backend
from serving.engines.adapters import read_adapter
from serving.engines.clip import ClipEngine
from serving.engines.clip_base import ClipBase, save_base
from serving.engines.layers import PackedLinear, can_pack, pack
from serving.engines.preprocess import Preprocess
from serving.engines.processor import Precision, golden_pixels
from serving.engines.towers import encode_image, encode_text
from tests.support.tiny import CONFIG, tiny_adapter, tiny_base

TEXTS = ["a red bus", "a cat asleep on a chair", "x"]
PIXELS = golden_pixels(32)


@pytest.fixture
def engine(base: ClipBase) -> ClipEngine:
    return ClipEngine(base, device="cpu")


def test_vectors_have_unit_length_and_do_not_depend_on_the_batch(engine: ClipEngine) -> None:
    images = np.concatenate([PIXELS] * 20)
    together = engine.encode_images(images)
    assert together.shape == (80, 32)
    assert together.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(together[79:], engine.encode_images(images[79:]), atol=1e-5)
    np.testing.assert_allclose(engine.encode_texts(TEXTS)[2:], engine.encode_texts(TEXTS[2:]), atol=1e-5)
    assert engine.encode_texts([]).shape == engine.encode_images(images[:0]).shape == (0, 32)
    with pytest.raises(ValueError, match="uint8"):
        engine.encode_images(np.zeros((1, 32, 32, 3), np.float32))
    with pytest.raises(ValueError, match="32, 32, 3"):
        engine.encode_images(np.zeros((1, 16, 16, 3), np.uint8))


def test_an_adapter_of_texts_keeps_the_image_space_and_the_base_is_held_once(engine: ClipEngine, folder: Path) -> None:
    name = tiny_adapter(engine.base, folder, seed=1, towers=("text",))
    spaces = engine.load(name, folder)
    assert spaces.image == engine.spaces().image and spaces.text != engine.spaces().text
    assert np.array_equal(engine.encode_images(PIXELS, name), engine.encode_images(PIXELS))
    assert np.abs(engine.encode_texts(TEXTS, name) - engine.encode_texts(TEXTS)).max() > 1e-2
    base, shell = dict(engine.model().named_parameters()), dict(engine.model(name).named_parameters())
    changed = {n for n in base if base[n].data_ptr() != shell[n].data_ptr()}
    assert changed
    assert all(("attn." in n or "mlp." in n) and not n.startswith("visual.") for n in changed)


def test_spaces_are_the_same_on_a_processor_that_rounds_otherwise(
    engine: ClipEngine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = tiny_adapter(engine.base, folder, seed=1)
    spaces, vectors = engine.load(name, folder), engine.encode_texts(TEXTS, name)
    engine.unload(name)
    exact = lora._Layer.delta
    monkeypatch.setattr(lora._Layer, "delta", lambda layer: exact(layer) * (1 + 2**-22))
    assert engine.load(name, folder) == spaces
    assert not np.array_equal(engine.encode_texts(TEXTS, name), vectors)


def test_spaces_do_not_depend_on_how_a_product_is_written(engine: ClipEngine, folder: Path) -> None:
    """A tower that an update leaves unchanged keeps its space, whatever rank and scale the next adapter has."""
    tiny_adapter(engine.base, folder, seed=1)
    files = read_adapter(folder)
    model, rank = engine.base.build_model(), files.config["r"]
    config = {**files.config, "r": 2 * rank, "lora_alpha": 4 * files.config["lora_alpha"]}
    wider = {
        name: torch.cat([each / (2 if "lora_B" in name else 1), torch.zeros_like(each)], dim=int("lora_B" in name))
        for name, each in files.tensors.items()
    }
    one, other = (
        {each.name: each for each in lora.merge(each, model)}
        for each in (files, replace(files, config=config, tensors=wider))
    )
    assert {name: each.digest for name, each in one.items()} == {name: each.digest for name, each in other.items()}
    assert all(torch.equal(each.weight, other[name].weight) for name, each in one.items())


def test_threads_with_different_adapters_never_see_each_other(engine: ClipEngine, tmp_path: Path) -> None:
    names: list[str | None] = [None]
    for seed in (1, 2, 3):
        name = tiny_adapter(engine.base, tmp_path / str(seed), seed=seed)
        engine.load(name, tmp_path / str(seed))
        names.append(name)
    expected = {n: (engine.encode_images(PIXELS, n), engine.encode_texts(TEXTS, n)) for n in names}

    def is_own(name: str | None) -> bool:
        found = engine.encode_images(PIXELS, name), engine.encode_texts(TEXTS, name)
        return all(np.abs(f - e).max() <= 1e-5 for f, e in zip(found, expected[name], strict=True))

    def churn() -> None:
        extra = tiny_adapter(engine.base, tmp_path / "churn", seed=9)
        for _ in range(15):
            engine.load(extra, tmp_path / "churn")
            engine.unload(extra)

    with ThreadPoolExecutor(len(names) + 1) as pool:
        churning = pool.submit(churn)
        assert all(pool.map(is_own, names * 15))
        churning.result()


def test_an_unloaded_adapter_is_gone_with_its_memory_and_can_come_back(engine: ClipEngine, folder: Path) -> None:
    name = tiny_adapter(engine.base, folder, seed=4)
    spaces = engine.load(name, folder)
    golden = engine.golden(name)
    towers = weakref.ref(engine._residents[name].towers)
    gc.disable()  # full collections are minutes apart: hundreds of megabytes of a real base would wait for one
    try:
        engine.unload(name)
        assert towers() is None
    finally:
        gc.enable()
    with pytest.raises(AdapterError, match="is not resident"):
        engine.encode_texts(TEXTS, name)
    assert engine.load(name, folder) == spaces and engine.golden(name) == golden


def test_golden_inputs_tell_adapters_apart_repeat_and_catch_overflows(engine: ClipEngine, tmp_path: Path) -> None:
    name = tiny_adapter(engine.base, tmp_path / "a", seed=5)
    engine.load(name, tmp_path / "a")
    assert engine.golden(name) == engine.golden(name)
    assert engine.golden(name)["cosines"] != engine.golden()["cosines"]
    assert engine.golden(name)["image_space"] == engine.spaces(name).image
    assert ClipEngine(engine.base, device="cpu").golden() == engine.golden()
    # Finite in the file, finite after the merge, and yet infinite inside the tower.
    huge = tiny_adapter(engine.base, tmp_path / "huge", seed=6, scale=1e30)
    engine.load(huge, tmp_path / "huge")
    with pytest.raises(AdapterError, match="not finite"):
        engine.golden(huge)


def test_an_adapter_of_another_base_or_under_another_name_is_refused(engine: ClipEngine, tmp_path: Path) -> None:
    name = tiny_adapter(tiny_base(tmp_path, seed=1), tmp_path / "other", seed=1)
    with pytest.raises(AdapterError, match="belongs to the base"):
        engine.load(name, tmp_path / "other")
    tiny_adapter(engine.base, tmp_path / "own", seed=1)
    with pytest.raises(AdapterError, match="not clip-000000000000"):
        engine.load("clip-000000000000", tmp_path / "own")
    assert engine.resident == ()


@pytest.mark.parametrize(("precision", "least"), [("bfloat16", 0.999), ("float16", 0.999), ("int8", 0.995)])
def test_other_precisions_give_the_vectors_of_float32_within_their_rounding_and_the_gate_the_float32_model(
    base: ClipBase, tmp_path: Path, precision: Precision, least: float
) -> None:
    plain, half = ClipEngine(base, "cpu"), ClipEngine(base, "cpu", precision=precision)
    first, second = (tiny_adapter(base, tmp_path / str(seed), seed=seed) for seed in (1, 2))
    for engine in (plain, half):
        engine.load(first, tmp_path / "1")
    assert half.spaces(first) == plain.spaces(first)  # what is indexed stays comparable
    expected = [half.encode_images(PIXELS, adapter) for adapter in (None, first)]
    half.load(second, tmp_path / "2")
    for adapter, images in zip((None, first), expected, strict=True):
        assert np.array_equal(half.encode_images(PIXELS, adapter), images), "another adapter leaves it alone"
        texts = half.encode_texts(TEXTS, adapter)
        assert images.dtype == texts.dtype == np.float32
        assert (images * plain.encode_images(PIXELS, adapter)).sum(axis=1).min() > least
        assert (texts * plain.encode_texts(TEXTS, adapter)).sum(axis=1).min() > least
        theirs = half.model(adapter).state_dict()
        assert all(torch.equal(value, theirs[key]) for key, value in plain.model(adapter).state_dict().items())
    assert (expected[0] * expected[1]).sum(axis=1).min() < 0.99
    assert not np.array_equal(half.encode_images(PIXELS, second), expected[1])


def test_batches_of_any_size_run_on_a_few_fixed_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    captured: list[tuple[int, ...]] = []

    class EagerStep:
        """Runs on fixed buffers, as a captured graph does."""

        def __init__(self, forward: Any, example: torch.Tensor) -> None:
            captured.append(tuple(example.shape))
            self.forward, self.inputs = forward, example

        def run(self, batch: torch.Tensor) -> Any:
            self.inputs[: len(batch)] = batch
            return self.forward(self.inputs)

    monkeypatch.setattr(torch_backend, "CudaStep", EagerStep)
    tower = torch_backend.GraphedTower(lambda batch: batch.float() * 2, torch.device("cpu"))
    for count in (3, 1, 8, 4, 7):
        batch = torch.arange(count * 5).reshape(count, 5)
        assert torch.equal(tower(batch), batch.float() * 2)
    assert captured == [(4, 5), (1, 5), (8, 5)]


Changes = dict[str, Any]
IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([[49406, 7, 8, 49407, 0, 0], [49406, 49407, 0, 0, 0, 0], [49406, 1, 2, 3, 4, 49407]])
END = {"eos_id": 49407}


def config_of(vision: Changes | None = None, text: Changes | None = None) -> Changes:
    own: dict[str, Any] = CONFIG
    return own | {"vision_cfg": own["vision_cfg"] | (vision or {}), "text_cfg": own["text_cfg"] | (text or {})}


def model(vision: Changes | None = None, text: Changes | None = None, kind: Any = open_clip.model.CLIP) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made: nn.Module = kind(**config_of(vision, text)).eval()
        for block in (module for module in made.modules() if hasattr(module, "gamma")):
            nn.init.normal_(block.gamma)
    return made


def own_texts(whole: Any, ids: torch.Tensor) -> torch.Tensor:
    padded = torch.zeros(len(ids), config_of()["text_cfg"]["context_length"], dtype=torch.long)
    padded[:, : ids.shape[1]] = ids
    return torch.as_tensor(whole.encode_text(padded))


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of tokens per row that the MLP of a block was given, by call."""
    seen: list[int] = []
    whole: Callable[..., torch.Tensor] = nn.GELU.forward

    def forward(self: nn.GELU, inputs: torch.Tensor) -> torch.Tensor:
        seen.append(inputs.shape[1])
        return whole(self, inputs)

    monkeypatch.setattr(nn.GELU, "forward", forward)
    return seen


@torch.inference_mode()
@pytest.mark.parametrize(
    ("vision", "tokens"),
    [
        ({}, [17, 1]),
        ({"ls_init_value": 0.1}, [17, 1]),
        ({"final_ln_after_pool": True}, [17, 1]),
        ({"pool_type": "avg"}, [17, 17]),
        ({"attentional_pool": True, "attn_pooler_heads": 2}, [17, 17]),
    ],
    ids=str,
)
def test_a_vit_that_pools_its_class_token(vision: Changes, tokens: list[int], blocks: list[int]) -> None:
    whole = model(vision)
    expected = whole.encode_image(IMAGES)  # type: ignore[operator]
    blocks.clear()
    torch.testing.assert_close(encode_image(whole, IMAGES), expected, atol=1e-5, rtol=1e-4)
    assert blocks == tokens


@torch.inference_mode()
@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ({}, open_clip.model.CLIP),
        ({}, open_clip.model.CustomTextCLIP),
        ({"pool_type": "eos", **END}, open_clip.model.CustomTextCLIP),
        ({"ls_init_value": 0.1, "proj_bias": True}, open_clip.model.CustomTextCLIP),
    ],
    ids=str,
)
def test_a_text_tower_that_pools_the_end(text: Changes, kind: Any, blocks: list[int]) -> None:
    whole = model(text=text, kind=kind)
    expected = own_texts(whole, IDS)
    blocks.clear()
    torch.testing.assert_close(encode_text(whole, IDS), expected, atol=1e-5, rtol=1e-4)
    assert blocks == [IDS.shape[1], 1]


@torch.inference_mode()
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_a_gelu_is_computed_with_the_layer_before_it(approximate: str) -> None:
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert can_pack(torch.bfloat16), "if torch has moved it, half precision would silently be slow"
    if not can_pack(torch.float32):
        pytest.skip("this torch has no oneDNN")
    linear, gelu = nn.Linear(64, 32), nn.GELU(approximate)
    inputs = torch.randn(3, 5, 64)
    packed = PackedLinear(pack(linear.weight), linear.bias, gelu)
    torch.testing.assert_close(packed(inputs), gelu(linear(inputs)), atol=1e-5, rtol=1e-4)


LENGTHS = ["a", "a photo of a cat", "seven words of a middling long text", "word " * 60]


@pytest.mark.parametrize(
    ("text", "trims"),
    [
        ({}, True),
        ({"no_causal_mask": True, "pool_type": "last"}, False),
        ({"no_causal_mask": True, "pool_type": "last", "proj_bias": True}, False),  # SigLIP2: its projection is packed
        ({"no_causal_mask": True}, False),
    ],
)
def test_a_tower_that_sees_its_padding_gets_full_length(tmp_path: Path, text: Changes, trims: bool) -> None:
    """A separate text tower, as SigLIP and CLIPA have it."""
    own = model(text=text, kind=open_clip.model.CustomTextCLIP)
    config = config_of(text=text) | {"custom_text": True}
    base = save_base(tmp_path, "custom", own, config, Preprocess(size=32), {"kind": "simple", "kwargs": {}})
    engine = ClipEngine(base, device="cpu")
    assert engine.widths.trims is trims
    with torch.inference_mode():
        whole = engine.model().encode_text(engine.tokenizer(LENGTHS), normalize=True)  # type: ignore[operator]
    np.testing.assert_allclose(engine.encode_texts(LENGTHS), np.asarray(whole), atol=1e-5)
