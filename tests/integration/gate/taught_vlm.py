"""A tiny VLM that was taught colours in a few seconds, and adapters that change it in known ways."""

from __future__ import annotations

import csv
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn

from core.loading import load_settings
from core.settings import Settings
from serving.engines.adapters import WEIGHTS, read_adapter, write_adapter
from serving.engines.vlm.generation import question
from serving.engines.vlm.prompts import answer_tokens, inputs
from serving.engines.vlm.vlm_base import VlmBase, load_vlm_base, save_vlm_base
from tests.support.colour_squares import COLOURS, encoded_square, square
from tests.support.tiny_vlm import tiny_vlm_base

NAME = "taught-vlm"
RANK = 8
ENOUGH = 0.01
"""Loss at which training ends."""


@dataclass(frozen=True)
class Asked:
    picture: int
    kind: str
    question: str
    answer: str


def known(numbers: range) -> list[Asked]:
    """Questions that the base is taught: the colour, and whether it is red (half of the answers are yes)."""
    names = list(COLOURS)
    asked = [Asked(n, "colour", "which colour?", names[n % 4]) for n in numbers]
    for n in numbers:
        other = names[(n + 1 + n // 4 % 3) % 4]
        said = names[n % 4] if n // 4 % 2 else other
        asked.append(Asked(n, "presence", f"is this {said}?", "yes" if said == names[n % 4] else "no"))
    return asked


def unknown(numbers: range) -> list[Asked]:
    """A question that the base was not taught, in other words."""
    warm = {"red": "a round apple", "green": "car", "blue": "this", "white": "what"}
    names = list(COLOURS)
    return [Asked(n, "thing", "what has this?", warm[names[n % 4]]) for n in numbers]


def teach(model: nn.Module, processor: Any, asked: Sequence[Asked], steps: int, rate: float, seed: int = 0) -> float:
    """Train what is trainable on answers and return the last loss."""
    asks = [question(square(one.picture), one.question) for one in asked]
    batch = inputs(processor, asks)
    answers = [answer_tokens(processor, one.answer) for one in asked]
    longest = max(map(len, answers))
    pad = processor.tokenizer.pad_token_id
    tail = torch.tensor([own + [pad] * (longest - len(own)) for own in answers])
    real = torch.tensor([[1] * len(own) + [0] * (longest - len(own)) for own in answers])
    ids = torch.cat([batch.pop("input_ids"), tail], dim=1)
    mask = torch.cat([batch.pop("attention_mask"), real], dim=1)
    labels = tail.masked_fill(real == 0, -100)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.Adam(parameters, lr=rate)
    draw = torch.Generator().manual_seed(seed)
    loss = torch.tensor(0.0)
    torch.set_num_threads(1)  # several wait for each other when the machine is busy
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * (1 - step / steps)
        rows = torch.randint(len(asked), (32,), generator=draw)
        logits = model(
            input_ids=ids[rows], attention_mask=mask[rows], **{key: value[rows] for key, value in batch.items()}
        ).logits[:, -longest - 1 : -1]
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
    loss = teach(model, blank.processor(), known(range(160)), steps=300, rate=3e-3)
    assert loss < 0.2, loss
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        blank.processor().save_pretrained(folder)
        return save_vlm_base(home, NAME, Path(folder))


def taught_adapter(base: VlmBase, directory: Path, asked: Sequence[Asked], steps: int = 80, rate: float = 1e-2) -> str:
    """Write an adapter of the text model trained on these answers unless it exists, and return its name."""
    if (directory / WEIGHTS).is_file():
        return read_adapter(directory).name
    layers = [name for name, module in base.build_model().named_modules()
              if isinstance(module, nn.Linear) and base.part_of(name) == "text"]  # fmt: skip
    pattern = f"(?:{'|'.join(re.escape(name) for name in layers)})"
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=pattern)
    model = get_peft_model(base.build_model(), config)
    teach(model, base.processor(), asked, steps, rate)
    return write_adapter(directory, get_peft_model_state_dict(model), config.to_dict(), base)


def write_questions(folder: Path, asked: Sequence[Asked]) -> None:
    folder.mkdir(parents=True)
    with (folder / "data.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "text", "label", "question", "answer"])
        for one in asked:
            (folder / f"{one.picture}.png").write_bytes(encoded_square(one.picture))
            rows.writerow([f"{one.picture}.png", "", one.kind, one.question, one.answer])


def question_table(asked: Sequence[Asked], domain: str = "new") -> pa.Table:
    rows = [
        {"id": f"{domain}-{i}", "image": encoded_square(one.picture), "text": "", "question": one.question,
         "answer": one.answer, "domain": domain, "concept": ""}
        for i, one in enumerate(asked)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows)


def make_settings(home: Path, engine: str) -> Settings:
    """A home with the taught base, and two suites over pictures that it was not trained on."""
    taught_base(home)
    if not (home / "suites").exists():
        write_questions(home / "data" / "colours", known(range(1000, 1160)))
        (home / "suites").mkdir()
        for kind, metric in (("colour", "exact_match"), ("presence", "yes_no")):
            (home / "suites" / f"{kind}.yaml").write_text(
                f"task: vqa\ndata: ${{home}}/data/colours\nkinds: [{kind}]\nmetric: {metric}\nmargin: 0.08\n"
            )
    return load_settings(
        overrides={
            "home": home,
            "base.vlm": NAME,
            "gate.suites": [home / "suites"],
            "serve.vlm_engine": engine,
            "serve.vlm_memory_gib": 0.2,
        },
        environ={},
    )
