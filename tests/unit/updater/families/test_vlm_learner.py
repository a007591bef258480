from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from core.errors import ConfigError
from ratchet_client.images import decode_image
from serving.engines.vlm.generation import question
from serving.engines.vlm.prompts import inputs
from serving.engines.vlm.vlm_base import VlmBase
from tests.support.tiny_vlm import tiny_vlm_adapter
from tests.unit.updater.builders import learner_of, picture, question_pools, questions, recipe
from updater.adapters import read_delta
from updater.adapters.trained_layers import vlm_layers
from updater.budget.flops import counted
from updater.data.pools import Pools, Question
from updater.families.vlm_reader import shown
from updater.methods.batches import summarise


@pytest.fixture
def base(vlm: VlmBase) -> VlmBase:
    return vlm


def _by_hand(base: VlmBase, model: torch.nn.Module, each: Question) -> tuple[torch.Tensor, list[int]]:
    """Logits before each token of the known answer, for one example alone."""
    tokenizer = base.processor().tokenizer
    answer = tokenizer(f"{each.answer}<end_of_utterance>", add_special_tokens=False)["input_ids"]
    return _at(base, model, each, answer), answer


def test_it_reads_what_serving_reads_and_answers_are_all_it_is_asked_for(base: VlmBase) -> None:
    """A batch of unequal lengths gives each row the same result as alone, at its answer and the end token."""
    pools = question_pools(new=7, reference=0)
    learner = learner_of(base, pools)
    made = learner.batch([4, 0, 5])
    model = base.build_model()
    for row, number in enumerate([4, 0, 5]):
        example = cast(Question, pools.new[number])
        logits, answer = _by_hand(base, model, example)
        mine = made.row == row
        assert made.target[mine].tolist() == answer
        assert answer[-1] == cast(Any, model).generation_config.eos_token_id
        assert torch.allclose(made.logits[mine], logits, atol=1e-4)


@pytest.mark.parametrize("changes", [{"image": {"locked": False}}, {"connector": {"locked": False}}])
def test_features_that_are_kept_and_pixels_that_are_not_give_the_same(base: VlmBase, changes: dict[str, Any]) -> None:
    pools = question_pools(new=6, reference=5)
    kept, anew = learner_of(base, pools), learner_of(base, pools, **changes)
    assert kept.keeps_features and not anew.keeps_features
    rows = [0, 3, 7, 10]
    assert torch.allclose(kept.batch(rows).logits, anew.batch(rows).logits, atol=1e-4)
    anew.forward_backward(rows)
    eyes = [p.grad for name, p in anew.parameters.items() if base.part_of(name.rsplit(".lora", 1)[0]) != "text"]
    assert eyes and any(grad is not None and float(grad.abs().sum()) > 0 for grad in eyes)


def test_the_base_teaches_without_the_adapter_and_the_incumbent_with_it(base: VlmBase, tmp_path: Path) -> None:
    """Even if the incumbent has changed the image tower, which is now locked: the incumbent keeps using its own."""
    tiny_vlm_adapter(base, tmp_path / "adapter", seed=1, parts=("image", "text"))
    start = read_delta(tmp_path / "adapter", base)
    pools = question_pools(new=3, reference=4)
    rows = [3, 4, 6]
    said = {}
    for teacher in ("base", "incumbent"):
        term = {"name": "token_distillation", "over": ["reference", "replay"], "options": {"teacher": teacher}}
        learner = learner_of(base, pools, start, objectives=[{"name": "answer_likelihood"}, term])
        assert learner.keeps_features
        made = learner.batch(rows)
        said[teacher] = made.teachers[teacher].logprobs
        with torch.no_grad(), learner.model.base():
            plain = torch.cat(
                [_by_hand(base, learner.model.model, cast(Question, pools.reference[n - 3]))[0] for n in rows]
            )
        own = summarise(made.logits.detach() if teacher == "incumbent" else plain, 256)
        assert torch.allclose(said[teacher], own.logprobs, atol=1e-4)
    assert not torch.allclose(said["base"], said["incumbent"], atol=1e-2)


def test_only_the_last_blocks_of_the_chosen_parts_learn(base: VlmBase) -> None:
    model = base.build_model()
    text = vlm_layers(base, model, recipe("vlm-default", text={"blocks": 1}))
    assert text and all(name.startswith("model.text_model.layers.1.") for name in text)
    parts = {"image": {"locked": False}, "connector": {"locked": False}, "text": {"locked": True}}
    eyes = vlm_layers(base, model, recipe("vlm-default", **parts))
    assert {base.part_of(name) for name in eyes} == {"image", "connector"}
    with pytest.raises(ConfigError, match="no layer"):
        vlm_layers(base, model, recipe("vlm-default", text={"blocks": 0}))
    with pytest.raises(ConfigError, match="no list of blocks"):
        vlm_layers(base, model, recipe("vlm-default", connector={"blocks": 1}))


