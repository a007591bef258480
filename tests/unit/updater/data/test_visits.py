"""Views of images, templates of captions, runs of one domain: what steps visit, in which order, and what it costs."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from serving.engines.clip_base import ClipBase
from serving.engines.preprocess import Preprocess
from tests.unit.updater.builders import pairs, picture, pools, recipe, run
from updater.data.mixture import BatchPlan
from updater.data.pools import Pair, Pools, grouped, run_starts, visits
from updater.families.clip_learner import ClipLearner, phrased, view_pixels
from updater.recipes import Batches, Views
from updater.training.workers import Stopped

MIXED = Batches()
TEMPLATES = ["a photo of a {}", "a drawing of a {}", "{}"]


def of_domains(names: str) -> tuple[Pair, ...]:
    """Pairs whose domains are these letters, in order."""
    return tuple(replace(pair, domain=name) for pair, name in zip(pairs("car", len(names)), names, strict=True))


def test_runs_are_of_one_domain_and_keep_its_order() -> None:
    chance = np.random.default_rng(1)
    domains = chance.choice(["a", "b", "rare"], 200, p=[0.6, 0.37, 0.03]).tolist()
    order = grouped(domains, 8)
    assert sorted(order) == list(range(200))
    for name in "a", "b", "rare":
        own = [row for row in order if domains[row] == name]
        assert own == sorted(own)
    seen = [domains[row] for row in order]
    lengths = [end - start for start, end in pairwise((*run_starts(seen, 8), 200))]
    assert Counter(lengths)[8] >= 200 // 8 - 3
    for start, end in pairwise((*run_starts(seen, 8), 200)):
        assert len(set(seen[start:end])) == 1


def test_what_is_visited_first_holds_each_domain_by_its_share() -> None:
    domains = ["a", "b", "a", "c"] * 100
    first = [domains[row] for row in grouped(domains, 10)[:200]]
    for name, share in (("a", 0.5), ("b", 0.25), ("c", 0.25)):
        assert abs(first.count(name) / 200 - share) <= 10 / 200


def test_a_batch_is_made_of_runs_in_every_epoch() -> None:
    rows = visits(of_domains("abcd" * 12), 48, Views(), Batches(domains="grouped", group=6), "seed")
    names = [row.domain for row in rows]
    plan = BatchPlan({"new": 12}, {"new": 48}, seed=3, runs={"new": run_starts(names, 6)})
    batches = [[row for _, row in plan.batch(step)] for step in range(12)]
    for batch in batches:
        assert sorted(Counter(names[row] for row in batch).values()) in ([6, 6], [12])
    second, third = (list(chain.from_iterable(batches[first : first + 4])) for first in (4, 8))
    assert sorted(second) == sorted(third) == list(range(48)) and second != third
    mixed = visits(of_domains("abcd" * 12), 48, Views(), MIXED, "seed")
    assert [row.domain for row in mixed] == list("abcd" * 12)


def test_each_pass_over_a_pool_takes_the_next_view() -> None:
    rows = pairs("car", 5)
    assert visits(rows, 5, Views(count=3), MIXED, "s") == rows
    seen = visits(rows, 14, Views(count=3), MIXED, "s")
    assert [each.view for each in seen] == [0] * 5 + [1] * 5 + [2] * 4  # type: ignore[union-attr]
    assert {each.id for each in seen[5:10]} == {each.id for each in rows}
    assert [each.id for each in seen[5:10]] != [each.id for each in rows]
    assert visits(rows, 14, Views(count=3), MIXED, "s") == seen
    assert visits(rows, 99, Views(), MIXED, "s") == rows


def test_a_view_is_a_part_of_the_image_and_always_the_same() -> None:
    shape = Preprocess(size=32)
    pair = pairs("car", 1)[0]
    # A ramp tells where a part comes from: darker on the left and on top.
    image = ramp(120, 90)
    whole = view_pixels(shape, image, pair, Views(count=4))
    assert np.array_equal(whole, shape.pixels(image))
    for flip in (False, True):
        views = Views(count=4, area=0.25, flip=flip)
        seen = [view_pixels(shape, image, replace(pair, id=f"{number}", view=1), views) for number in range(12)]
        assert all(each.shape == (32, 32, 3) for each in seen)
        again = view_pixels(shape, image, replace(pair, id="3", view=1), views)
        assert np.array_equal(seen[3], again)
        assert len({each.tobytes() for each in seen}) == 12
        spreads = [int(each[:, -1, 0].mean()) - int(each[:, 0, 0].mean()) for each in seen]
        full = int(whole[:, -1, 0].mean()) - int(whole[:, 0, 0].mean())
        assert all(0.4 * full <= abs(spread) <= 1.1 * full for spread in spreads)
        assert (min(spreads) < 0 < max(spreads)) == flip


def ramp(width: int, height: int) -> bytes:
    """A PNG that grows brighter to the right (red) and downwards (green)."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(20, 230, width)[None]
    pixels[..., 1] = np.linspace(20, 230, height)[:, None]
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_captions_that_differ_in_their_template_describe_each_other(base: ClipBase) -> None:
    made = ClipLearner(base, recipe(caption_templates=TEMPLATES), {}, seed=0)
    pool = pools(new=12)
    made.prepare(pool.examples, pool.parts)
    assert len(set(made.texts[:12:6])) + len(set(made.texts[1:12:6])) > 2
    batch = made.batch([0, 6, 1])
    assert batch.caption[0] == batch.caption[1] != batch.caption[2]


