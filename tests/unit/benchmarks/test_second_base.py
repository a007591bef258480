from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.continual.second_base import NAME, PREPROCESS, Distillation, distilled
from serving.engines.clip import ClipEngine
from serving.engines.clip_base import list_bases
from streams.publish.folders import FolderItem
from tests.support.tiny import tiny_base
from tests.unit.updater.builders import COLOURS, picture


@pytest.mark.long
def test_a_second_base_follows_its_teacher(tmp_path: Path) -> None:
    teacher = tiny_base(tmp_path)
    items = [FolderItem(Path(f"{n}.png"), f"a {COLOURS[n % 6]} thing", inline=picture(n % 6)) for n in range(12)]
    how = Distillation(epochs=12, batch=6, warmup=2)
    base = distilled(tmp_path, teacher, items, ["seven", "words"], how)
    assert base.dim == teacher.dim and NAME in list_bases(tmp_path, "clip")
    own, taught = ClipEngine(base, "cpu"), ClipEngine(teacher, "cpu")
    texts = [f"a {colour} thing" for colour in COLOURS] + ["seven", "words"]
    pixels = [np.stack([p.pixels(picture(n)) for n in range(6)]) for p in (PREPROCESS, teacher.preprocess)]
    assert (own.encode_texts(texts) * taught.encode_texts(texts)).sum(axis=1).min() > 0.8
    assert (own.encode_images(pixels[0]) * taught.encode_images(pixels[1])).sum(axis=1).min() > 0.8
