"""VLM families by small random models: `base add` accepts those that work and rejects others (`ratchet bench families`
tests the rest: updates, both engines and the gate), and adapters of VLMs, which are read and stay resident.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from core.errors import AdapterError, BaseModelError
from serving.engines.adapters import write_adapter
from serving.engines.vlm.adapters import Residents, linear_shapes, parts_of, read_validated_adapter
from serving.engines.vlm.generation import question
from serving.engines.vlm.hf_engine import score
from tests.support.tiny_vlm import tiny_vlm_adapter, tiny_vlm_base
from tests.support.vlm_families import FAMILIES, write_family
from updater.bases.register import add_vlm
from updater.gate.checks import check_vlm_parity


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def model_of(models: Path, name: str) -> Path:
    folder = models / name
    if not folder.exists():
        write_family(name, folder)
    return folder


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_that_works_is_added_with_the_parts_of_adapters(name: str, models: Path, tmp_path: Path) -> None:
    base = add_vlm(tmp_path, "tried", model_of(models, name))
    assert {"image", "text"} <= base.lora_targets.keys()
    names = [module for module, _ in base.build_model().named_modules()]
    assert any(base.part_of(module) == "text" for module in names)


def test_what_the_trainer_says_of_an_answer_is_compared_where_tokens_have_types(models: Path, tmp_path: Path) -> None:
    """Qwen's processor gives each token a type, including those of the answer."""
    base = add_vlm(tmp_path, "tried", model_of(models, "Qwen2-VL"))
    tiny_vlm_adapter(base, tmp_path / "adapter", seed=1)
    model = base.build_model()
    asks, answers = [question(np.full((32, 32, 3), 90, np.uint8), "which colour?")], ["a round apple"]
    served = [score(model, base.processor(), asks[0], answers)] * 2
    check = check_vlm_parity(base, model, tmp_path / "adapter", asks, answers, served)
    assert check.value is not None and check.value > 1e-3, "the adapter says something else than the base"
    assert not check.ok


def test_a_model_that_cannot_be_shown_a_picture_is_refused_at_once(models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in model_of(models, "LLaVA").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "chat_template.jinja").write_text("{% for message in messages %}{{ message['role'] }}{% endfor %}")
    with pytest.raises(BaseModelError, match="cannot be asked about a picture") as caught:
        add_vlm(tmp_path / "home", "blind", folder)
    assert "ratchet bench families" in caught.value.fix
    assert not (tmp_path / "home" / "bases" / "blind").exists()


def test_a_model_of_other_layer_names_is_refused(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.engines.vlm.vlm_base._TARGETS", ("nothing",))
    with pytest.raises(BaseModelError, match="no layer of a language model"):
        add_vlm(tmp_path, "odd", model_of(models, "LLaVA"))
    assert json.loads((models / "LLaVA" / "config.json").read_text())["architectures"]


def test_an_adapter_is_read_only_when_it_fits(tmp_path: Path) -> None:
    base, other = tiny_vlm_base(tmp_path), tiny_vlm_base(tmp_path, "other", seed=1)
    shapes = linear_shapes(base)
    assert {base.part_of(name) for name in shapes} == {"text", "image", "connector"}
    name = tiny_vlm_adapter(base, tmp_path / "a", 1, parts=("text", "connector"), rank=8)
    files = read_validated_adapter(base, shapes, name, tmp_path / "a", 8)
    assert parts_of(base, files) == {"text", "connector"}
    fewer = {key: shape for key, shape in shapes.items() if "connector" not in key}
    wider = {key: (shape[0], shape[1] + 1) for key, shape in shapes.items()}
    for of, has, named, rank, message in [
        (base, shapes, name, 4, r"has rank 8; this server takes 4"),
        (base, shapes, "vlm-other", 8, "not vlm-other"),
        (other, linear_shapes(other), name, 8, "belongs to the base"),
        (base, fewer, name, 8, r"has no layer 'model\.connector"),
        (base, wider, name, 8, "do not fit its weight"),
    ]:
        with pytest.raises(AdapterError, match=message):
            read_validated_adapter(of, has, named, tmp_path / "a", rank)
    norm = {"base_model.model.model.text_model.norm.weight": torch.ones(64)}
    name = write_adapter(tmp_path / "both", files.tensors | norm, files.config, base)
    with pytest.raises(AdapterError, match=r"replaces model\.text_model\.norm\.weight.*LoRA alone"):
        read_validated_adapter(base, shapes, name, tmp_path / "both", 8)


class Shelf:
    """Residents whose values are their names, with a record of what was made and dropped."""

    def __init__(self, most: int = 2) -> None:
        self.residents: Residents[str] = Residents(most)
        self.made: list[str] = []
        self.dropped: list[str] = []

    async def add(self, name: str) -> None:
        async def make() -> str:
            await asyncio.sleep(0)
            self.made.append(name)
            return name

        await self.residents.add(name, make)

    async def remove(self, name: str) -> None:
        async def drop(value: str) -> None:
            self.dropped.append(value)

        await self.residents.remove(name, drop)


async def test_twice_is_once_even_at_the_same_time() -> None:
    shelf = Shelf()
    await asyncio.gather(shelf.add("a"), shelf.add("a"))
    assert shelf.made == ["a"]
    await shelf.remove("unknown")
    await asyncio.gather(shelf.remove("a"), shelf.remove("a"))
    assert shelf.dropped == ["a"]


async def test_what_is_leaving_takes_no_request_and_goes_with_its_last_one_unless_it_is_added_again() -> None:
    shelf = Shelf()
    for again in (True, False):
        await shelf.add("a")
        with shelf.residents.using("a"), shelf.residents.using("a") as value:
            assert value == "a"
            leaving = asyncio.create_task(shelf.remove("a"))
            await asyncio.sleep(0)
            assert shelf.residents.names() == frozenset()
            with pytest.raises(AdapterError, match="not resident"), shelf.residents.using("a"):
                pass
            if again:
                await shelf.add("a")
                await leaving
            assert shelf.dropped == []
        await leaving
        assert (shelf.made, shelf.dropped) == (["a"], [] if again else ["a"])


async def test_one_that_still_leaves_takes_its_room() -> None:
    shelf = Shelf(most=2)
    await shelf.add("a")
    await shelf.add("b")
    with shelf.residents.using("a"):
        leaving = asyncio.create_task(shelf.remove("a"))
        await asyncio.sleep(0)
        with pytest.raises(AdapterError, match="no room for c: a, b"):
            await shelf.add("c")
    await leaving
    await shelf.add("c")
    assert shelf.residents.names() == {"b", "c"}


async def test_one_that_cannot_be_made_leaves_nothing() -> None:
    shelf = Shelf(most=1)

    async def make() -> str:
        raise AdapterError("no")

    with pytest.raises(AdapterError, match="no"):
        await shelf.residents.add("a", make)
    await shelf.add("b")
    assert shelf.residents.names() == {"b"}
