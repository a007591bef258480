"""Adapter directories are named by content, and whatever is wrong with one is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.errors import AdapterError
from serving.engines.adapters import adapter_name, content_name, read_adapter, write_adapter
from serving.engines.clip_base import ClipBase
from serving.engines.lora import effective_weights
from tests.support.tiny import tiny_adapter

WEIGHTS = "adapter_model.safetensors"


def _edit(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors and give the directory the name that fits them, as a bad trainer would."""
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS)
    about = json.loads((directory / "ratchet.json").read_text())
    config = json.loads((directory / "adapter_config.json").read_text())
    about["name"] = content_name(tensors, config, about["base_digest"])
    (directory / "ratchet.json").write_text(json.dumps(about))


def test_names_follow_content(base: ClipBase, tmp_path: Path) -> None:
    one = tiny_adapter(base, tmp_path / "a", seed=1)
    again = tiny_adapter(base, tmp_path / "b", seed=1)
    other = tiny_adapter(base, tmp_path / "c", seed=2)
    assert one == again == adapter_name(tmp_path / "a")
    assert one != other
    assert one.startswith("clip-")
    assert len(one) == len("clip-") + 12
    files = read_adapter(tmp_path / "a")
    scaled = content_name(files.tensors, files.config | {"lora_alpha": 5}, base.digest)
    elsewhere = content_name(files.tensors, files.config, "0" * 64)
    assert len({one, scaled, elsewhere}) == 3
    # What a run leaves behind (dropout, paths, sets in another order) is not content.
    aside = files.config | {"lora_dropout": 0.3, "target_modules": set(files.config["target_modules"])}
    assert content_name(files.tensors, aside, base.digest) == one


def test_a_directory_is_never_rewritten(base: ClipBase, folder: Path) -> None:
    name = tiny_adapter(base, folder, seed=1)
    before = (folder / WEIGHTS).stat().st_mtime_ns
    assert tiny_adapter(base, folder, seed=1) == name
    with pytest.raises(AdapterError, match="never rewritten"):
        tiny_adapter(base, folder, seed=2)
    assert (folder / WEIGHTS).stat().st_mtime_ns == before
    assert adapter_name(folder) == name
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def _cut(folder: Path, keep: int) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:keep])


def _flip_bit(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-2] ^= 1
    (folder / WEIGHTS).write_bytes(data)


