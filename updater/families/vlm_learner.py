"""The learner of a VLM: likely answers to questions about images, close to those of teachers."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.digests import digest_json
from ratchet_client.images import open_accepted
from serving.engines.vlm.prompts import end_token
from serving.engines.vlm.vlm_base import VlmBase
from updater.adapters import LoraModel, WeightDelta
from updater.adapters.trained_layers import low_rank_layers, sees, vlm_layers
from updater.budget.bound import Size
from updater.data.pools import Question
from updater.families.vlm_reader import LONGEST, Read, Reader, Tokens, answered, pad, shown
from updater.methods.batches import AnswerBatch, OwnAnswers, Teacher, summarise
from updater.recipes import Recipe
from updater.step.learner import CHUNK, STAND_IN, Learner
from updater.step.shards import Values

TOP = 256
"""Tokens of a teacher's distribution that are kept one by one; the others are summed."""
OWN_TOKENS = 32
"""Maximum length of an answer that the model gives in training: each token is a pass."""
Inputs = Mapping[str, Any]


@dataclass(frozen=True)
class Checked:
    encoded: bytes
    tokens: int
    answer: int
    picture: int
    shown: int
    """Tokens of the question with the known answer before it, if an objective needs that."""

    @property
    def sizes(self) -> list[int]:
        return [self.tokens, self.answer, self.picture, self.shown]


