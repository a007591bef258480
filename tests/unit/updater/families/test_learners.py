from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from core.errors import ConfigError
from ratchet_client.images import decode_image
from serving.engines.clip_base import ClipBase, tower_of
from serving.engines.lora import effective_weights
from serving.engines.vlm.generation import question
from serving.engines.vlm.prompts import inputs
from serving.engines.vlm.vlm_base import VlmBase
from tests.support.tiny_vlm import tiny_vlm_adapter
from tests.support.vlm_families import write_family
from tests.unit.updater.builders import learner_of, picture, png, question_pools, questions, recipe, run
from updater.adapters import read_delta
from updater.adapters.trained_layers import (
    Which,
    clip_layers,
    first_touched,
    low_rank_layers,
    tower_blocks,
    vlm_layers,
)
from updater.bases.register import add_vlm
from updater.data.pools import Pools, Question
from updater.families.clip_towers import SplitTower, stack_boundaries
from updater.families.vlm_reader import shown
from updater.methods.batches import summarise


@pytest.mark.parametrize("which", ["image", "text"])
@pytest.mark.parametrize("cut", [1, 2])
def test_the_boundary_gives_the_same_features(base: ClipBase, which: Which, cut: int) -> None:
    tower = SplitTower(base.build_model(), which, cut)
    inputs = torch.randn(5, 3, 32, 32) if which == "image" else base.tokenizer()(["a", "b c", "d", "e f g", "h"])
    with torch.no_grad():
        features, boundary = tower.record(inputs)
        order = [3, 0, 4]
        rest = inputs[order] if which == "text" else torch.zeros(1, 3, 32, 32)
        again = tower.resume(stack_boundaries([boundary[i] for i in order], None, torch.device("cpu")), rest)
        assert torch.allclose(again, features[order], atol=1e-6)
        assert torch.allclose(tower.whole(inputs), features, atol=1e-6)


def test_only_the_last_blocks_and_what_follows_learn(base: ClipBase) -> None:
    model = base.build_model()
    assert tower_blocks(model, "image") == ("visual.transformer.resblocks", 2)
    assert tower_blocks(model, "text") == ("transformer.resblocks", 2)
    names = clip_layers(base, model, recipe(image={"blocks": 1}, text={"locked": True}))
    assert names and all(name.startswith("visual.transformer.resblocks.1.") for name in names)
    assert first_touched(names, model, "image") == 1
    assert first_touched(names, model, "text") == 2  # nothing learns there: all of it is prefix
    everything = clip_layers(base, model, recipe(image={}, text={}))
    assert first_touched(everything, model, "image") == first_touched(everything, model, "text") == 0
    with pytest.raises(ConfigError, match="no layer"):
        clip_layers(base, model, recipe(image={"blocks": 0}, text={"locked": True}))


def test_the_slow_tower_moves_less_and_the_other_one_as_before(base: ClipBase, tmp_path: Path) -> None:
    start = base.build_model().state_dict()

    def moved(rate: float) -> dict[str, float]:
        folder = tmp_path / str(rate)
        made = run(base, folder, recipe=recipe("slow-tower", max_steps=3, image={"blocks": 3, "rate": rate}))
        squared = {"image": 0.0, "text": 0.0}
        for name, weight in effective_weights(made.directory, base.build_model()).items():
            squared[tower_of(name)] += float((weight - start[name]).square().sum())
        return {tower: value**0.5 for tower, value in squared.items()}

    slow, even = moved(recipe("slow-tower").image.rate), moved(1.0)
    assert 0 < slow["image"] < 0.2 * even["image"]
    assert 0.8 * even["text"] < slow["text"] < 1.25 * even["text"]


def logits_at(base: VlmBase, model: torch.nn.Module, each: Question, answer: list[int]) -> torch.Tensor:
    """Logits before each token of an answer to one example alone, from the prompt as serving builds it."""
    batch = inputs(base.processor(), [question(np.array(decode_image(each.read())), each.question)])
    prompt = batch["input_ids"].shape[1]
    batch["input_ids"] = torch.cat([batch["input_ids"], torch.tensor([answer])], dim=1)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    with torch.no_grad():
        return cast(torch.Tensor, cast(Any, model)(**batch).logits[0][prompt - 1 : -1])


def known_answer(base: VlmBase, each: Question) -> list[int]:
    tokenizer = base.processor().tokenizer
    return list(tokenizer(f"{each.answer}<end_of_utterance>", add_special_tokens=False)["input_ids"])


