"""One training step, whatever the model: rows of prepared examples in, loss and gradients out.

What differs between a CLIP and a VLM is in ``updater/families``: the course of an update is in ``updater/train.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from serving.engines.base import ClipBase
from serving.engines.vlm.base import VlmBase
from updater import objectives, optimizers, regularizers
from updater.adapters import AdapterModel
from updater.averaging import Average
from updater.cached_gradients import CachedPasses
from updater.gradients import harmonized_backward, without_conflicts
from updater.momentum import Momentum
from updater.objectives import Batch, Features
from updater.pools import Pair, Question
from updater.recipes import Part, Recipe, Term

Base = ClipBase | VlmBase
E = TypeVar("E", Pair, Question)


class Learner(ABC, Generic[E]):
    """A model with an adapter in training, its optimizer and the recipe's loss."""

    def __init__(self, base: Base, recipe: Recipe, model: AdapterModel) -> None:
        self.base = base
        self.recipe = recipe
        self.model = model
        self.objectives = objectives.build(recipe.objectives, recipe.family)
        self.regularizers = regularizers.build(recipe)
        self.parameters = model.parameters
        self.optimizer = optimizers.make(recipe.optimizer, self._groups(), recipe.weight_decay)
        for _, regularizer in self.regularizers:
            regularizer.begin(self.parameters)
        taught = [o for term, o in self.objectives if "momentum" in o.teachers and term.weight > 0]
        self.momentum = Momentum(self.parameters, *taught[0].momentum) if taught else None
        self.average = Average(self.parameters, recipe.average_every) if recipe.average_every else None
        self.passes = CachedPasses(recipe.micro_batch)
        self._last: Batch | None = None
        self.left_out: list[int] = []
        """Rows that the last step left out for their conflicts, as :meth:`backward` was given them."""

    def _groups(self) -> list[dict[str, Any]]:
        """Parameters by the factor on their learning rate."""
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.parameters.items():
            groups.setdefault(self.rate_of(name), []).append(parameter)
        return [{"params": parameters, "factor": factor} for factor, parameters in groups.items()]

    def rate_of(self, parameter: str) -> float:
        """The recipe's factor on the learning rate of a parameter."""
        return 1.0

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

    def backward(self, rows: Sequence[int], regularized: bool = True) -> tuple[float, dict[str, float]]:
        """Loss and gradients of some examples, and each term alone, unweighted; parameters stay."""
        self.optimizer.zero_grad(set_to_none=True)
        self.passes.drop()
        batch = self.batch(rows)
        alone: list[tuple[Term, Tensor]] = objectives.values(self.objectives, batch)
        if self.recipe.gradients.drop and isinstance(batch, Features):
            kept = without_conflicts(_total(batch, alone), batch, self.recipe.gradients.drop)
            self.left_out = [row for number, row in enumerate(rows) if number not in kept]
            batch = batch.select(kept)
            alone = objectives.values(self.objectives, batch)
        self._last = batch
        if regularized:
            alone += [(t, r(self.parameters)) for t, r in self.regularizers if t.weight > 0]
        loss = _total(batch, alone)
        if self.recipe.gradients.harmonize and len(alone) > 1:
            harmonized_backward([t.weight * value for t, value in alone], list(self.parameters.values()))
        else:
            loss.backward()  # type: ignore[no-untyped-call]
            self.passes.backward(after=self.model.restore)
        self.model.restore()
        return float(loss.detach()), {term.name: float(value.detach()) for term, value in alone}

    def update(self, rate: float, step: int = 0, steps: int = 1) -> None:
        """One optimizer step at a learning rate, the gradient's norm bounded, and what follows from it."""
        torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), self.recipe.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        self.optimizer.step()
        with torch.no_grad():
            self.model.stepped(step, steps)
            for term, objective in self.objectives:
                if self._last is not None and term.weight > 0 and (rows := self._last.rows(term.over)):
                    objective.stepped(self._last.select(rows))
            for _, regularizer in self.regularizers:
                regularizer.stepped(self.parameters)
            if self.momentum is not None:
                self.momentum.stepped(self.parameters)
            if self.average is not None:
                self.average.stepped(self.parameters)

    def settle(self) -> None:
        """After the last step: bring the parameters to what the update hands over."""
        if self.average is not None:
            self.average.settle(self.parameters)

    def remembered(self) -> dict[str, Tensor]:
        """What objectives and regularizers keep for the next update, by name."""
        found = {f"objective.{t.name}.{key}": value for t, o in self.objectives for key, value in o.state().items()}
        found |= {
            f"regularizer.{t.name}.{key}": value for t, r in self.regularizers for key, value in r.state().items()
        }
        return {name: value.detach().cpu().contiguous() for name, value in found.items()}

    def remember(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what :meth:`remembered` gave; what is of no term of this recipe is left out."""
        device = self.model.device
        for term, objective in self.objectives:
            if own := _under(tensors, f"objective.{term.name}."):
                objective.load_state({key: value.to(device) for key, value in own.items()})
        for term, regularizer in self.regularizers:
            if own := _under(tensors, f"regularizer.{term.name}."):
                regularizer.load_state({key: value.to(device) for key, value in own.items()})

    def state(self) -> dict[str, Tensor]:
        """Parameters, optimizer moments, and what terms and teachers remember, by name."""
        tensors = {f"parameter.{name}": p.detach().cpu().contiguous() for name, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
        if self.momentum is not None:
            tensors |= {f"momentum.{name}": value.cpu().clone() for name, value in self.momentum.values.items()}
        if self.average is not None:
            tensors |= {f"average.{name}": value.cpu().clone() for name, value in self.average.state().items()}
        tensors |= {f"model.{name}": value.cpu().contiguous() for name, value in self.model.state().items()}
        # Two names of one tensor, a queue and its copy say, cannot both be in a file of safetensors.
        return tensors | {name: value.clone() for name, value in self.remembered().items()}

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take back what :meth:`state` gave. Raises KeyError or RuntimeError when it does not fit."""
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[f"parameter.{name}"])
            moments = {
                key.split(".", 2)[1]: value.clone()
                for key, value in tensors.items()
                if key.startswith("optimizer.") and key.split(".", 2)[2] == name
            }
            if moments:
                self.optimizer.state[parameter] = {
                    key: value if key == "step" else value.to(parameter.device) for key, value in moments.items()
                }
        if self.momentum is not None:
            for name, value in self.momentum.values.items():
                value.copy_(tensors[f"momentum.{name}"])
        if self.average is not None:
            self.average.load_state(_under(tensors, "average."))
        self.model.load_state(_under(tensors, "model."))
        self.remember(tensors)


def _total(batch: Batch, alone: Sequence[tuple[Term, Tensor]]) -> Tensor:
    return torch.stack([batch.zero(), *(term.weight * value for term, value in alone)]).sum()


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


AnyLearner = Learner[Any]
