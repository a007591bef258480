"""The learner of a VLM: answers to questions about images, likely and as the teacher would give them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ops.progress import track
from serving.engines.vlm.base import VlmBase
from updater.adapters import Delta, LoraModel
from updater.families.vlm.parts import sees, trained_modules
from updater.families.vlm.reader import Read, Reader, Tokens, pad
from updater.learner import Learner
from updater.objectives import Answers, Teacher
from updater.objectives.token_distillation import TokenDistillation, summarise
from updater.pools import Question
from updater.recipes import Part, Recipe

CHUNK = 48
CACHE_BYTES = 4 << 30
"""Most memory for what the image tower gives; more is computed anew at each step."""
TOP = 256
"""Tokens of a teacher's distribution that are kept one by one; the others are one."""
Inputs = Mapping[str, Any]


class VlmLearner(Learner[Question]):
    """Where image tower and connector do not learn, what they give is computed once per example."""

    base: VlmBase

    def __init__(self, base: VlmBase, recipe: Recipe, start: Delta, seed: int, device: str = "cpu") -> None:
        plain = base.build_model()
        trained = trained_modules(base, plain, recipe)
        super().__init__(base, recipe, LoraModel(base, trained, recipe.rank, recipe.alpha, start, seed, device))
        self.reader = Reader(base)
        self.adapted_eyes = sees(base, self.model.base_names)
        inner = cast(Any, self.model.model).base_model
        takes_features = "mm_encoder_outputs" in inspect.signature(inner.forward).parameters
        self.keeps_features = takes_features and not sees(base, trained)
        self.teachers: dict[str, set[Part]] = {}
        for term, objective in self.objectives:
            if isinstance(objective, TokenDistillation) and term.weight > 0:
                for part in term.over:
                    self.teachers.setdefault(objective.teacher_of(part) or objective.teacher, set()).add(part)

    def takes(self, example: Question) -> bool:
        return self.reader.takes(example)

    def prepare(
        self, examples: Sequence[Question], parts: Sequence[Part], between: Callable[[], None] = lambda: None
    ) -> None:
        self.examples = list(examples)
        self.parts = list(parts)
        self.sequences: list[Tokens] = []
        self.features: list[Tensor] = []
        self.beside: list[dict[str, Tensor]] = []
        self.encoded: list[bytes] = []
        self.taught: dict[str, dict[int, Teacher]] = {name: {} for name in self.teachers}
        for start in track(range(0, len(examples), CHUNK), "teacher answers"):
            encoded = [each.read() for each in examples[start : start + CHUNK]]
            read = self.reader.read(examples[start : start + CHUNK], encoded)
            self._prepare(read, start, encoded)
            between()

    @torch.no_grad()
    def _prepare(self, read: Read, start: int, encoded: list[bytes]) -> None:
        count = len(read.sequences)
        self.sequences += read.sequences
        features = self._see(read.images) if self.keeps_features else []
        if self.keeps_features and start == 0:
            size = sum(each.numel() * each.element_size() for each in features)
            self.keeps_features = bool(features) and size / count * len(self.examples) <= CACHE_BYTES
        if self.keeps_features:
            self.features += features
            self.beside += read.beside_pixels()
        else:
            self.encoded += encoded
        for name, parts in self.teachers.items():
            rows = [row for row in range(count) if self.parts[start + row] in parts]
            shared = self.keeps_features and (name == "incumbent" or not self.adapted_eyes)
            if rows and shared:
                eyes = self._eyes([start + row for row in rows])
            elif rows:
                eyes = self.reader.read(*self._some(start, rows, encoded)).images
            else:
                continue
            with self.model.base() if name == "base" else nullcontext():
                sequences = [read.sequences[row] for row in rows]
                logits = self._logits(self.model.model, sequences, eyes)
            owner = _targets(sequences, logits.device)[1]
            said = summarise(logits.cpu(), TOP)
            for place, row in enumerate(rows):
                self.taught[name][start + row] = said[(owner.cpu() == place).nonzero().flatten()]

    def _some(self, start: int, rows: Sequence[int], encoded: Sequence[bytes]) -> tuple[list[Question], list[bytes]]:
        return [self.examples[start + row] for row in rows], [encoded[row] for row in rows]

    def length(self, row: int) -> int:
        return len(self.sequences[row])

    def batch(self, rows: Sequence[int]) -> Answers:
        logits = self.passes(self._run, rows)
        target, row = _targets([self.sequences[number] for number in rows], logits.device)
        return Answers(
            part=tuple(self.parts[number] for number in rows),
            logits=logits,
            target=target,
            row=row,
            teachers={name: self._teacher(name, rows, logits) for name in self.teachers},
        )

    def _run(self, rows: Sequence[int]) -> Tensor:
        return self._logits(self.model.model, [self.sequences[number] for number in rows], self._eyes(rows))

    def plain(self, model: nn.Module, examples: Sequence[Question]) -> Tensor:
        read = self.reader.read(examples, [each.read() for each in examples])
        longest = max(len(each) for each in self.sequences)
        logits = self._logits(model, read.sequences, read.images, longest)
        return F.cross_entropy(logits, _targets(read.sequences, logits.device)[0])

    def _logits(self, model: nn.Module, sequences: Sequence[Tokens], eyes: Inputs, length: int = 0) -> Tensor:
        """Before each answer token of all sequences, one after another: logits [t, vocabulary]."""
        vlm = cast(Any, model)
        device = next(model.parameters()).device
        batch = _to(pad(sequences, length), device)
        hidden = vlm.base_model(**batch, **_to(eyes, device), use_cache=False).last_hidden_state
        _, row = _targets(sequences, device)
        place = torch.cat([torch.arange(len(each) - each.answer, len(each)) for each in sequences]).to(device)
        return cast(Tensor, vlm.get_output_embeddings()(hidden[row, place - 1]).float())

    def _see(self, images: Inputs) -> list[Tensor]:
        """Image by image what the connector gives, from the processor's outputs; empty when that is more than one
        tensor, and has to be computed at each step."""
        inner = cast(Any, self.model.model).base_model
        made = inner.get_image_features(**_to(images, self.model.device), return_dict=True)
        given = made.pooler_output
        if set(made.keys()) - {"last_hidden_state", "pooler_output", "hidden_states", "attentions"}:
            return []
        self.stacked = isinstance(given, Tensor)
        return [each.detach().cpu().clone() for each in given]

    def _eyes(self, rows: Sequence[int]) -> Inputs:
        """What the model takes of images, for a batch: features if they are kept, else pixels."""
        if not self.keeps_features:
            chosen = [self.examples[row] for row in rows], [self.encoded[row] for row in rows]
            return self.reader.read(*chosen).images
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        own = [self.features[row].to(self.model.device) for row in rows]
        seen = BaseModelOutputWithPooling(pooler_output=torch.stack(own) if self.stacked else tuple(own))
        beside = {key: torch.cat([self.beside[row][key] for row in rows]) for key in self.beside[0]}
        return {"mm_encoder_outputs": {"image": seen}, **beside}

    def _teacher(self, name: str, rows: Sequence[int], logits: Tensor) -> Teacher:
        k = min(TOP, logits.shape[-1])
        known = self.taught[name]
        said = [known.get(row) or _silence(self.sequences[row].answer, k) for row in rows]
        return Teacher(
            torch.cat([each.tokens for each in said]).to(logits.device),
            torch.cat([each.logprobs for each in said]).to(logits.device),
            torch.cat([each.rest for each in said]).to(logits.device),
        )


def _targets(sequences: Sequence[Tokens], device: torch.device) -> tuple[Tensor, Tensor]:
    """Each answer token of all sequences, one after another [t], and the sequence that it is of [t]."""
    target = torch.cat([each.inputs["input_ids"][-each.answer :] for each in sequences])
    row = torch.cat([torch.full((each.answer,), number) for number, each in enumerate(sequences)])
    return target.to(device), row.to(device)


def _silence(tokens: int, k: int) -> Teacher:
    """A place holder for rows that no objective compares with a teacher."""
    return Teacher(torch.zeros(tokens, k, dtype=torch.long), torch.zeros(tokens, k), torch.zeros(tokens))


def _to(values: Inputs, device: torch.device) -> dict[str, Any]:
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in values.items()}
