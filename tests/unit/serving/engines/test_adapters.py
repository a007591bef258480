from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from core.errors import AdapterError
from serving.engines.adapters import adapter_name, content_name, read_adapter, write_adapter
from serving.engines.clip import ClipEngine
from serving.engines.clip_base import ClipBase
from serving.engines.heads import HEADS, Head, backed_off, heads_digest, read_heads, write_heads
from serving.engines.layers import shell_of
from serving.engines.lora import effective_weights
from serving.engines.processor import golden_pixels
from tests.support.heads import random_head
from tests.support.tiny import tiny_adapter

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
LAYER = "visual.transformer.resblocks.0.mlp.c_fc"
NORM = "visual.ln_post.weight"
PLAIN = {"r": 2, "lora_alpha": 4, "target_modules": []}
TEXTS = ["a cat", "two dogs on the beach at night"]
DIM = 6
Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]


def test_names_follow_content_and_a_directory_is_never_rewritten(base: ClipBase, tmp_path: Path) -> None:
    one = tiny_adapter(base, tmp_path / "a", seed=1)
    again = tiny_adapter(base, tmp_path / "b", seed=1)
    other = tiny_adapter(base, tmp_path / "c", seed=2)
    assert one == again == adapter_name(tmp_path / "a") != other
    assert one.startswith("clip-") and len(one) == len("clip-") + 12
    files = read_adapter(tmp_path / "a")
    scaled = content_name(files.tensors, files.config | {"lora_alpha": 5}, base.digest)
    elsewhere = content_name(files.tensors, files.config, "0" * 64)
    assert len({one, scaled, elsewhere}) == 3
    # What a run leaves behind (dropout, paths, sets in another order) is not content.
    aside = files.config | {"lora_dropout": 0.3, "target_modules": set(files.config["target_modules"])}
    assert content_name(files.tensors, aside, base.digest) == one
    before = (tmp_path / "a" / WEIGHTS).stat().st_mtime_ns
    assert tiny_adapter(base, tmp_path / "a", seed=1) == one
    with pytest.raises(AdapterError, match="never rewritten"):
        tiny_adapter(base, tmp_path / "a", seed=2)
    assert (tmp_path / "a" / WEIGHTS).stat().st_mtime_ns == before
    assert adapter_name(tmp_path / "a") == one
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def _cut(folder: Path, keep: int) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:keep])


def _flip_bit(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])


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
def test_damaged_files_are_refused(
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


def _overflow(tensors: Tensors, config: Config) -> None:
    """A whole weight and a low-rank change, each of finite values."""
    config["r"] = 2
    tensors.clear()
    tensors[f"{PREFIX}{LAYER}.weight"] = torch.full((256, 64), 3e38)
    tensors[f"{PREFIX}{LAYER}.lora_A.weight"] = torch.full((2, 64), 1e19)
    tensors[f"{PREFIX}{LAYER}.lora_B.weight"] = torch.full((256, 2), 1e19)


def _replace(name: str, value: torch.Tensor) -> Callable[[Tensors, Config], object]:
    return lambda tensors, _: tensors.update({f"{PREFIX}{name}": value})


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
        (_overflow, "overflow"),
        *(
            (_replace(name, torch.ones(size)), rf"no parameter {name} \[{size}\]")
            for name, size in (("visual.nowhere.weight", 64), (NORM, 65), (NORM, 1), (LAYER, 64))  # 1 would broadcast
        ),
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


@pytest.mark.parametrize("field", ["use_dora", "lora_bias", "target_parameters", "modules_to_save"])
def test_other_kinds_of_adapters_are_refused_by_name(base: ClipBase, folder: Path, field: str) -> None:
    config = {"r": 4, "lora_alpha": 4, "target_modules": ["attn"], field: True}
    with pytest.raises(AdapterError, match=field):
        write_adapter(folder, {"x.lora_A.weight": torch.ones(4, 4)}, config, base)


def _with_random_lora(base: ClipBase, **config: Any) -> tuple[nn.Module, LoraConfig]:
    torch.manual_seed(0)
    lora = LoraConfig(**({"r": 4, "lora_alpha": 6, "init_lora_weights": False} | config))
    return get_peft_model(base.build_model(), lora).eval(), lora


def _raw(model: nn.Module, base: ClipBase) -> tuple[np.ndarray, np.ndarray]:
    with torch.inference_mode():
        pixels = base.preprocess.normalise(golden_pixels(base.preprocess.size))
        tokens = base.tokenizer()(TEXTS)
        return model.encode_image(pixels).numpy(), model.encode_text(tokens).numpy()


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["attn", "c_fc", "c_proj"]},
        {"target_modules": ["attn"], "use_rslora": True},
        {"target_modules": ["c_fc", "c_proj"], "rank_pattern": {"c_fc": 2}, "alpha_pattern": {"c_proj": 9}},
        {"target_modules": ["attn", "c_fc"], "rank_pattern": {"visual.transformer.resblocks.0.attn": 3}},
    ],
    ids=["all layers", "attention, rslora", "ranks and alphas", "one attention"],
)
def test_transformer_layers_merge_as_in_peft(base: ClipBase, folder: Path, config: dict[str, Any]) -> None:
    wrapped, lora = _with_random_lora(base, **config)
    write_adapter(folder, get_peft_model_state_dict(wrapped), lora.to_dict(), base)
    model = base.build_model()
    merged = shell_of(model, effective_weights(folder, model))
    theirs, ours, plain = _raw(wrapped.base_model.model, base), _raw(merged, base), _raw(model, base)
    for tower in (0, 1):
        np.testing.assert_allclose(ours[tower], theirs[tower], rtol=0, atol=1e-5)
        assert np.abs(plain[tower] - theirs[tower]).max() > 1e-2