def test_it_reads_what_serving_reads_and_answers_are_all_it_is_asked_for(vlm: VlmBase) -> None:
    """A batch of unequal lengths gives each row the same result as alone, at its answer and the end token."""
    pools, model = question_pools(new=7, reference=0), vlm.build_model()
    learner = learner_of(vlm, pools)
    made = learner.batch([4, 0, 5])
    for row, number in enumerate([4, 0, 5]):
        example, mine = cast(Question, pools.new[number]), made.row == row
        answer = known_answer(vlm, example)
        assert made.target[mine].tolist() == answer
        assert answer[-1] == cast(Any, model).generation_config.eos_token_id
        assert torch.allclose(made.logits[mine], logits_at(vlm, model, example, answer), atol=1e-4)
    assert learner.takes(questions("car", 1)[0])
    for words in ("what is in <image>?", "so " * 600):
        assert not learner.takes(Question("bad", words, "yes", lambda: picture(1)))


@pytest.mark.parametrize("changes", [{"image": {"locked": False}}, {"connector": {"locked": False}}])
def test_features_that_are_kept_and_pixels_that_are_not_give_the_same(vlm: VlmBase, changes: dict[str, Any]) -> None:
    pools, rows = question_pools(new=6, reference=5), [0, 3, 7, 10]
    kept, anew = learner_of(vlm, pools), learner_of(vlm, pools, **changes)
    assert kept.keeps_features and not anew.keeps_features
    assert torch.allclose(kept.batch(rows).logits, anew.batch(rows).logits, atol=1e-4)
    anew.forward_backward(rows)
    eyes = [p.grad for name, p in anew.parameters.items() if vlm.part_of(name.rsplit(".lora", 1)[0]) != "text"]
    assert eyes and any(grad is not None and float(grad.abs().sum()) > 0 for grad in eyes)


def test_the_base_teaches_without_the_adapter_and_the_incumbent_with_it(vlm: VlmBase, tmp_path: Path) -> None:
    """Even if the incumbent has changed the image tower, which is now locked: the incumbent keeps using its own."""
    tiny_vlm_adapter(vlm, tmp_path / "adapter", seed=1, parts=("image", "text"))
    start, pools = read_delta(tmp_path / "adapter", vlm), question_pools(new=3, reference=4)
    said = {}
    for teacher in ("base", "incumbent"):
        term = {"name": "token_distillation", "over": ["reference", "replay"], "options": {"teacher": teacher}}
        learner = learner_of(vlm, pools, start, objectives=[{"name": "answer_likelihood"}, term])
        assert learner.keeps_features
        made = learner.batch([3, 4, 6])
        said[teacher] = made.teachers[teacher].logprobs
        own = made.logits.detach()
        if teacher == "base":
            examples = [cast(Question, pools.reference[number]) for number in (0, 1, 3)]
            with torch.no_grad(), learner.model.base():
                own = torch.cat([logits_at(vlm, learner.model.model, e, known_answer(vlm, e)) for e in examples])
        assert torch.allclose(said[teacher], summarise(own, 256).logprobs, atol=1e-4)
    assert not torch.allclose(said["base"], said["incumbent"], atol=1e-2)


def test_only_the_last_blocks_of_the_chosen_parts_learn(vlm: VlmBase) -> None:
    model = vlm.build_model()
    text = vlm_layers(vlm, model, recipe("vlm-default", text={"blocks": 1}))
    assert text and all(name.startswith("model.text_model.layers.1.") for name in text)
    parts = {"image": {"locked": False}, "connector": {"locked": False}, "text": {"locked": True}}
    eyes = vlm_layers(vlm, model, recipe("vlm-default", **parts))
    assert {vlm.part_of(name) for name in eyes} == {"image", "connector"}
    for part, message in (("text", "no layer"), ("connector", "no list of blocks")):
        with pytest.raises(ConfigError, match=message):
            vlm_layers(vlm, model, recipe("vlm-default", **{part: {"blocks": part == "connector"}}))


def test_lora_learns_in_attention_alone_where_its_option_says_so(base: ClipBase, vlm: VlmBase) -> None:
    def layers(name: str, chosen: list[str], options: dict[str, Any]) -> list[str]:
        return low_rank_layers(chosen, recipe(name, adapter={"kind": "lora", "options": options}), "a base")

    for name, chosen in (
        ("default", clip_layers(base, base.build_model(), recipe(image={"blocks": 1}, text={"blocks": 1}))),
        ("vlm-attention", vlm_layers(vlm, vlm.build_model(), recipe("vlm-attention"))),
    ):
        attention = layers(name, chosen, {"layers": "attention"})
        assert attention and set(attention) < set(chosen) == set(layers(name, chosen, {}))
        assert not any("mlp" in each for each in attention) and any("mlp" in each for each in chosen)
    assert len(attention) == 4 * 2  # query, key, value and output of each block
    for options in ({"layers": "mlp"}, {"layres": "attention"}):
        with pytest.raises(ConfigError, match="not known"):
            layers("default", chosen, options)
    with pytest.raises(ConfigError, match="no layer"):
        layers("default", ["model.mlp"], {"layers": "attention"})