class VlmLearner(Learner[Question]):
    """The learner of a VLM. Image tower and connector run once per example if they do not learn."""

    base: VlmBase

    def __init__(self, base: VlmBase, recipe: Recipe, start: WeightDelta, seed: int, device: str = "cpu") -> None:
        plain = base.build_model()
        trained = low_rank_layers(vlm_layers(base, plain, recipe), recipe, base.name)
        super().__init__(base, recipe, LoraModel(base, trained, recipe.rank, recipe.alpha, start, seed, device))
        self.reader = Reader(base)
        self.adapted_eyes = sees(base, self.model.base_names)
        inner = cast(Any, self.model.model).base_model
        takes_features = "mm_encoder_outputs" in inspect.signature(inner.forward).parameters
        self._takes_features = takes_features and not sees(base, trained)
        self.own_parts = {
            part for term, objective in self.objectives if objective.own_answers and term.weight > 0
            for part in term.over
        }  # fmt: skip
        self.seed = seed
        self._own: dict[int, Tensor] = {}
        self.keeps_features: bool | None = None
        self.longest_batch = 0
        self._unending = False
        """True while the model's own answers must not end before :data:`OWN_TOKENS`."""

    def takes(self, example: Question) -> bool:
        return self.reader.takes(example) and (not self.own_parts or self.reader.takes(shown(example)))

    @property
    def longest(self) -> int:
        return LONGEST

    def begin(self, between: Callable[[], None]) -> None:
        if self.keeps_features is None and self.examples:
            self.keeps_features = False
            if self._takes_features:
                size = sum(each.nbytes for each in self._see(self._first_images(), 1))
                self.keeps_features = 0 < size <= self.precomputed.room

    def _first_images(self) -> Inputs:
        """Inputs of the first readable example; of a stand-in if none of the first ones is readable."""
        for example in self.examples[:CHUNK]:
            encoded = example.read()
            with suppress(Exception):  # an example that cannot be prepared is left out later, by its name
                return self._read([example], [encoded]).images
        return self._read(self.examples[:1], [STAND_IN]).images

    @property
    def shard_choices(self) -> str:
        return f"{self.keeps_features}, by tiles, with sizes"

    def decode(self, example: Question, image: bytes) -> Checked:
        """Only check the image: large images are decoded again where they are used, one pass at a time."""
        picture = [np.array(open_accepted(image).decode())]
        read = self.reader.read([example], picture)
        (words,) = read.sequences
        shown_before = len(self.reader.read([shown(example)], picture).sequences[0]) if self.own_parts else 0
        values = sum(value.numel() for value in read.images.values())
        return Checked(image, len(words), words.answer, values, shown_before)

    def shard_size(self, rows: range, images: Sequence[Checked]) -> Size:
        return self._size([each.sizes for each in images])

    def size(self, rows: Sequence[int]) -> Size:
        """Count rows, and rows that the model answers itself; lengths are tokens of the longest question, with and
        without the known answer before it, and values of all pictures and of their squares unless features are kept."""
        sizes = [each.tolist() for each in self.shards.get("sizes", rows)]
        own = sum(self.parts[row] in self.own_parts for row in rows)
        return self._size(
            [
                (tokens + self.padding, answer, 0 if self.keeps_features else picture, shown_before)
                for tokens, answer, picture, shown_before in sizes
            ],
            own,
        )

    def _size(self, sizes: Sequence[Sequence[int]], own: int = 0) -> Size:
        tokens, answers, pictures, shown_before = zip(*sizes, strict=True)
        squares = math.hypot(*pictures)  # attention within each
        head = cast(Any, self.model.model).get_output_embeddings().weight
        passes = 3 + len(self.teacher_parts)  # forward twice at most, and backward; each teacher's
        gflops = 2 * head.numel() * sum(answers) * passes / 1e9
        return Size((len(sizes), own), (max(tokens), sum(pictures), squares, max(shown_before)), gflops)

    @property
    def answers_itself(self) -> bool:
        return bool(self.own_parts)

    @contextmanager
    def dearest(self) -> Iterator[None]:
        self._unending = True
        try:
            yield
        finally:
            self._unending = False

    def compute(self, rows: range, images: Sequence[Checked]) -> Values:
        values: dict[str, list[Tensor]] = {}
        for first in range(0, len(rows), CHUNK):
            for name, more in self._values(rows[first : first + CHUNK], images[first : first + CHUNK]).items():
                values.setdefault(name, []).extend(more)
        return values

    def _values(self, rows: range, checked: Sequence[Checked]) -> Values:
        examples = [self.examples[row] for row in rows]
        encoded = [each.encoded for each in checked]
        read = self._read(examples, encoded)
        values: dict[str, list[Tensor]] = {"answer": [torch.tensor(each.answer) for each in read.sequences]}
        values["sizes"] = [torch.tensor(each.sizes) for each in checked]
        for key in read.sequences[0].inputs:
            values[f"tokens.{key}"] = [each.inputs[key] for each in read.sequences]
        if self.keeps_features:
            # The processor does not say how many tiles each image has: then one at a time.
            features = self._see(read.images, len(rows)) or [
                self._see(self._read([example], [image]).images, 1)[0]
                for example, image in zip(examples, encoded, strict=True)
            ]
            beside = read.beside_pixels()
            values["features"] = features
            values |= {f"beside.{key}": [each[key] for each in beside] for key in beside[0]}
        else:
            features, beside = [], []
            values["encoded"] = [torch.frombuffer(bytearray(image), dtype=torch.uint8) for image in encoded]
        if self.parts[rows[0]] in self.own_parts:
            read_before = self._read([shown(each) for each in examples], encoded).sequences
            for key in read_before[0].inputs:
                values[f"shown.{key}"] = [each.prompt[key] for each in read_before]
        for name, parts in self.teacher_parts.items():
            if self.parts[rows[0]] not in parts:
                continue
            shared = self.keeps_features and (name == "incumbent" or not self.adapted_eyes)
            image_inputs = self._from_features(features, beside) if shared else read.images
            with self.model.base() if name == "base" else nullcontext():
                logits = self._logits(self.model.model, read.sequences, image_inputs)
            owner = _targets(read.sequences, logits.device)[1]
            summaries = summarise(logits.cpu(), TOP)
            own = [summaries[(owner.cpu() == place).nonzero().flatten()] for place in range(len(rows))]
            values[f"{name}.tokens"] = [each.tokens for each in own]
            values[f"{name}.logprobs"] = [each.logprobs for each in own]
            values[f"{name}.rest"] = [each.rest for each in own]
        return values

    def _read(self, examples: Sequence[Question], encoded: Sequence[bytes]) -> Read:
        with ThreadPoolExecutor(self.precomputed.threads, "decode") as pool:
            images = list(pool.map(lambda image: np.array(open_accepted(image).decode()), encoded))
        return self.reader.read(examples, images)

    def length(self, row: int) -> int:
        return self.reader.words(self.examples[row])

    def batch(self, rows: Sequence[int]) -> AnswerBatch:
        self.ready(rows)
        sequences = self._sequences(rows)
        self.longest_batch = self._longest(sequences)
        logits = self.passes(self._run, rows)
        target, row = _targets(sequences, logits.device)
        return AnswerBatch(
            part=tuple(self.parts[number] for number in rows),
            logits=logits,
            target=target,
            row=row,
            teachers={name: self._teacher(name, rows, sequences, logits) for name in self.teacher_parts},
            own=self._own_answers(rows) if self.own_parts else None,
        )

    def _own_answers(self, rows: Sequence[int]) -> OwnAnswers | None:
        places = [place for place, row in enumerate(rows) if self.parts[row] in self.own_parts]
        if not places or self.momentum is None:
            return None
        own_rows = [rows[place] for place in places]
        self._own = self._answer(list(dict.fromkeys(own_rows)))
        logits = self.passes(partial(self._run_own, "tokens"), own_rows)
        with torch.no_grad(), self.model.holding(self.momentum.values):
            teacher = self.passes(partial(self._run_own, "shown"), own_rows)
        row = torch.cat(
            [torch.full((len(self._own[row]),), place) for row, place in zip(own_rows, places, strict=True)]
        )
        return OwnAnswers(logits, teacher, row.to(logits.device))

    @torch.no_grad()
    def _answer(self, rows: Sequence[int]) -> dict[int, Tensor]:
        """Sample answer tokens for each row, up to the end token or :data:`OWN_TOKENS`; deterministic for the same rows
        and model."""
        dice = torch.Generator().manual_seed(int(digest_json([self.seed, list(rows)])[:15], 16))
        end = torch.tensor([end_token(self.reader.processor)])
        own = dict.fromkeys(rows, end[:0])
        left = list(rows)
        for _ in range(OWN_TOKENS):
            prompts = self._prompts("tokens", left)
            # The end token stands for the one to be drawn: logits are those before it.
            so_far = {row: answered(prompt, torch.cat([own[row], end])) for row, prompt in prompts.items()}
            ahead = {row: Tokens(each.inputs, 1) for row, each in so_far.items()}
            logits = self.passes(partial(self._logits_of, ahead), left)
            logits[:, self.reader.not_said] = -torch.inf
            drawn = torch.multinomial(logits.float().cpu().softmax(dim=1), 1, generator=dice)
            for row, token in zip(left, drawn, strict=True):
                own[row] = torch.cat([own[row], token])
            left = [row for row in left if self._unending or own[row][-1] != end[0]]
            if not left:
                break
        return own

    def _run_own(self, which: str, rows: Sequence[int]) -> Tensor:
        prompts = self._prompts(which, rows)
        return self._logits_of({row: answered(prompts[row], self._own[row]) for row in rows}, rows)

    def _logits_of(self, sequences: Mapping[int, Tokens], rows: Sequence[int]) -> Tensor:
        return self._logits(self.model.model, [sequences[row] for row in rows], self._eyes(rows))

    def _prompts(self, which: str, rows: Sequence[int]) -> dict[int, dict[str, Tensor]]:
        if which == "tokens":
            return {row: each.prompt for row, each in zip(rows, self._sequences(rows), strict=True)}
        return dict(zip(rows, self._kept("shown.", rows), strict=True))

    def _kept(self, prefix: str, rows: Sequence[int]) -> list[dict[str, Tensor]]:
        names = sorted(name for name in self.shards.names(rows[0]) if name.startswith(prefix))
        columns = {name.removeprefix(prefix): self.shards.get(name, rows) for name in names}
        return [{key: values[place] for key, values in columns.items()} for place in range(len(rows))]

    def _run(self, rows: Sequence[int]) -> Tensor:
        sequences = self._sequences(rows)
        return self._logits(self.model.model, sequences, self._eyes(rows), self._longest(sequences))

    def _longest(self, sequences: Sequence[Tokens]) -> int:
        return max(len(each) for each in sequences) + self.padding

    def _sequences(self, rows: Sequence[int]) -> list[Tokens]:
        kept = zip(self._kept("tokens.", rows), self.shards.get("answer", rows), strict=True)
        return [Tokens(inputs, int(answer)) for inputs, answer in kept]

    def plain(self, model: nn.Module, examples: Sequence[Question]) -> Tensor:
        """Padded to the length of the last batch, which a step is compared with."""
        read = self._read(examples, [each.read() for each in examples])
        logits = self._logits(model, read.sequences, read.images, self.longest_batch)
        return F.cross_entropy(logits, _targets(read.sequences, logits.device)[0])

    def _logits(self, model: nn.Module, sequences: Sequence[Tokens], image_inputs: Inputs, length: int = 0) -> Tensor:
        """Logits before each answer token of all sequences, one after another: float32 [t, vocabulary]."""
        vlm = cast(Any, model)
        device = next(model.parameters()).device
        batch = _to(pad(sequences, length), device)
        with self.computing():
            hidden = vlm.base_model(**batch, **_to(image_inputs, device), use_cache=False).last_hidden_state
        _, row = _targets(sequences, device)
        place = torch.cat([torch.arange(len(each) - each.answer, len(each)) for each in sequences]).to(device)
        return cast(Tensor, vlm.get_output_embeddings()(hidden[row, place - 1].float()))

    def _see(self, images: Inputs, count: int) -> list[Tensor]:
        """Connector outputs of ``count`` images, from the processor's outputs: [tiles, tokens, dim], or [tokens, dim]
        where the model separates them. Empty if they are more than one tensor, which has to be computed at each step,
        or belong to several tiled images."""
        inner = cast(Any, self.model.model).base_model
        with self.computing():
            output = inner.get_image_features(**_to(images, self.model.device), return_dict=True)
        given = output.pooler_output
        if set(output.keys()) - {"last_hidden_state", "pooler_output", "hidden_states", "attentions"}:
            return []
        self.stacked = isinstance(given, Tensor)
        if self.stacked:
            given = [given] if count == 1 else given.split(1)
        return [each.detach().cpu().clone() for each in given] if len(given) == count else []

    def _eyes(self, rows: Sequence[int]) -> Inputs:
        if not self.keeps_features:
            encoded = [image.numpy().tobytes() for image in self.shards.get("encoded", rows)]
            return self._read([self.examples[row] for row in rows], encoded).images
        return self._from_features(self.shards.get("features", rows), self._kept("beside.", rows))

    def _from_features(self, features: Sequence[Tensor], beside: Sequence[Mapping[str, Tensor]]) -> Inputs:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        own = [each.to(self.model.device, torch.float32) for each in features]
        seen = BaseModelOutputWithPooling(pooler_output=torch.cat(own) if self.stacked else tuple(own))
        return {
            "mm_encoder_outputs": {"image": seen},
            **{key: torch.cat([b[key] for b in beside]) for key in beside[0]},
        }

    def _teacher(self, name: str, rows: Sequence[int], sequences: Sequence[Tokens], logits: Tensor) -> Teacher:
        k = min(TOP, logits.shape[-1])
        places = [place for place, row in enumerate(rows) if self.parts[row] in self.teacher_parts[name]]
        known = [rows[place] for place in places]
        columns = [self.shards.get(f"{name}.{key}", known) for key in ("tokens", "logprobs", "rest")]
        by_place = {place: Teacher(*(column[i] for column in columns)) for i, place in enumerate(places)}
        teachers = [by_place.get(place) or _silence(each.answer, k) for place, each in enumerate(sequences)]
        parts = zip(*((each.tokens, each.logprobs, each.rest) for each in teachers), strict=True)
        return Teacher(*(torch.cat(part).to(logits.device) for part in parts))


def _targets(sequences: Sequence[Tokens], device: torch.device) -> tuple[Tensor, Tensor]:
    """Answer tokens of all sequences, one after another [t], and the number of the sequence of each [t]."""
    target = torch.cat([each.inputs["input_ids"][-each.answer :] for each in sequences])
    row = torch.cat([torch.full((each.answer,), number) for number, each in enumerate(sequences)])
    return target.to(device), row.to(device)


def _silence(tokens: int, k: int) -> Teacher:
    return Teacher(torch.zeros(tokens, k, dtype=torch.long), torch.zeros(tokens, k), torch.zeros(tokens))


def _to(values: Inputs, device: torch.device) -> dict[str, Any]:
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in values.items()}
