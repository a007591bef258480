"""One training step for any model: rows of prepared examples in, loss and gradients out. Differences between CLIP and
VLM are in ``updater/families``; the loop is in ``updater/training/trainer.py``."""

from __future__ import annotations

import io
import math
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from core.errors import ConfigError, TrainingError
from serving.engines.clip_base import ClipBase
from serving.engines.vlm.vlm_base import VlmBase
from updater.adapters import AdapterModel
from updater.budget.bound import Size
from updater.data.pools import Pair, Question
from updater.methods import objectives, optimizers, regularizers
from updater.methods.batches import Batch, Features
from updater.methods.objectives import Objective
from updater.methods.optimizers import Average, Momentum
from updater.methods.regularizers import Regularizer
from updater.recipes import PARTS, Part, Recipe, Term
from updater.step.passes import (
    ALONE,
    CachedPasses,
    Team,
    computing,
    harmonized_backward,
    training_precision,
    without_conflicts,
)
from updater.step.shards import Fetched, Shards, Values, spans

Base = ClipBase | VlmBase
E = TypeVar("E", Pair, Question)


def _grey_picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), (128, 128, 128)).save(file, "PNG")
    return file.getvalue()


STAND_IN: Final = _grey_picture()
"""Replaces an image that cannot be prepared, where its neighbours are computed; no step sees it."""
CHUNK = 48
"""Maximum examples in one pass of what is computed once, and in a shard unless the pool has its own size."""


@dataclass(frozen=True)
class Precomputed:
    folder: Path
    key: str = ""
    """Identifies what is computed, apart from the examples: base, recipe, incumbent. Shards with another key are made
    again."""
    rows: Mapping[str, int] = field(default_factory=dict)
    """Examples per step by pool; each step's are in shards of their own."""
    room: float = math.inf
    """Bytes on disk for one example; boundaries of frozen blocks that need more are computed at each step."""
    threads: int = 1


