"""One training step: rows of prepared samples in, loss and gradients out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from serving.engines.base import ClipBase
from updater import objectives
from updater.adapters import Delta, LoraModel
from updater.objectives import Batch
from updater.pools import Pair, caption_numbers
from updater.prepare import Prepared, stack_boundaries
from updater.recipes import Part, Recipe
from updater.towers import SplitTower, Which, first_touched, trained_modules

WHICH: tuple[Which, Which] = ("image", "text")


class Learner:
    """A LoRA model, its optimizer and the recipe's loss."""

    def __init__(self, base: ClipBase, recipe: Recipe, start: Delta, seed: int, device: str = "cpu") -> None:
        plain = base.build_model()
        trained = trained_modules(base, plain, recipe)
        self.base = base
        self.recipe = recipe
        self.model = LoraModel(base, trained, recipe.rank, recipe.alpha, start, seed, device)
        touched = self.model.base_names
        self.learning: dict[Which, bool] = {
            which: any(name.startswith("visual.") == (which == "image") for name in trained) for which in WHICH
        }
        self.towers = {
            which: SplitTower(self.model.model, which, first_touched(touched, plain, which)) for which in WHICH
        }
        self.objectives = objectives.build(recipe.objectives)
        self.scale = 1 / recipe.temperature if recipe.temperature else float(plain.logit_scale.exp())  # type: ignore[operator]
        self.parameters = self.model.parameters
        self.optimizer = torch.optim.AdamW(
            list(self.parameters.values()), lr=0.0, weight_decay=recipe.weight_decay, betas=(0.9, 0.98), foreach=False
        )
        self._tokenize = base.tokenizer()
        self._blank = torch.zeros(1, 3, base.preprocess.size, base.preprocess.size, device=self.model.device)

    def see(self, made: Prepared, pairs: Sequence[Pair], parts: Sequence[Part]) -> None:
        """Tell what the samples are that steps refer to by number."""
        numbers = caption_numbers(pairs)
        self.made = made
        self.parts = list(parts)
        self.captions = torch.tensor([numbers[pair.text.strip().lower()] for pair in pairs])

    def loss(self, rows: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted loss of some samples, and each term alone."""
        index = torch.tensor(rows)
        device = self.model.device
        batch = Batch(
            image=self.features("image", rows),
            text=self.features("text", rows),
            teacher_image=self.made.image.teacher[index].to(device),
            teacher_text=self.made.text.teacher[index].to(device),
            caption=self.captions[index].to(device),
            part=tuple(self.parts[row] for row in rows),
            scale=self.scale,
        )
        return objectives.total(self.objectives, batch)

    def features(self, which: Which, rows: Sequence[int]) -> Tensor:
        """Student features [n, dim] of unit length, from as far up the tower as possible."""
        cache = self.made.image if which == "image" else self.made.text
        device = self.model.device
        if cache.fixed is not None:
            return cache.fixed[torch.tensor(rows)].to(device)
        inputs = self._blank
        if which == "text":
            inputs = self._tokenize([self.made.texts[row] for row in rows]).to(device)
        elif not cache.boundary:
            pixels = torch.stack([cache.pixels[row] for row in rows]).numpy()
            return self.towers[which].whole(self.base.preprocess.normalise(pixels, device))
        if not cache.boundary:
            return self.towers[which].whole(inputs)
        length = inputs.shape[1] if which == "text" else None
        return self.towers[which].resume(stack_boundaries([cache.boundary[r] for r in rows], length, device), inputs)

    def backward(self, rows: Sequence[int]) -> tuple[float, dict[str, float]]:
        """Loss and gradients of some samples; parameters stay."""
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
