from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.errors import AdapterError
from serving.engines.adapters import adapter_name, content_name, read_adapter
from serving.engines.clip_base import ClipBase
from serving.engines.lora import effective_weights
from tests.support.tiny import tiny_adapter

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]


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
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"lora_alpha": 400}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: torch.save({"x": torch.ones(1)}, folder / WEIGHTS), "not a safetensors file"),
        (lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"), "pickle files are never read"),
        *((lambda folder, keep=keep: _cut(folder, keep), "cut short") for keep in (0, 4, 200, -1)),
        (_flip_bit, "damaged or were changed"),
        (_change_config, "damaged or were changed"),
        (lambda folder: (folder / "ratchet.json").write_text("[1, 2"), "cannot be read"),
        *((lambda folder, name=name: (folder / name).unlink(), name) for name in (WEIGHTS, CONFIG, "ratchet.json")),
        *(
            (lambda folder, text=text: (folder / CONFIG).write_text(text), "")
            for text in ('{"lora_alpha": NaN}', '{"r": Infinity}', "[" * 100_000, '{"rank_pattern": [1]}')
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


def _first(tensors: Tensors, side: str = "lora_A") -> str:
    return next(key for key in tensors if key.endswith(f"{side}.weight"))


def _poison(value: float) -> Callable[[Tensors, Config], object]:
    return lambda tensors, _: next(iter(tensors.values())).view(-1)[:1].fill_(value)


def _as(kind: torch.dtype) -> Callable[[Tensors, Config], object]:
    return lambda tensors, _: tensors.update({_first(tensors): tensors[_first(tensors)].to(kind)})


def _empty(tensors: Tensors, _: Config) -> None:
    for key in tensors:
        tensors[key] = torch.zeros(0, 64) if "lora_A" in key else torch.zeros(64, 0)


def _add_layer(tensors: Tensors, config: Config) -> None:
    for side, shape in (("A", (4, 64)), ("B", (64, 4))):
        tensors[f"base_model.model.visual.nowhere.lora_{side}.weight"] = torch.randn(shape)
    config["target_modules"] += ["nowhere"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *((_poison(value), "not finite") for value in (float("nan"), float("inf"), float("-inf"))),
        *((_as(kind), f"is {kind}") for kind in (torch.float8_e4m3fn, torch.int32)),
        (lambda tensors, _: tensors.update({_first(tensors): torch.randn(4, 999)}), r"999.*do not fit"),
        (lambda tensors, _: tensors.pop(_first(tensors, "lora_B")), "only one of"),
        (lambda tensors, _: tensors.update({"visual.proj": torch.ones(64, 32)}), "not a LoRA tensor"),
        (lambda tensors, _: tensors.update({_first(tensors): torch.tensor(1.0)}), "no matrix"),
        (_empty, "says rank"),
        (_add_layer, r"no layer 'visual\.nowhere'"),
        *(
            (lambda _, config, change=change: config.update(change), "says rank")
            for change in ({"r": 0}, {"r": "4"}, {"r": None}, {"r": 8}, {"rank_pattern": {"c_fc": 9}})
        ),
        *(
            (lambda _, config, alpha=alpha: config.update(lora_alpha=alpha), r"alpha .* not a finite number")
            for alpha in ("8", None, True, [8], 10**400)
        ),
        (lambda _, config: config.update(rank_pattern={"(a+)+b": 4}), "not a plain name"),  # and not a program
    ],
)
def test_what_is_named_by_its_content_and_does_not_fit_is_refused_by_name(
    base: ClipBase, folder: Path, change: Callable[[Tensors, Config], object], message: str
) -> None:
    """As a faulty trainer would write it: the name fits the content."""
    tiny_adapter(base, folder, seed=1)
    tensors, config = load_file(folder / WEIGHTS), json.loads((folder / CONFIG).read_text())
    change(tensors, config)
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config))
    about = json.loads((folder / "ratchet.json").read_text())
    about["name"] = content_name(tensors, config, base.digest)
    (folder / "ratchet.json").write_text(json.dumps(about))
    with pytest.raises(AdapterError, match=message):
        effective_weights(folder, base.build_model())
