"""A tiny VLM that was taught colours in a few seconds, adapters that change it in known ways, and gate runs of them."""

from __future__ import annotations

import csv
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn

from core.loading import load_settings
from core.settings import Settings
from serving.engines.adapters import WEIGHTS, read_adapter, write_adapter
from serving.engines.vlm.generation import ABOUT_IMAGE, question
from serving.engines.vlm.prompts import answer_tokens, inputs
from serving.engines.vlm.vlm_base import VlmBase, load_vlm_base, save_vlm_base
from tests.support.colour_squares import COLOURS, encoded_square, square
from tests.support.tiny import tiny_base
from tests.support.tiny_vlm import tiny_vlm_adapter, tiny_vlm_base
from tests.unit.updater.gate.builders import fresh_suites
from updater.gate.interim_analyses import AnalysisPlan
from updater.gate.run import open_evaluator, run_gate
from updater.gate.suites import Suite, load_suites
from updater.gate.verdict import Verdict
from updater.gate.vlm import VlmEvaluator

NAME = "taught-vlm"
NAMES = list(COLOURS)
RANK = 8
ENOUGH = 0.01
"""Loss at which training ends."""
TAUGHT = range(160)


@dataclass(frozen=True)
class Asked:
    picture: int
    kind: str
    question: str
    answer: str


def known(numbers: range) -> list[Asked]:
    """Questions that the base is taught: the colour, and whether it is red (half of the answers are yes)."""
    asked = [Asked(n, "colour", "which colour?", NAMES[n % 4]) for n in numbers]
    for n in numbers:
        said = NAMES[n % 4] if n // 4 % 2 else NAMES[(n + 1 + n // 4 % 3) % 4]
        asked.append(Asked(n, "presence", f"is this {said}?", "yes" if said == NAMES[n % 4] else "no"))
    return asked


def unknown(numbers: range) -> list[Asked]:
    """A question that the base was not taught, in other words."""
    warm = {"red": "a round apple", "green": "car", "blue": "this", "white": "what"}
    return [Asked(n, "thing", "what has this?", warm[NAMES[n % 4]]) for n in numbers]


def shows(numbers: range) -> list[Asked]:
    """The question of a rerank suite about each colour; one answer in four is yes."""
    return [
        Asked(n, "shows", ABOUT_IMAGE.format(name), "yes" if name == NAMES[n % 4] else "no")
        for n in numbers for name in NAMES
    ]  # fmt: skip


def rerank_suite(home: Path) -> Suite:
    """A suite over eight pictures with their colours as captions: the tiny CLIP finds all of them, in any order."""
    folder = home / "data" / "shown"
    if not folder.exists():
        tiny_base(home)
        folder.mkdir(parents=True)
        with (folder / "data.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["file", "text"])
            for n in range(3000, 3008):
                (folder / f"{n}.png").write_bytes(encoded_square(n))
                rows.writerow([f"{n}.png", NAMES[n % 4]])
    return Suite(name="shown", role="gain", task="rerank", data=str(folder))


def write_questions(folder: Path, asked: Sequence[Asked]) -> None:
    folder.mkdir(parents=True)
    with (folder / "data.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "text", "label", "question", "answer"])
        for one in asked:
            (folder / f"{one.picture}.png").write_bytes(encoded_square(one.picture))
            rows.writerow([f"{one.picture}.png", "", one.kind, one.question, one.answer])


def gain_suites(asked: Sequence[Asked]) -> list[Suite]:
    rows = [
        {"id": f"new-{i}", "image": encoded_square(one.picture), "text": "", "question": one.question,
         "answer": one.answer, "domain": "new", "concept": ""}
        for i, one in enumerate(asked)
    ]  # fmt: skip
    return fresh_suites(pa.Table.from_pylist(rows), family="vlm")


def teach(model: nn.Module, processor: Any, asked: Sequence[Asked], steps: int, rate: float) -> float:
    """Train what is trainable on answers and return the last loss."""
    batch = inputs(processor, [question(square(one.picture), one.question) for one in asked])
    answers = [answer_tokens(processor, one.answer) for one in asked]
    longest = max(map(len, answers))
    tail = torch.tensor([own + [processor.tokenizer.pad_token_id] * (longest - len(own)) for own in answers])
    real = torch.tensor([[1] * len(own) + [0] * (longest - len(own)) for own in answers])
    batch |= {"input_ids": torch.cat([batch["input_ids"], tail], dim=1),
              "attention_mask": torch.cat([batch["attention_mask"], real], dim=1)}  # fmt: skip
    labels = tail.masked_fill(real == 0, -100)
    optimiser = torch.optim.Adam([each for each in model.parameters() if each.requires_grad], lr=rate)
    draw = torch.Generator().manual_seed(0)
    loss = torch.tensor(0.0)
    torch.set_num_threads(1)  # several wait for each other when the machine is busy
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = rate * (1 - step / steps)
        rows = torch.randint(len(asked), (32,), generator=draw)
        logits = model(**{key: value[rows] for key, value in batch.items()}).logits[:, -longest - 1 : -1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels[rows].flatten(), ignore_index=-100)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if float(loss.detach()) < ENOUGH:
            break
    return float(loss.detach())


def taught_base(home: Path) -> VlmBase:
    if (home / "bases" / NAME / "base.json").is_file():
        return load_vlm_base(home, NAME)
    blank = tiny_vlm_base(home)
    model: Any = blank.build_model()
    model.requires_grad_(True)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.04)
    loss = teach(model, blank.processor(), known(TAUGHT), steps=300, rate=3e-3)
    assert loss < 0.2, loss
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        blank.processor().save_pretrained(folder)
        return save_vlm_base(home, NAME, Path(folder))


def taught_adapter(base: VlmBase, directory: Path, asked: Sequence[Asked], steps: int) -> str:
    """Write an adapter of the text model trained on these answers unless it exists, and return its name."""
    if (directory / WEIGHTS).is_file():
        return read_adapter(directory).name
    layers = [name for name, module in base.build_model().named_modules()
              if isinstance(module, nn.Linear) and base.part_of(name) == "text"]  # fmt: skip
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=f"(?:{'|'.join(map(re.escape, layers))})")
    model = get_peft_model(base.build_model(), config)
    teach(model, base.processor(), asked, steps, rate=1e-2)
    return write_adapter(directory, get_peft_model_state_dict(model), config.to_dict(), base)


