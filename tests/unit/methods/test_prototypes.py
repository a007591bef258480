"""Prototypes, and the objectives that compare with them, against plain loops."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from ratchet_methods.objectives.prototype_relation import PrototypeRelation
from ratchet_methods.objectives.prototypes import Prototypes
from ratchet_methods.objectives.two_teacher_relations import TwoTeacherRelations, trust
from serving.engines.clip_base import ClipBase
from tests.unit.updater.builders import batch, pairs, recipe
from tests.unit.updater.plain_rows import softmax
from updater.families.clip_learner import ClipLearner
from updater.methods.batches import Features, TeacherFeatures

CAPTIONS = ["a red car", "A blue car ", "a tree", "a house"]
Rows = list[list[float]]


def taught(labels: list[int], seed: int = 0) -> Features:
    """Rows with captions 0, 1, ... and two teachers."""
    made = batch(list(range(len(labels))), seed=seed)
    other = batch(list(range(len(labels))), seed=seed + 100)
    incumbent = TeacherFeatures(other.image.detach(), other.text.detach())
    return replace(made, label=torch.tensor(labels), teachers={**made.teachers, "incumbent": incumbent})


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def unit(a: list[float]) -> list[float]:
    return [x / math.sqrt(dot(a, a)) for x in a]


def divergence(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def mean(rows: Rows) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def test_a_prototype_is_the_mean_of_its_label_and_of_its_caption_where_there_is_none() -> None:
    made = taught([0, -1, 0, -1])
    kept = Prototypes(["image", "text"], most=9, window=9, captions=True)
    kept.begin(["car"])
    kept.add(made, {"image": made.image, "text": made.text})
    image = made.image.tolist()
    expected = [image[1], unit(mean([image[0], image[2]])), image[3]]  # the one seen last is last
    assert torch.allclose(kept.of("image"), torch.tensor(expected), atol=1e-6)
    assert torch.allclose(kept.of("text")[0], made.text[1], atol=1e-6)


def test_rows_without_a_label_make_no_prototype_unless_no_row_has_one() -> None:
    some, none = (Prototypes(["image"], most=9, window=9, captions=False) for _ in range(2))
    some.begin(["car"])
    some.add(taught([0, -1, 0, -1]), {"image": taught([0, -1, 0, -1]).image})
    assert len(some.means) == 1
    none.begin([])
    none.add(taught([-1, -1, -1, -1]), {"image": taught([-1, -1, -1, -1]).image})
    assert len(none.means) == 4


def test_after_its_window_a_mean_forgets_exponentially() -> None:
    kept = Prototypes(["image"], most=9, window=2, captions=False)
    kept.begin(["car"])
    made = taught([0, 0, 0, 0])
    kept.add(made, {"image": made.image})
    image = made.image.detach()
    expected = 0.125 * image[0] + 0.125 * image[1] + 0.25 * image[2] + 0.5 * image[3]
    assert torch.allclose(next(iter(kept.means.values()))[0], expected, atol=1e-6)


def test_only_the_concepts_seen_last_are_kept() -> None:
    kept = Prototypes(["image"], most=2, window=9, captions=False)
    kept.begin(["a", "b", "c"])
    made = taught([0, 1, 2, 0])
    kept.add(made, {"image": made.image})
    image = made.image.tolist()
    assert torch.allclose(kept.of("image"), torch.tensor([image[2], unit(mean([image[0], image[3]]))]), atol=1e-6)


def test_prototypes_are_found_again_by_their_words_when_the_numbers_are_others() -> None:
    first, second = (Prototypes(["image"], most=9, window=9, captions=False) for _ in range(2))
    first.begin(["bird", "car"])
    made = taught([0, 1, 1, 0])
    first.add(made, {"image": made.image})
    second.begin(["car"])
    second.load_state(first.state())
    later = taught([0, -1, -1, -1], seed=1)
    second.add(later, {"image": later.image})
    image = [*made.image.tolist()[1:3], later.image.tolist()[0]]
    assert len(second.means) == 2
    assert torch.allclose(second.of("image")[1], torch.tensor(unit(mean(image))), atol=1e-6)
    assert first.counts != second.counts


def test_the_teacher_that_knows_a_pair_has_its_weight() -> None:
    made = taught([-1, -1, -1])
    good = TeacherFeatures(made.image.detach(), made.image.detach())
    bad = TeacherFeatures(made.image.detach(), -made.image.detach())
    weights = trust(replace(made, teachers={"base": good, "incumbent": bad}))
    assert float(weights[0].min()) > 0.999
    for row, pair in enumerate(trust(made).T.tolist()):
        own = [made.teachers[name] for name in ("base", "incumbent")]
        assert pair == pytest.approx(
            softmax([made.scale * dot(s.image[row].tolist(), s.text[row].tolist()) for s in own])
        )


def test_two_teachers_relations_equal_the_plain_sum() -> None:
    earlier, made = taught([0, 1, 0, 1]), taught([1, 0, 1], seed=1)
    objective = TwoTeacherRelations()
    objective.begin(CAPTIONS, ["car", "tree"])
    assert objective(earlier).item() == 0
    objective.stepped(earlier)
    total = 0.0
    weights = trust(made).tolist()
    for m, name in enumerate(("base", "incumbent")):
        seen = earlier.teachers[name]
        anchors = [
            [unit(mean([side.tolist()[row] for row in rows])) for rows in ((0, 2), (1, 3))]
            for side in (seen.image, seen.text)
        ]
        teacher = made.teachers[name]
        for new, old in ((made.image, teacher.image), (made.text, teacher.text)):
            for i in range(3):
                for prototypes in anchors:
                    p = softmax([made.scale * dot(old[i].tolist(), anchor) for anchor in prototypes])
                    q = softmax([made.scale * dot(new[i].tolist(), anchor) for anchor in prototypes])
                    total += weights[m][i] * divergence(p, q) / 4 / 3
    assert float(objective(made)) == pytest.approx(total, rel=1e-4)


def second_update(earlier: Features, captions: list[str], labels: list[str]) -> PrototypeRelation:
    """PRD in an update after one that saw ``earlier``."""
    first, second = PrototypeRelation(), PrototypeRelation()
    first.begin(captions, labels)
    assert first(earlier).item() == 0
    first.stepped(earlier)
    assert first(earlier).item() == 0  # nothing yet that an earlier update has left
    second.load_state(first.state())
    second.begin(captions, labels)
    return second


def place_of(objective: PrototypeRelation, number: int) -> torch.Tensor:
    """Where an earlier update left a prototype, [dim]."""
    return list(objective.before.values())[number][0]


def test_prototype_relations_equal_the_plain_sum_as_prototypes_move() -> None:
    earlier, made = taught([0, 1, 0, 1]), taught([1, 1, -1], seed=1)
    objective = second_update(earlier, CAPTIONS, ["car", "tree"])
    before = [place_of(objective, k).tolist() for k in range(2)]
    objective.stepped(made)
    order = list(objective.before)  # car, tree; the one seen last is last
    moved = {concept: point[0].tolist() for concept, point in objective.prototypes.means.items()}
    teacher, new = made.teachers["incumbent"].image.tolist(), made.image.tolist()
    total = 0.0
    for k in range(2):
        p = softmax([dot(unit(before[k]), teacher[i]) / 0.1 for i in range(3)])
        q = softmax([dot(unit(moved[order[k]]), new[i]) / 0.1 for i in range(3)])
        total += divergence(p, q) / 2
    assert float(objective(made)) == pytest.approx(total, rel=1e-4)


def test_prototypes_learn_to_lie_at_their_images_and_to_keep_their_relations() -> None:
    """Those of earlier labels, too, of which no image comes again: they used to stay where they were."""
    earlier, made = taught([0, 1, 0, 1]), taught([2, 2, 2], seed=1)
    objective = second_update(earlier, CAPTIONS, ["car", "tree", "house"])
    begun = made.image.detach()[0]
    before, value = {c: p.clone() for c, p in objective.prototypes.means.items()}, float(objective(made))
    for _ in range(200):
        objective.stepped(made)
    own = objective.prototypes.means[list(objective.prototypes.means)[-1]][0]
    nearness = F.cosine_similarity(torch.stack([begun, own]), made.image.detach().mean(dim=0, keepdim=True))
    assert float(nearness[1]) > float(nearness[0])
    assert all(not torch.allclose(objective.prototypes.means[c], before[c]) for c in before)
    assert float(objective(made)) < 0.9 * value


@pytest.mark.parametrize(("name", "term"), [("prd", "prototype_relation"), ("two-teachers", "two_teacher_relations")])
def test_the_term_lowers_in_training_what_it_measures(base: ClipBase, name: str, term: str) -> None:
    """Two updates, the second on other data, in which the term is held once and hardly at all the other time."""

    def drift(weight: float) -> float:
        terms = [{"name": "contrastive"}, {"name": term, "weight": weight}]
        plan = recipe(name, objectives=terms)
        first = ClipLearner(base, plan, {}, seed=0)
        steps(first, "car")
        second = ClipLearner(base, plan, first.model.delta(), seed=1)
        second.remember(first.remembered())
        return steps(second, "house")[term]

    def steps(learner: ClipLearner, tag: str) -> dict[str, float]:
        learner.prepare(pairs(tag, 12), ["new"] * 12)
        for step in range(8):
            learner.forward_backward(range(12))
            learner.optimizer_step(3e-3, step, 8)
        return learner.forward_backward(range(12))[1]

    assert drift(50.0) < 0.7 * drift(1e-9)
