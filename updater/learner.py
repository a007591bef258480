"""One training step, whatever the model: rows of prepared examples in, loss and gradients out.

What differs between a CLIP and a VLM is in ``updater/families``: the course of an update is in ``updater/train.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from serving.engines.base import ClipBase
from serving.engines.vlm.base import VlmBase
from updater import objectives
from updater.adapters import LoraModel
from updater.objectives import Batch
from updater.pools import Pair, Question
from updater.recipes import Part, Recipe

Base = ClipBase | VlmBase
E = TypeVar("E", Pair, Question)


class Learner(ABC, Generic[E]):
    """A LoRA model, its optimizer and the recipe's loss."""

    def __init__(self, base: Base, recipe: Recipe, model: LoraModel) -> None:
        self.base = base
        self.recipe = recipe
        self.model = model
        self.objectives = objectives.build(recipe.objectives, recipe.family)
        self.parameters = model.parameters
        self.optimizer = torch.optim.AdamW(
            list(self.parameters.values()), lr=0.0, weight_decay=recipe.weight_decay, betas=(0.9, 0.98), foreach=False
        )

    def takes(self, example: E) -> bool:
        """Whether the model can learn from an example at all; others are left out of every pool."""
        return True

    @abstractmethod
    def prepare(self, examples: Sequence[E], parts: Sequence[Part], between: Callable[[], None] = lambda: None) -> None:
        """Compute once what no step changes. Steps refer to ``examples`` by number.

        The model is at its start: a resumed update prepares before it takes its parameters back. ``between`` is called
        after each chunk (duty cycle, signals).
        """

    @abstractmethod
    def length(self, row: int) -> int:
        """Tokens of an example; a batch takes as long as its longest."""

    @abstractmethod
    def batch(self, rows: Sequence[int]) -> Batch:
        """What the objectives compare, of some examples."""

    @abstractmethod
    def plain(self, model: nn.Module, examples: Sequence[E]) -> Tensor:
        """A scalar of the base's own ``model`` over examples: what full fine-tuning would compute, to be measured."""

    def loss(self, rows: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted loss of some examples, and each term alone."""
        return objectives.total(self.objectives, self.batch(rows))

    def backward(self, rows: Sequence[int]) -> tuple[float, dict[str, float]]:
        """Loss and gradients of some examples; parameters stay."""
        self.optimizer.zero_grad(set_to_none=True)
        loss, terms = self.loss(rows)
        loss.backward()  # type: ignore[no-untyped-call]
        self.model.restore()
        return float(loss.detach()), {name: float(value) for name, value in terms.items()}

    def update(self, rate: float) -> None:
        """One optimizer step at a learning rate, the gradient's norm bounded."""
        torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), self.recipe.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()

    def state(self) -> dict[str, Tensor]:
        """LoRA parameters and optimizer moments by name."""
        tensors = {f"parameter.{name}": p.detach().cpu().contiguous() for name, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take back what :meth:`state` gave. Raises KeyError or RuntimeError when it does not fit."""
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[f"parameter.{name}"])
            moments = {
                key: tensors[f"optimizer.{key}.{name}"].clone()
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"optimizer.{key}.{name}" in tensors
            }
            if moments:
                self.optimizer.state[parameter] = {
                    key: value if key == "step" else value.to(parameter.device) for key, value in moments.items()
                }


AnyLearner = Learner[Any]