class Learner(ABC, Generic[E]):
    def __init__(self, base: Base, recipe: Recipe, model: AdapterModel) -> None:
        self.base = base
        self.recipe = recipe
        self.model = model
        self.precision = training_precision(recipe, base, model.device)
        self.objectives = objectives.build(recipe.objectives, recipe.family)
        self.regularizers = regularizers.build(recipe)
        self.parameters = model.parameters
        self.optimizer = optimizers.make(recipe.optimizer, self._groups(), recipe.weight_decay)
        for _, regularizer in self.regularizers:
            regularizer.begin(self.parameters)
        weighted = [(term, objective) for term, objective in self.objectives if term.weight > 0]
        self.teacher_parts: dict[str, set[Part]] = {}
        for term, objective in weighted:
            for part in term.over:
                for name in objective.teachers_of(part):
                    self.teacher_parts.setdefault(name, set()).add(part)
        followed = [o for _, o in weighted if "momentum" in o.teachers or o.own_answers]
        self.momentum = Momentum(self.parameters, *followed[0].momentum) if followed else None
        self.average = Average(self.parameters, recipe.average_every) if recipe.average_every else None
        started = "incumbent" in self.teacher_parts or any(objective.frozen_texts for _, objective in self.objectives)
        self._start = {name: p.detach().clone() for name, p in self.parameters.items()} if started else None
        self.afford: Callable[[float, float], float] = lambda most, least: math.inf
        """Called before something is prepared, with its maximum and minimum GFLOPs. Returns the GFLOPs that it may
        take, or raises."""
        self.shards = Shards(Path(), (), (), self._fetch, self._compute_at_start)
        self.passes = CachedPasses(recipe.micro_batch)
        self.team = ALONE
        self.padding = 0
        """Tokens added to each batch, see :meth:`padded`."""
        self._last: Batch | None = None
        self.left_out: list[int] = []
        """Rows given to :meth:`forward_backward` that the last step left out for their conflicts."""

    def join(self, team: Team) -> None:
        """Share the work of each step with other processes. Called before :meth:`prepare`, whose folder they share.
        Raises ConfigError if the recipe needs the gradient of each term."""
        if team.size > 1 and self.recipe.gradients.harmonize:
            raise ConfigError(
                f"recipe {self.recipe.name!r} has gradients.harmonize, which several processes cannot share.",
                "Set updater.workers to 1, or use another recipe.",
            )
        self.team = self.passes.team = team

    def _groups(self) -> list[dict[str, Any]]:
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.parameters.items():
            groups.setdefault(self.rate_of(name), []).append(parameter)
        return [{"params": parameters, "factor": factor} for factor, parameters in groups.items()]

    def rate_of(self, parameter: str) -> float:
        return 1.0

    def prepare(
        self, examples: Sequence[E], parts: Sequence[Part], precomputed: Precomputed | None = None,
        between: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """Set the examples that steps refer to by number. What no step changes is computed once for each, in shards,
        when a step first needs it. ``parts``: the pool of each. ``precomputed``: where shards are kept; by default in a
        temporary folder. ``between``: called after each shard (duty cycle, signals)."""
        if precomputed is None:
            self._own_folder = tempfile.TemporaryDirectory(prefix="ratchet-shards-")
            precomputed = Precomputed(Path(self._own_folder.name))
        self.close()
        self.examples: list[E] = list(examples)
        self.parts, self.precomputed = list(parts), precomputed
        layout = spans(self.parts, precomputed.rows, CHUNK)
        self.begin(between)
        contents = [f"{precomputed.key} {self.shard_choices} {each.content}" for each in self.examples]
        self.shards = Shards(
            precomputed.folder, layout, contents, self._fetch, self._compute_at_start, self.shard_size, between,
            self.team, lambda *gflops: self.afford(*gflops),
        )  # fmt: skip

    def begin(self, between: Callable[[], None]) -> None:
        """Called by :meth:`prepare` when the examples are known, before any shard is made."""

    def ready(self, rows: Sequence[int]) -> None:
        """Make missing shards of some examples. Raises DiskFull, and what :attr:`afford` raises."""
        self.shards.ready(rows)

    def usable(self, rows: Sequence[int]) -> list[int]:
        """Those of some ready rows that could be prepared; empty if nothing new is among them."""
        usable = [row for row in rows if row not in self.shards.left_out]
        return usable if any(self.parts[row] == "new" for row in usable) else []

    @abstractmethod
    def batch(self, rows: Sequence[int]) -> Batch:
        """Return the batch that objectives see of some examples, after making them ready."""

    def forward_backward(self, rows: Sequence[int], regularized: bool = True) -> tuple[float, dict[str, float]]:
        """Compute loss and gradients of some examples, and each term unweighted; parameters do not change."""
        self.optimizer.zero_grad(set_to_none=True)
        self.passes.drop()
        batch = self.batch(rows)
        alone: list[tuple[Term, Tensor]] = objectives.values(self.objectives, batch)
        if self.recipe.gradients.drop and isinstance(batch, Features):
            without_conflict = without_conflicts(_total(batch, alone), batch, self.recipe.gradients.drop)
            self.left_out = [row for number, row in enumerate(rows) if number not in without_conflict]
            batch = batch.select(without_conflict)
            alone = objectives.values(self.objectives, batch)
        self._last = batch
        if regularized:
            alone += [(t, r(self.parameters)) for t, r in self.regularizers if t.weight > 0]
        loss = _total(batch, alone)
        if self.recipe.gradients.harmonize and len(alone) > 1:
            learning = [parameter for parameter in self.parameters.values() if parameter.requires_grad]
            harmonized_backward([t.weight * value for t, value in alone], learning)
        else:
            loss.backward()  # type: ignore[no-untyped-call]
            if self.team.rank:  # independent of the rows' outputs, so equal in all processes: added once
                self.optimizer.zero_grad(set_to_none=True)
            self.passes.backward(after=self.model.restore)
            self.team.add_gradients(self.parameters.values())
        self.model.restore()
        return float(loss.detach()), {term.name: float(value.detach()) for term, value in alone}

    def optimizer_step(self, rate: float, step: int = 0, steps: int = 1) -> None:
        """Take one optimizer step with a bounded gradient norm, and update terms and running means. Raises
        TrainingError, and changes nothing, if the gradient is not finite."""
        norm = torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), self.recipe.clip_norm)
        if not torch.isfinite(norm):
            raise TrainingError(
                f"the gradient of step {step} is not finite (its norm is {float(norm)}, in {self.precision}).",
                f"Lower schedule.peak in recipe {self.recipe.name!r}, or look for broken samples in the newest data.",
            )
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

    def remembered(self) -> dict[str, Tensor]:
        state = {name + key: value for name, term in self._terms() for key, value in term.state().items()}
        return {name: value.detach().cpu().contiguous() for name, value in state.items()}

    def remember(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`remembered` returned, except terms that this recipe lacks."""
        for name, term in self._terms():
            if own := _under(tensors, name):
                term.load_state({key: value.to(self.model.device) for key, value in own.items()})

    def _terms(self) -> list[tuple[str, Objective[Any] | Regularizer]]:
        return [
            *((f"objective.{term.name}.", objective) for term, objective in self.objectives),
            *((f"regularizer.{term.name}.", regularizer) for term, regularizer in self.regularizers),
        ]

    def state(self) -> dict[str, Tensor]:
        tensors = {f"parameter.{name}": p.detach().cpu().contiguous() for name, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
        if self.momentum is not None:
            tensors |= {f"momentum.{name}": value.cpu().clone() for name, value in self.momentum.values.items()}
        if self.average is not None:
            tensors |= {f"average.{name}": value.cpu().clone() for name, value in self.average.state().items()}
        tensors |= {f"model.{name}": value.cpu().contiguous() for name, value in self.model.state().items()}
        # safetensors rejects two names of one tensor, such as a queue and its copy.
        return tensors | {name: value.clone() for name, value in self.remembered().items()}

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restore what :meth:`state` returned. Raises KeyError or RuntimeError if it does not fit."""
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

    def takes(self, example: E) -> bool:
        """True if the model can learn from an example; others are left out of every pool."""
        return True

    @property
    @abstractmethod
    def longest(self) -> int:
        """Maximum of :meth:`length`."""

    @abstractmethod
    def length(self, row: int) -> int:
        """Tokens of an example's words; a batch takes as long as its longest."""

    @abstractmethod
    def decode(self, example: E, image: bytes) -> Any:
        """Decode an example's image for the model, in any thread. Any exception means that the model cannot learn from
        this example."""

    @abstractmethod
    def compute(self, rows: range, images: Sequence[Any]) -> Values:
        """Compute what no step changes of some examples of one pool, from their images; without gradients, and with the
        model at its start."""

    @abstractmethod
    def shard_size(self, rows: range, images: Sequence[Any]) -> Size:
        """Size that determines the cost of :meth:`compute`."""

    @abstractmethod
    def size(self, rows: Sequence[int]) -> Size:
        """Size that determines the cost of a step on some ready examples."""

    @abstractmethod
    def plain(self, model: nn.Module, examples: Sequence[E]) -> Tensor:
        """A scalar computed by the base's own ``model`` over examples, to measure full fine-tuning."""

    @property
    def shard_choices(self) -> str:
        """Decisions of :meth:`begin` about the contents of shards, which are made again if these differ."""
        return ""

    @property
    def answers_itself(self) -> bool:
        """True if the cost of a step depends on the model's output in it."""
        return False

    def dearest(self) -> AbstractContextManager[None]:
        """Make a step take the maximum for its size inside the context, if :attr:`answers_itself`."""
        return nullcontext()

    def prepared_gflops(self) -> float:
        """GFLOPs of preparation so far in all attempts; independent of the order of shards."""
        return math.fsum(self.shards.gflops.values())

    def row_gflops(self, rows: Sequence[int]) -> dict[Part, float]:
        """Mean GFLOPs of preparing one example of each pool, over ``rows``, which are ready."""
        result: dict[Part, float] = {}
        for part in PARTS:
            if own := [row for row in rows if self.parts[row] == part]:
                result[part] = self.shards.mean_gflops(own)
        return result

    def texts_gflops(self) -> float:
        return 0.0

    def row_bytes(self) -> float:
        count = sum(len(self.shards.layout[number].rows) for number in self.shards.sizes)
        return sum(self.shards.sizes.values()) / count

    def computing(self) -> AbstractContextManager[None]:
        """Run passes of the model in the recipe's precision inside the context."""
        return computing(self.precision, self.model.device)

    @contextmanager
    def padded(self, tokens: int) -> Iterator[None]:
        """Lengthen batches beyond their longest text inside the context, to measure the cost of length."""
        self.padding = tokens
        try:
            yield
        finally:
            self.padding = 0

    @contextmanager
    def at_start(self) -> Iterator[None]:
        """Reset the model to the start of the update inside the context."""
        if self._start is None:
            yield
            return
        with self.model.holding(self._start):
            yield

    def _compute_at_start(self, rows: range, images: Sequence[Any]) -> Values:
        with self.at_start():
            return self.compute(rows, images)

    def _fetch(self, rows: range) -> Fetched:
        """Examples are read one after another, as the store is read in pages; decoding uses
        :attr:`Precomputed.threads`."""
        chosen = [self.examples[row] for row in rows]
        encoded = [example.read() for example in chosen]
        left_out: dict[int, str] = {}

        def decoded(row: int, example: E, image: bytes) -> Any:
            try:
                return self.decode(example, image)
            except MemoryError:
                raise
            except Exception as error:  # of an image library or a processor; one example must not end all others
                left_out[row] = f"{type(error).__name__}: {error}"[:300]
                return self.decode(example, STAND_IN)

        with ThreadPoolExecutor(self.precomputed.threads, "decode") as pool:
            return Fetched(list(pool.map(decoded, rows, chosen, encoded)), left_out)

    def close(self) -> None:
        self.shards.close()


def _total(batch: Batch, alone: Sequence[tuple[Term, Tensor]]) -> Tensor:
    return torch.stack([batch.zero(), *(term.weight * value for term, value in alone)]).sum()


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


AnyLearner = Learner[Any]
