"""Distillation of relations to prototypes from two teachers, weighted per sample by how reliable each is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ratchet_methods.objectives.prototypes import Prototypes
from updater.methods.batches import Features
from updater.methods.objectives import ClipObjective

TEACHERS = ("base", "incumbent")
SIDES = ("image", "text")


class TwoTeacherRelations(ClipObjective):
    """Distillation of intra- and inter-modal relations from two teachers (MulKI, Zhang et al. 2024).

    A teacher's prototypes are running means of its image and text features, per label, or per caption for pairs without
    one. A feature's relations are the softmax of its similarities to all image prototypes, and to all text prototypes.
    The student's image and text keep those of the teacher's image and text:

        sum over teachers m of w_m(i) * mean over the 4 relations r of KL(r_m(i) || r_student(i))

    with w(i) = softmax over m of the similarity of m's own image and text of pair i: the base leads where the incumbent
    has forgotten, the incumbent where it has learned. All similarities are divided by the model's temperature. Before
    the first step of a first update there are no prototypes, and the value is 0.

    With ``align``, features are also drawn to the prototypes of their own concept on the other side, as the incumbent
    has them: ``align`` times the cross-entropy of that concept among all, over rows whose concept has prototypes. The
    paper aligns sides by prototypes first; this form of it is ours.

    Args:
        align: weight of the alignment.
        most: concepts to keep, those seen last.
        window: samples that a mean covers.
    """

    def __init__(self, most: int = 512, window: int = 100, align: float = 0.0) -> None:
        self.align = align
        self.prototypes = Prototypes([f"{name}.{side}" for name in TEACHERS for side in SIDES], most, window, True)

    @property
    def teachers(self) -> tuple[str, ...]:
        return TEACHERS

    def begin(self, captions: Sequence[str], labels: Sequence[str]) -> None:
        self.prototypes.begin(labels)

    def __call__(self, batch: Features) -> Tensor:
        """Mean over rows, in nats."""
        if not self.prototypes.means:
            return batch.zero()
        rows = torch.zeros_like(batch.image[:, 0])
        for weight, name in zip(trust(batch), TEACHERS, strict=True):
            teacher = batch.teachers[name]
            anchors = [self.prototypes.of(f"{name}.{side}").T for side in SIDES]
            divergences = [
                _divergence(batch.scale * old @ anchor, batch.scale * new @ anchor)
                for new, old in ((batch.image, teacher.image), (batch.text, teacher.text))
                for anchor in anchors
            ]
            rows = rows + weight * torch.stack(divergences).mean(dim=0)
        return rows.mean() + (self.align * self._misalignment(batch) if self.align else 0)

    def _misalignment(self, batch: Features) -> Tensor:
        """Cross-entropy of each row's own concept among the incumbent's prototypes of the other side, in nats."""
        place = {concept: number for number, concept in enumerate(self.prototypes.means)}
        own = [(row, place[c]) for row, c in enumerate(self.prototypes.concepts(batch)) if c in place]
        if not own:
            return batch.zero()
        rows, concepts = torch.tensor(own, device=batch.image.device).T
        sides = (batch.image, "text"), (batch.text, "image")
        logits = [batch.scale * new[rows] @ self.prototypes.of(f"incumbent.{other}").T for new, other in sides]
        return torch.stack([functional.cross_entropy(each, concepts) for each in logits]).mean()

    def stepped(self, batch: Features) -> None:
        features = {f"{name}.{side}": getattr(batch.teachers[name], side) for name in TEACHERS for side in SIDES}
        self.prototypes.add(batch, features)

    def state(self) -> dict[str, Tensor]:
        return self.prototypes.state()

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        self.prototypes.load_state(tensors)


def trust(batch: Features) -> Tensor:
    """Weight of each teacher for each pair, [teachers, n]; sums to 1 over teachers."""
    teachers = [batch.teachers[name] for name in TEACHERS]
    return (batch.scale * torch.stack([(each.image * each.text).sum(dim=1) for each in teachers])).softmax(dim=0)


def _divergence(old: Tensor, new: Tensor) -> Tensor:
    """KL(softmax(old) || softmax(new)) of each row, from logits [n, k]."""
    before = old.log_softmax(dim=1)
    return (before.exp() * (before - new.log_softmax(dim=1))).sum(dim=1)