def test_a_short_caption_is_put_into_a_template_by_its_id_and_view() -> None:
    pair = Pair("7", "red kite", lambda: picture(1))
    said = [phrased(replace(pair, view=view), TEMPLATES) for view in range(3)]
    assert sorted(said) == sorted(template.replace("{}", "red kite") for template in TEMPLATES)
    assert len({phrased(replace(pair, id=f"{number}"), TEMPLATES) for number in range(20)}) == 3
    long = replace(pair, text="a red kite over a field of wheat")
    assert phrased(long, TEMPLATES) == long.text
    assert phrased(replace(long, label=long.text), ["this is {}."]) == f"this is {long.text}."
    assert phrased(pair, ()) == "red kite"


@pytest.mark.parametrize(
    "changes",
    [
        {"views": {"count": 3, "area": 0.5, "flip": True}, "caption_templates": TEMPLATES},
        {"batches": {"domains": "grouped", "group": 2}, "views": {"count": 2}},
    ],
)
def test_an_update_with_them_is_reproducible_and_goes_on_where_it_was_stopped(
    base: ClipBase, tmp_path: Path, changes: dict[str, Any]
) -> None:
    pool = Pools(of_domains("ab" * 3), of_domains("xyz" * 2))
    options: dict[str, Any] = {"recipe": recipe(**changes), "pools": pool}
    whole = run(base, tmp_path / "whole", **options)
    asked = iter(range(1000))
    with pytest.raises(Stopped):
        run(base, tmp_path / "parts", **options, stop=lambda: next(asked) == 9)
    resumed = run(base, tmp_path / "parts", **options)
    assert (resumed.adapter, resumed.losses, resumed.maf) == (whole.adapter, whole.losses, whole.maf)
    assert run(base, tmp_path / "plain", recipe=recipe(), pools=pool).adapter != whole.adapter
    assert whole.pending == whole.visited == 6


def test_a_view_is_charged_when_it_is_made(base: ClipBase, tmp_path: Path) -> None:
    """Six steps of batch nine pass over six new rows three times, and over six reference rows six times."""
    pool = Pools(pairs("car", 6), pairs("house", 6))
    costs = [
        run(base, tmp_path / str(count), recipe=recipe(views={"count": count}, max_steps=6), pools=pool).cost[
            "prepare_gflops"
        ]
        for count in (1, 2, 3)
    ]
    assert costs[1] == pytest.approx(2 * costs[0], rel=0.1)
    assert costs[2] == pytest.approx(3 * costs[0], rel=0.1)
    few = run(base, tmp_path / "few", recipe=recipe(views={"count": 3}, max_steps=1), pools=Pools(pairs("car", 60)))
    assert few.cost["prepare_gflops"] < costs[0], "no view is made that no step visits"