def test_what_cannot_be_asked_or_is_too_long_is_not_taken(base: VlmBase) -> None:
    learner = learner_of(base, question_pools(new=1, reference=0))
    assert learner.takes(questions("car", 1)[0])
    for words in ("what is in <image>?", "so " * 600):
        assert not learner.takes(Question("bad", words, "yes", lambda: picture(1)))


def test_each_further_teacher_is_charged(base: VlmBase) -> None:
    pools = question_pools(new=6, reference=6)

    def gflops(*teachers: str) -> float:
        taught = [{"name": "token_distillation", "over": ["reference"], "options": {"teacher": t}} for t in teachers]
        with counted() as flops:
            learner_of(base, pools, objectives=[{"name": "answer_likelihood"}, *taught]).ready(range(12))
        return flops.gflops

    none, one, both = gflops(), gflops("base"), gflops("base", "incumbent")
    assert one > 1.5 * none
    assert both - one == pytest.approx(one - none, rel=0.15)  # the incumbent's goes through its adapter as well


def test_each_image_is_read_once(base: VlmBase) -> None:
    reads: dict[str, int] = {}

    def counting(each: Question) -> Question:
        def read() -> bytes:
            reads[each.id] = reads.get(each.id, 0) + 1
            return each.read()

        return Question(each.id, each.question, each.answer, read)

    learner = learner_of(
        base, Pools(tuple(map(counting, questions("car", 9))), tuple(map(counting, questions("house", 9))))
    )
    for _ in range(3):
        learner.forward_backward(list(range(18)))
    first = reads.pop("car-0")  # checked once more: whether its image features can be kept
    assert first == 2 and len(reads) == 17 and set(reads.values()) == {1}


SDFT = [{"name": "self_distillation", "over": ["new"], "options": {"keep": 0.5}}]


def test_a_model_that_distils_itself_answers_and_its_teacher_has_read_the_answer(base: VlmBase) -> None:
    """Its answers are sampled again from its current weights; the teacher's logits match those that a slower copy of
    the model gives after the known answer.
    """
    pools = question_pools(new=5, reference=2)
    learner = learner_of(base, pools, objectives=SDFT)
    rows = [0, 3, 6, 2]
    for _ in range(3):  # the student moves away from its momentum model
        learner.forward_backward(rows)
        learner.optimizer_step(0.05)
    answers = learner.batch(rows).own
    assert answers is not None and answers.row.unique().tolist() == [0, 1, 3], "the reference's row is not asked"
    assert not answers.teacher.requires_grad
    own = {row: tokens.tolist() for row, tokens in learner._own.items()}
    assert learner.batch(rows).own is not None and {r: t.tolist() for r, t in learner._own.items()} == own
    for place, number in ((0, 0), (1, 3), (3, 2)):
        example = cast(Question, pools.new[number])
        mine = answers.row == place
        assert torch.allclose(answers.logits[mine], _at(base, learner.model.model, example, own[number]), atol=1e-4)
        assert learner.momentum is not None
        with learner.model.holding(learner.momentum.values):
            after_example = _at(base, learner.model.model, shown(example), own[number])
        assert torch.allclose(answers.teacher[mine], after_example, atol=1e-4)
        assert not torch.allclose(answers.teacher[mine], answers.logits[mine], atol=1e-3)


def test_distilling_itself_in_micro_batches_has_the_same_gradient(base: VlmBase) -> None:
    pools = question_pools(new=6, reference=2)
    whole, parts = (learner_of(base, pools, objectives=SDFT, micro_batch=size) for size in (0, 2))
    rows = [0, 5, 1, 4]
    assert whole.forward_backward(rows)[0] == pytest.approx(parts.forward_backward(rows)[0], rel=1e-4)
    for name, parameter in whole.parameters.items():
        assert parameter.grad is not None and parts.parameters[name].grad is not None
        assert torch.allclose(parameter.grad, cast(torch.Tensor, parts.parameters[name].grad), atol=1e-5)


def _at(base: VlmBase, model: torch.nn.Module, each: Question, answer: list[int]) -> torch.Tensor:
    """Logits before each token of an answer, from the prompt as serving builds it."""
    batch = inputs(base.processor(), [question(np.array(decode_image(each.read())), each.question)])
    prompt = batch["input_ids"].shape[1]
    batch["input_ids"] = torch.cat([batch["input_ids"], torch.tensor([answer])], dim=1)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    with torch.no_grad():
        return cast(torch.Tensor, cast(Any, model)(**batch).logits[0][prompt - 1 : -1])