def parameters(base: ClipBase) -> Tensors:
    return {name: parameter.detach() for name, parameter in base.build_model().named_parameters()}


def write(base: ClipBase, folder: Path, changes: Tensors) -> str:
    return write_adapter(folder, {f"{PREFIX}{name}": value for name, value in changes.items()}, PLAIN, base)


def test_whole_and_low_rank_changes_of_one_weight_add_up(base: ClipBase, folder: Path) -> None:
    new = 2 * parameters(base)[f"{LAYER}.weight"]
    a, b = torch.randn(2, new.shape[1]), torch.randn(new.shape[0], 2)
    write(base, folder, {f"{LAYER}.weight": new, f"{LAYER}.lora_A.weight": a, f"{LAYER}.lora_B.weight": b})
    changed = effective_weights(folder, base.build_model())
    torch.testing.assert_close(changed[f"{LAYER}.weight"], new + 2 * b @ a)


@pytest.mark.parametrize(
    ("touched", "image", "text"),
    [
        ([NORM], True, False),
        (["visual.proj"], True, False),
        (["text_projection"], False, True),
        (["positional_embedding", "visual.class_embedding"], True, True),
        (["logit_scale"], False, False),
        (["ln_final.bias"], False, False),  # it is 0, and twice that is no change
    ],
)
def test_a_changed_tower_has_a_new_space(
    base: ClipBase, folder: Path, touched: list[str], image: bool, text: bool
) -> None:
    own = parameters(base)
    name = write(base, folder, {each: 2 * own[each] for each in touched})
    spaces = ClipEngine(base, device="cpu").load(name, folder)
    assert (spaces.image != base.spaces.image) == image
    assert (spaces.text != base.spaces.text) == text


def test_answers_are_those_of_gaussians_with_one_covariance() -> None:
    made = random_head(DIM)
    x = np.random.default_rng(1).normal(size=(4, DIM))
    answers = made.classify(x)
    for row, point in enumerate(x):
        distances = [float((point - m) @ made.precision @ (point - m)) for m in [*made.means, made.center]]
        likelihoods = [float(np.exp(-0.5 * made.scale * d)) for d in distances]
        assert answers.probabilities[row] == pytest.approx(
            [v / sum(likelihoods[:3]) for v in likelihoods[:3]], rel=1e-4
        )
        alone = [v / (v + likelihoods[3]) for v in likelihoods[:3]]
        assert answers.alone[row] == pytest.approx(alone, rel=1e-4)
        assert answers.distance[row] == pytest.approx(min(distances[:3]) / 9.0, rel=1e-4)


def test_a_label_that_is_a_path_backs_off_to_the_level_that_is_sure() -> None:
    labels, shares = ["bird/crane", "bird/gull", "birdcage", "fish/cod"], [0.5, 0.25, 0.2, 0.05]
    assert backed_off(labels, shares, 0.0) == ("bird/crane", 0.5)
    assert backed_off(labels, shares, 0.6) == ("bird", 0.75)
    assert backed_off(labels, shares, 0.8) == (None, 0.0)
    assert backed_off(["plain", "other"], [0.4, 0.6], 0.5) == ("other", 0.6)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("one/means", np.full((3, DIM), np.nan, np.float32)), ("one/means", np.zeros((2, DIM), np.float32)),
        ("one/precision", np.zeros((DIM, DIM + 1), np.float32)), ("one/center", np.zeros(DIM, np.float64)),
        ("other", np.zeros(3, np.float32)),
    ],
)  # fmt: skip
def test_a_damaged_file_of_heads_is_refused(tmp_path: Path, name: str, value: np.ndarray) -> None:
    write_heads(tmp_path, {"one": random_head(DIM)})
    about = json.dumps({"one": random_head(DIM).about})
    arrays = load_file(tmp_path / HEADS) | {name: torch.from_numpy(value)}
    save_file(arrays, tmp_path / HEADS, metadata={"heads": about})
    with pytest.raises(AdapterError, match="head"):
        read_heads(tmp_path)
    (tmp_path / HEADS).write_bytes(b"no heads")
    with pytest.raises(AdapterError, match="holds no heads"):
        read_heads(tmp_path)


def test_a_head_is_a_part_of_its_adapter_whose_name_it_is_in(base: ClipBase, tmp_path: Path) -> None:
    plain = tiny_adapter(base, tmp_path / "plain", seed=1)
    files = read_adapter(tmp_path / "plain")

    def written(folder: str, **heads: Head) -> str:
        return write_adapter(tmp_path / folder, files.tensors, files.config, base, heads)

    head = random_head(base.dim)
    name = written("headed", one=head, two=random_head(base.dim, seed=2))
    others = [written("one", one=head), written("two", two=head), written("sure", one=replace(head, threshold=8.0))]
    assert len({plain, name, *others}) == 5 and read_adapter(tmp_path / "headed").name == name
    engine = ClipEngine(base, "cpu")
    engine.load(plain, tmp_path / "plain")
    engine.load(name, tmp_path / "headed")
    assert engine.heads(plain) == engine.heads(None) == {} and list(engine.heads(name)) == ["one", "two"]
    assert heads_digest({"one": engine.heads(name)["one"]}) == heads_digest({"one": head})
    assert engine.spaces(plain) == engine.spaces(name)  # nothing is embedded again
    odd = written("odd", things=random_head(base.dim + 1))
    with pytest.raises(AdapterError, match="dimensions"):
        engine.load(odd, tmp_path / "odd")
    (tmp_path / "headed" / HEADS).unlink()
    with pytest.raises(AdapterError, match="damaged or were changed"):
        read_adapter(tmp_path / "headed")
