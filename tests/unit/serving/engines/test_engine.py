from __future__ import annotations

import gc
import threading
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from core.errors import AdapterError
from serving.engines import lora
from serving.engines.adapters import read_adapter
from serving.engines.backends import golden_pixels
from serving.engines.clip import ClipEngine
from serving.engines.clip_base import ClipBase
from tests.support.tiny import tiny_adapter, tiny_base

TEXTS = ["a red bus", "a cat asleep on a chair", "x"]


@pytest.fixture
def engine(base: ClipBase) -> ClipEngine:
    return ClipEngine(base, device="cpu")


def test_vectors_have_unit_length_and_do_not_depend_on_the_batch(engine: ClipEngine) -> None:
    images = np.concatenate([golden_pixels(32)] * 20)
    together = engine.encode_images(images)
    assert together.shape == (80, 32)
    assert together.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(together[79:], engine.encode_images(images[79:]), atol=1e-5)
    np.testing.assert_allclose(engine.encode_texts(TEXTS)[2:], engine.encode_texts(TEXTS[2:]), atol=1e-5)


def test_no_input_gives_no_rows(engine: ClipEngine) -> None:
    assert engine.encode_texts([]).shape == (0, 32)
    assert engine.encode_images(golden_pixels(32)[:0]).shape == (0, 32)


def test_an_adapter_on_the_text_tower_keeps_the_image_space(engine: ClipEngine, folder: Path) -> None:
    name = tiny_adapter(engine.base, folder, seed=1, towers=("text",))
    spaces = engine.load(name, folder)
    assert spaces.image == engine.spaces().image and spaces.text != engine.spaces().text
    images = golden_pixels(32)
    assert np.array_equal(engine.encode_images(images, name), engine.encode_images(images))
    assert np.abs(engine.encode_texts(TEXTS, name) - engine.encode_texts(TEXTS)).max() > 1e-2


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


def test_the_base_is_held_once(engine: ClipEngine, tmp_path: Path) -> None:
    name = tiny_adapter(engine.base, tmp_path / "a", seed=1, towers=("text",))
    engine.load(name, tmp_path / "a")
    base, shell = dict(engine.model().named_parameters()), dict(engine.model(name).named_parameters())
    changed = {n for n in base if base[n].data_ptr() != shell[n].data_ptr()}
    assert changed
    assert all(("attn." in n or "mlp." in n) and not n.startswith("visual.") for n in changed)


def test_threads_with_different_adapters_never_see_each_other(engine: ClipEngine, tmp_path: Path) -> None:
    names: list[str | None] = [None]
    for seed in (1, 2, 3):
        name = tiny_adapter(engine.base, tmp_path / str(seed), seed=seed)
        engine.load(name, tmp_path / str(seed))
        names.append(name)
    images = golden_pixels(32)
    expected = {n: (engine.encode_images(images, n), engine.encode_texts(TEXTS, n)) for n in names}
    wrong: list[str] = []

    def work(name: str | None) -> None:
        for _ in range(15):
            found = engine.encode_images(images, name), engine.encode_texts(TEXTS, name)
            if any(np.abs(f - e).max() > 1e-5 for f, e in zip(found, expected[name], strict=True)):
                wrong.append(str(name))

    def churn() -> None:
        directory = tmp_path / "churn"
        extra = tiny_adapter(engine.base, directory, seed=9)
        for _ in range(15):
            engine.load(extra, directory)
            engine.unload(extra)

    threads = [threading.Thread(target=work, args=(n,)) for n in names] + [threading.Thread(target=churn)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


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


def test_golden_inputs_tell_adapters_apart_and_repeat(engine: ClipEngine, folder: Path) -> None:
    name = tiny_adapter(engine.base, folder, seed=5)
    engine.load(name, folder)
    assert engine.golden(name) == engine.golden(name)
    assert engine.golden(name)["cosines"] != engine.golden()["cosines"]
    assert engine.golden(name)["image_space"] == engine.spaces(name).image
    assert ClipEngine(engine.base, device="cpu").golden() == engine.golden()


def test_golden_inputs_catch_values_that_overflow(engine: ClipEngine, folder: Path) -> None:
    # Finite in the file, finite after the merge, and yet infinite inside the tower.
    name = tiny_adapter(engine.base, folder, seed=6, scale=1e30)
    engine.load(name, folder)
    with pytest.raises(AdapterError, match="not finite"):
        engine.golden(name)


def test_an_adapter_of_another_base_or_under_another_name_is_refused(engine: ClipEngine, tmp_path: Path) -> None:
    name = tiny_adapter(tiny_base(tmp_path, seed=1), tmp_path / "other", seed=1)
    with pytest.raises(AdapterError, match="belongs to the base"):
        engine.load(name, tmp_path / "other")
    tiny_adapter(engine.base, tmp_path / "own", seed=1)
    with pytest.raises(AdapterError, match="not clip-000000000000"):
        engine.load("clip-000000000000", tmp_path / "own")
    assert engine.resident == ()


def test_pixels_of_a_wrong_kind_are_named(engine: ClipEngine) -> None:
    with pytest.raises(ValueError, match="uint8"):
        engine.encode_images(np.zeros((1, 32, 32, 3), np.float32))
    with pytest.raises(ValueError, match="32, 32, 3"):
        engine.encode_images(np.zeros((1, 16, 16, 3), np.uint8))