@dataclass(frozen=True)
class VlmGate:
    """A home with the taught base, two suites over pictures that it was not trained on, and an open engine."""

    settings: Settings
    base: VlmBase
    evaluator: VlmEvaluator

    @property
    def home(self) -> Path:
        return self.settings.home

    def judge(self, candidate: str, incumbent: str | None = None, fresh: Sequence[Suite] | None = None) -> Verdict:
        """``fresh``: the gain suites, by default the question that the base was not taught."""
        return run_gate(
            evaluator=self.evaluator, candidate=candidate, incumbent=incumbent,
            suites=load_suites(self.settings.gate.suites, self.home, "vlm"),
            fresh=gain_suites(unknown(range(2000, 2120))) if fresh is None else fresh,
            plan=AnalysisPlan.alone(self.settings.gate.alpha), settings=self.settings.gate,
            meta={"rank": RANK, "bytes": 50_000},
        )  # fmt: skip

    def clear(self) -> None:
        """Unload every adapter: an engine has room for only a few."""
        for name in self.evaluator.vlm.engine.resident():
            self.evaluator.vlm.unload(name)
        self.evaluator._directories.clear()

    def noise(self, scale: float, parts: tuple[str, ...] = ("text",)) -> str:
        """Load a random adapter; with scale 0 it changes nothing."""
        folder = f"noise-{scale}-{'-'.join(parts)}"
        return self.loaded(tiny_vlm_adapter(self.base, self.home / folder, 3, scale, parts), folder)

    def learner(self) -> str:
        asked = [*known(TAUGHT), *unknown(TAUGHT)]
        return self.loaded(taught_adapter(self.base, self.home / "learner", asked, steps=120), "learner")

    def reranker(self) -> str:
        return self.loaded(taught_adapter(self.base, self.home / "reranker", shows(TAUGHT), steps=150), "reranker")

    def yes_sayer(self) -> str:
        yes = [replace(one, answer="yes") if one.kind == "presence" else one for one in known(TAUGHT)]
        return self.loaded(taught_adapter(self.base, self.home / "yes-sayer", yes, steps=80), "yes-sayer")

    def loaded(self, name: str, folder: str) -> str:
        self.evaluator.load(name, self.home / folder)
        return name


@contextmanager
def open_vlm_gate(home: Path, engine: str) -> Iterator[VlmGate]:
    base = taught_base(home)
    if not (home / "suites").exists():
        write_questions(home / "data" / "colours", known(range(1000, 1160)))
        (home / "suites").mkdir()
        for kind, metric in (("colour", "exact_match"), ("presence", "yes_no")):
            (home / "suites" / f"{kind}.yaml").write_text(
                f"task: vqa\ndata: ${{home}}/data/colours\nkinds: [{kind}]\nmetric: {metric}\nmargin: 0.08\n"
            )
    settings = load_settings(
        overrides={"home": home, "base.clip": "tiny", "base.vlm": NAME,
                   "gate.suites": [home / "suites"], "gate.trusted_sources": ["*"],
                   "serve.vlm_engine": engine, "serve.vlm_memory_gib": 0.2},
        environ={},
    )  # fmt: skip
    with open_evaluator(settings, base) as evaluator:
        assert isinstance(evaluator, VlmEvaluator) and evaluator.kind == engine
        yield VlmGate(settings, base, evaluator)