def test_a_model_that_distils_itself_answers_and_its_teacher_has_read_the_answer(vlm: VlmBase) -> None:
    """Its answers are sampled again from its current weights; the teacher's logits match those that a slower copy of
    the model gives after the known answer.
    """
    pools = question_pools(new=5, reference=2)
    sdft = [{"name": "self_distillation", "over": ["new"], "options": {"keep": 0.5}}]
    learner, rows = learner_of(vlm, pools, objectives=sdft), [0, 3, 6, 2]
    for _ in range(3):  # the student moves away from its momentum model
        learner.forward_backward(rows)
        learner.optimizer_step(0.05)
    answers = learner.batch(rows).own
    assert answers is not None and answers.row.unique().tolist() == [0, 1, 3], "the reference's row is not asked"
    assert not answers.teacher.requires_grad
    own = {row: tokens.tolist() for row, tokens in learner._own.items()}
    assert learner.batch(rows).own is not None and {r: t.tolist() for r, t in learner._own.items()} == own
    assert learner.momentum is not None
    for place, number in ((0, 0), (1, 3), (3, 2)):
        example, mine = cast(Question, pools.new[number]), answers.row == place
        alone = logits_at(vlm, learner.model.model, example, own[number])
        with learner.model.holding(learner.momentum.values):
            after_example = logits_at(vlm, learner.model.model, shown(example), own[number])
        assert torch.allclose(answers.logits[mine], alone, atol=1e-4)
        assert torch.allclose(answers.teacher[mine], after_example, atol=1e-4)
        assert not torch.allclose(answers.teacher[mine], answers.logits[mine], atol=1e-3)


# Processors that cut a picture into tiles

TILED = {
    "SmolVLM": {"do_image_splitting": True, "size": {"longest_edge": 64}},
    "InternVL": {"crop_to_patches": True, "min_patches": 1, "max_patches": 4},
}
SIZES = [(32, 32), (64, 32), (32, 64), (64, 48), (96, 32), (9, 200)]


@pytest.fixture(scope="module", params=sorted(TILED))
def tiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VlmBase:
    home = tmp_path_factory.mktemp(request.param)
    write_family(request.param, home / "model")
    changed = 0
    for file in (home / "model").glob("*processor*.json"):
        values = json.loads(file.read_text())
        changed += _cut_into_tiles(values, TILED[request.param])
        file.write_text(json.dumps(values))
    assert changed
    return add_vlm(home, "tiled", home / "model")


def _cut_into_tiles(values: dict[str, Any], tiled: dict[str, Any]) -> int:
    found = int(next(iter(tiled)) in values)
    if found:
        values.update(tiled)
    return found + sum(_cut_into_tiles(each, tiled) for each in values.values() if isinstance(each, dict))


def asked(sizes: list[tuple[int, int]]) -> Pools:
    noise = np.random.default_rng(0)
    images = [png(noise.integers(0, 255, (height, width, 3), dtype=np.uint8)) for width, height in sizes]
    return Pools(
        tuple(Question(f"{n}", "which colour?", "red", partial(bytes, image)) for n, image in enumerate(images))
    )


def test_features_of_tiles_that_are_kept_and_pixels_that_are_not_give_the_same(tiled: VlmBase) -> None:
    kept, anew = learner_of(tiled, asked(SIZES)), learner_of(tiled, asked(SIZES), image={"locked": False})
    assert kept.keeps_features and not anew.keeps_features
    rows = [1, 0, 3, 5]
    assert torch.allclose(kept.batch(rows).logits, anew.batch(rows).logits, atol=1e-4)


@pytest.mark.parametrize("sizes", [SIZES * 2, [(64, 32)] * 12], ids=["many shapes", "one shape"])
def test_an_update_ends_whatever_its_pictures_are(tiled: VlmBase, tmp_path: Path, sizes: list[tuple[int, int]]) -> None:
    result = run(tiled, tmp_path, recipe=recipe("vlm-naive", max_steps=3, batch_size=4), pools=asked(sizes))
    assert (result.steps, result.visited) == (3, 12)
