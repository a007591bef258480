"""Prototypes, and the objectives that compare with them, against plain loops."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ratchet_methods.objectives.prototype_relation import PrototypeRelation
from ratchet_methods.objectives.prototypes import Prototypes
from ratchet_methods.objectives.two_teacher_relations import TwoTeacherRelations, trust
from serving.engines.clip_base import ClipBase
from tests.unit.updater.builders import batch, pairs, recipe
from tests.unit.updater.plain_rows import dots, kl, mean_kl, softmax
from updater.families.clip_learner import ClipLearner
from updater.methods.batches import Features, TeacherFeatures

CAPTIONS = ["a red car", "A blue car ", "a tree", "a house"]


def taught(labels: list[int], seed: int = 0) -> Features:
    """Rows with captions 0, 1, ... and these labels."""
    return replace(batch(list(range(len(labels))), seed=seed), label=torch.tensor(labels))


def kept(made: Features, labels: list[str], **options: Any) -> Prototypes:
    found = Prototypes(["image"], **{"most": 9, "window": 9, "captions": False, **options})
    found.begin(labels)
    found.add(made, {"image": made.image})
    return found


def unit_mean(rows: Tensor) -> Tensor:
    return F.normalize(rows.detach().mean(dim=0), dim=0)


def test_a_prototype_is_the_mean_of_its_label_and_of_its_caption_where_there_is_none() -> None:
    made = taught([0, -1, 0, -1])
    found = Prototypes(["image", "text"], most=9, window=9, captions=True)
    found.begin(["car"])
    found.add(made, {"image": made.image, "text": made.text})
    expected = torch.stack([unit_mean(made.image[rows]) for rows in ([1], [0, 2], [3])])  # the one seen last is last
    assert torch.allclose(found.of("image"), expected, atol=1e-6)
    assert torch.allclose(found.of("text")[0], made.text[1], atol=1e-6)
    assert len(kept(made, ["car"]).means) == 1, "without captions"
    assert len(kept(taught([-1, -1, -1, -1]), []).means) == 4, "unless no row has a label"


def test_a_mean_forgets_exponentially_after_its_window_and_only_the_concepts_seen_last_are_kept() -> None:
    made = taught([0, 0, 0, 0])
    expected = torch.tensor([0.125, 0.125, 0.25, 0.5]) @ made.image.detach()
    assert torch.allclose(next(iter(kept(made, ["car"], window=2).means.values()))[0], expected, atol=1e-6)
    several = taught([0, 1, 2, 0])
    expected = torch.stack([unit_mean(several.image[rows]) for rows in ([2], [0, 3])])
    assert torch.allclose(kept(several, ["a", "b", "c"], most=2).of("image"), expected, atol=1e-6)


def test_prototypes_are_found_again_by_their_words_when_the_numbers_are_others() -> None:
    made, later = taught([0, 1, 1, 0]), taught([0, -1, -1, -1], seed=1)
    first, second = kept(made, ["bird", "car"]), Prototypes(["image"], most=9, window=9, captions=False)
    second.begin(["car"])
    second.load_state(first.state())
    second.add(later, {"image": later.image})
    assert len(second.means) == 2 and first.counts != second.counts
    assert torch.allclose(second.of("image")[1], unit_mean(torch.cat([made.image[1:3], later.image[:1]])), atol=1e-6)


def test_the_teacher_that_knows_a_pair_has_its_weight() -> None:
    made = taught([-1, -1, -1])
    good = TeacherFeatures(made.image.detach(), made.image.detach())
    bad = TeacherFeatures(made.image.detach(), -made.image.detach())
    weights = trust(replace(made, teachers={"base": good, "incumbent": bad}))
    assert float(weights[0].min()) > 0.999
    for row, pair in enumerate(trust(made).T.tolist()):
        own = [made.teachers[name] for name in ("base", "incumbent")]
        assert pair == pytest.approx(softmax([made.scale * float(s.image[row] @ s.text[row]) for s in own]), rel=1e-5)


def test_two_teachers_relations_equal_the_plain_sum() -> None:
    earlier, made = taught([0, 1, 0, 1]), taught([1, 0, 1], seed=1)
    objective = TwoTeacherRelations()
    objective.begin(CAPTIONS, ["car", "tree"])
    assert objective(earlier).item() == 0
    objective.stepped(earlier)
    total = 0.0
    for weights, name in zip(trust(made).tolist(), ("base", "incumbent"), strict=True):
        seen, teacher = earlier.teachers[name], made.teachers[name]
        for new, old in ((made.image, teacher.image), (made.text, teacher.text)):
            for side in (seen.image, seen.text):
                anchors = torch.stack([unit_mean(side[rows]) for rows in ([0, 2], [1, 3])])
                rows = zip(weights, dots(old, anchors, made.scale), dots(new, anchors, made.scale), strict=True)
                total += sum(weight * kl(before, after) for weight, before, after in rows) / 4 / 3
    assert float(objective(made)) == pytest.approx(total, rel=1e-4)


def test_two_teachers_draw_a_feature_to_its_concept_on_the_other_side() -> None:
    earlier, made = taught([0, 1, 0, 1]), taught([1, 0, 2], seed=1)
    plain, aligned = TwoTeacherRelations(), TwoTeacherRelations(align=0.5)
    for objective in (plain, aligned):
        objective.begin(CAPTIONS, ["car", "tree", "a label of no earlier row"])
        objective.stepped(earlier)
    seen, drawn = earlier.teachers["incumbent"], 0.0
    for new, side in ((made.image, seen.text), (made.text, seen.image)):
        anchors = torch.stack([unit_mean(side[rows]) for rows in ([0, 2], [1, 3])])
        for row, concept in ((0, 1), (1, 0)):
            drawn -= math.log(softmax(dots(new, anchors, made.scale)[row])[concept]) / 2 / 2
    assert float(aligned(made)) == pytest.approx(float(plain(made)) + 0.5 * drawn, rel=1e-4)
    strangers = replace(made, label=torch.full_like(made.label, 2))
    assert float(aligned(strangers)) == pytest.approx(float(plain(strangers)))


def second_update(earlier: Features, captions: list[str], labels: list[str]) -> PrototypeRelation:
    """PRD in an update after one that saw ``earlier``."""
    first, second = PrototypeRelation(), PrototypeRelation()
    first.begin(captions, labels)
    assert first(earlier).item() == 0
    first.stepped(earlier)
    assert first(earlier).item() == 0  # nothing left by an earlier update yet
    second.load_state(first.state())
    second.begin(captions, labels)
    return second


def test_prototype_relations_equal_the_plain_sum_as_prototypes_move() -> None:
    earlier, made = taught([0, 1, 0, 1]), taught([1, 1, -1], seed=1)
    objective = second_update(earlier, CAPTIONS, ["car", "tree"])
    before = torch.cat(list(objective.before.values()))  # car, tree
    objective.stepped(made)
    now = torch.cat([objective.prototypes.means[concept] for concept in objective.before])
    old = dots(F.normalize(before, dim=1), made.teachers["incumbent"].image, 10)
    assert float(objective(made)) == pytest.approx(
        mean_kl(old, dots(F.normalize(now, dim=1), made.image, 10)), rel=1e-4
    )


def test_prototypes_learn_to_lie_at_their_images_and_to_keep_their_relations() -> None:
    """Including those of earlier labels without new images, which used to stay where they were."""
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


@pytest.mark.long
@pytest.mark.parametrize(("name", "term"), [("prd", "prototype_relation"), ("two-teachers", "two_teacher_relations")])
def test_the_term_lowers_in_training_what_it_measures(base: ClipBase, name: str, term: str) -> None:
    """Two updates, the second on other data, with the term strongly and then weakly weighted."""

    def steps(learner: ClipLearner, tag: str) -> float:
        learner.prepare(pairs(tag, 12), ["new"] * 12)
        for step in range(8):
            learner.forward_backward(range(12))
            learner.optimizer_step(3e-3, step, 8)
        return learner.forward_backward(range(12))[1][term]

    def drift(weight: float) -> float:
        plan = recipe(name, objectives=[{"name": "contrastive"}, {"name": term, "weight": weight}])
        first = ClipLearner(base, plan, {}, seed=0)
        steps(first, "car")
        second = ClipLearner(base, plan, first.model.delta(), seed=1)
        second.remember(first.remembered())
        return steps(second, "house")

    assert drift(50.0) < 0.7 * drift(1e-9)
