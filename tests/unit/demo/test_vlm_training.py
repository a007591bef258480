from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from demo.vlm.model import make_model, make_processor, make_tokenizer
from demo.vlm.pictures import seen, warp
from demo.vlm.questions import answer_loss, learn, tokenize
from demo.vlm.recipe import VlmRecipe
from demo.vlm.scores import accuracy, answer
from serving.engines.vlm.generation import question
from serving.engines.vlm.prompts import answer_tokens, inputs
from streams.publish.folders import FolderItem

TEXTS = ["what colour is this?", "is there anything red here?", "red", "blue", "yes", "no", "an ankle boot"]


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any]:
    torch.manual_seed(0)
    tokenizer = make_tokenizer(TEXTS * 3)
    return make_model(tokenizer), make_processor(tokenizer)


def items(folder: Path, split: str = "train") -> list[FolderItem]:
    """Red and blue squares in 24 places, with a question about the colour of each."""
    rows = []
    for number in range(24):
        colour = ("red", "blue")[number % 2]
        image = Image.new("RGB", (128, 128), "white")
        image.paste(colour, (8 + number, 20, 70 + number, 90))
        path = folder / f"{number}.png"
        image.save(path)
        rows.append(FolderItem(path, "", "colour", colour, split, question=TEXTS[0], answer=colour))
    return rows


def test_any_text_goes_into_tokens_and_back(parts: tuple[Any, Any]) -> None:
    tokenizer = parts[1].tokenizer
    for text in (*TEXTS, "Größe: 42 ✓", "  two  spaces"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_an_answer_has_the_same_tokens_alone_and_after_the_prompt(parts: tuple[Any, Any]) -> None:
    processor = parts[1]
    (row,) = tokenize(processor, [FolderItem(Path("x"), "", question=TEXTS[0], answer="an ankle boot")])
    prompt = processor.tokenizer.decode(row.prompt)
    joint = processor.tokenizer(prompt + "an ankle boot<end_of_utterance>", add_special_tokens=False)["input_ids"]
    assert joint == [*row.prompt, *row.answer]
    assert list(row.answer) == answer_tokens(processor, "an ankle boot")
    assert row.prompt.count(processor.image_token_id) == 16


def test_training_computes_what_the_engines_compute(parts: tuple[Any, Any]) -> None:
    """The loss on features that several questions share is that of the plain model, up to bfloat16."""
    model, processor = parts
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    (row,) = tokenize(processor, [FolderItem(Path("x"), "", question=TEXTS[0], answer="blue")])
    batch = inputs(processor, [question(pixels, TEXTS[0])])
    with torch.inference_mode():
        ids = torch.tensor([[*row.prompt, *row.answer]])
        plain = model(input_ids=ids, pixel_values=batch["pixel_values"]).logits[0, len(row.prompt) - 1 : -1]
        expected = torch.nn.functional.cross_entropy(plain, torch.tensor(row.answer))
        shared = answer_loss(model, batch["pixel_values"][:, 0], [row, row], torch.tensor([0, 0]))
    assert abs(float(shared) - float(expected)) < 0.02


def test_the_processor_sees_what_training_saw(parts: tuple[Any, Any]) -> None:
    image = Image.new("RGB", (128, 128), "white")
    image.paste("blue", (20, 30, 100, 90))
    pixels = np.asarray(image)
    theirs = inputs(parts[1], [question(pixels, "what is this?")])["pixel_values"][0, 0]
    ours = seen(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255)[0]
    assert float((theirs - ours).abs().mean()) < 0.02


def test_warped_pictures_stay_on_white_paper_and_differ() -> None:
    image = torch.full((2, 3, 128, 128), 255, dtype=torch.uint8)
    image[:, :, 54:74, 54:74] = 0
    warped = warp(image, torch.Generator().manual_seed(0))
    assert torch.allclose(warped[:, :, :12], torch.ones(()))
    assert 0.005 < float((warped < 0.5).float().mean()) < 0.06
    assert not torch.equal(warped[0], warped[1])
    assert torch.equal(warped, warp(image, torch.Generator().manual_seed(0)))


@pytest.mark.long
@pytest.mark.timeout(600)  # Muon multiplies in bfloat16: eight times slower on processors without AVX-512
def test_it_learns_colours_in_a_few_steps(parts: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = parts
    rows = items(tmp_path)
    how = VlmRecipe(steps=(14,), pictures=16, warmup_steps=3, lr=3e-3)
    learn(model, processor, rows, how)
    assert accuracy(rows, answer(model, processor, rows)) > 0.9
    assert accuracy(rows, answer(model, processor, rows, blank=True)) < 0.6