def _change_config(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 400}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: torch.save({"x": torch.ones(1)}, folder / WEIGHTS), "not a safetensors file"),
        (lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"), "pickle files are never read"),
        *((lambda folder, keep=keep: _cut(folder, keep), "cut short") for keep in (0, 4, 200, -1)),
        (_flip_bit, "damaged or were changed"),
        (_change_config, "damaged or were changed"),
        (lambda folder: (folder / "ratchet.json").write_text("[1, 2"), "cannot be read"),
        *(
            (lambda folder, name=name: (folder / name).unlink(), name)
            for name in (WEIGHTS, "adapter_config.json", "ratchet.json")
        ),
    ],
)
def test_a_damaged_directory_is_refused(
    base: ClipBase, folder: Path, damage: Callable[[Path], object], message: str
) -> None:
    tiny_adapter(base, folder, seed=1)
    damage(folder)
    with pytest.raises(AdapterError, match=message):
        read_adapter(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(base: ClipBase, folder: Path, value: float) -> None:
    tiny_adapter(base, folder, seed=1)

    def poison(tensors: dict[str, torch.Tensor]) -> None:
        next(iter(tensors.values()))[0, 0] = value

    _edit(folder, poison)
    with pytest.raises(AdapterError, match="not finite"):
        read_adapter(folder)


def _widen(tensors: dict[str, torch.Tensor]) -> None:
    key = next(k for k in tensors if k.endswith("lora_A.weight"))
    tensors[key] = torch.randn(tensors[key].shape[0], 999)


def _flatten(tensors: dict[str, torch.Tensor]) -> None:
    key = next(key for key in tensors if key.endswith("lora_A.weight"))
    tensors[key] = tensors[key].sum()


def _empty(tensors: dict[str, torch.Tensor]) -> None:
    for key in tensors:
        tensors[key] = torch.zeros(0, 64) if "lora_A" in key else torch.zeros(64, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_widen, r"999.*do not fit"),
        (lambda tensors: tensors.pop(next(k for k in tensors if "lora_B" in k)), "only one of"),
        (lambda tensors: tensors.update({"visual.proj": torch.ones(64, 32)}), "not a LoRA tensor"),
        (_flatten, "no matrix"),
        (_empty, "says rank"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    base: ClipBase, folder: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    tiny_adapter(base, folder, seed=1)
    _edit(folder, change)
    with pytest.raises(AdapterError, match=message):
        effective_weights(folder, base.build_model())


def test_layers_that_the_base_does_not_have_are_named(base: ClipBase, folder: Path) -> None:
    tensors = {
        "base_model.model.visual.nowhere.lora_A.weight": torch.randn(4, 64),
        "base_model.model.visual.nowhere.lora_B.weight": torch.randn(64, 4),
    }
    write_adapter(folder, tensors, {"r": 4, "lora_alpha": 4, "target_modules": ["nowhere"]}, base)
    with pytest.raises(AdapterError, match=r"no layer 'visual\.nowhere'"):
        effective_weights(folder, base.build_model())


def test_patterns_from_outside_are_names_and_not_programs(base: ClipBase, folder: Path) -> None:
    tiny_adapter(base, folder, seed=1)
    files = read_adapter(folder)
    evil = files.config | {"rank_pattern": {"(a+)+b": 4}}
    write_adapter(folder.with_name("evil"), files.tensors, evil, base)
    with pytest.raises(AdapterError, match="not a plain name"):
        effective_weights(folder.with_name("evil"), base.build_model())


def _edit_config(directory: Path, **change: object) -> None:
    """Change the configuration and give the directory the name that fits it, as a bad trainer would."""
    config = json.loads((directory / "adapter_config.json").read_text()) | change
    (directory / "adapter_config.json").write_text(json.dumps(config))
    _edit(directory, lambda tensors: None)


@pytest.mark.parametrize("alpha", ["8", None, True, [8], 10**400])
def test_an_alpha_that_is_no_finite_number_is_refused(base: ClipBase, folder: Path, alpha: object) -> None:
    tiny_adapter(base, folder, seed=1)
    _edit_config(folder, lora_alpha=alpha)
    with pytest.raises(AdapterError, match=r"alpha .* not a finite number"):
        effective_weights(folder, base.build_model())


@pytest.mark.parametrize("change", [{"r": 0}, {"r": "4"}, {"r": None}, {"r": 8}, {"rank_pattern": {"c_fc": 9}}])
def test_a_rank_that_the_tensors_do_not_have_is_refused(
    base: ClipBase, folder: Path, change: dict[str, object]
) -> None:
    tiny_adapter(base, folder, seed=1)
    _edit_config(folder, **change)
    with pytest.raises(AdapterError, match="says rank"):
        effective_weights(folder, base.build_model())


@pytest.mark.parametrize("text", ['{"lora_alpha": NaN}', '{"r": Infinity}', "[" * 100_000, '{"rank_pattern": [1]}'])
def test_a_configuration_that_means_nothing_is_refused(base: ClipBase, folder: Path, text: str) -> None:
    tiny_adapter(base, folder, seed=1)
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(AdapterError):
        read_adapter(folder)


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.int32])
def test_kinds_of_numbers_that_are_not_served_are_named(base: ClipBase, folder: Path, kind: torch.dtype) -> None:
    tiny_adapter(base, folder, seed=1)

    def convert(tensors: dict[str, torch.Tensor]) -> None:
        key = next(iter(tensors))
        tensors[key] = tensors[key].to(kind)

    _edit(folder, convert)
    with pytest.raises(AdapterError, match=f"is {kind}"):
        read_adapter(folder)
