from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from core.errors import GateError
from core.ledger import Ledger, UpdateRow
from core.settings import Settings
from streams.store.rows import Position
from streams.store.sample_store import SampleStore
from tests.support.samples import sample
from tests.support.sealing import NOTHING
from tests.unit.updater.gate.builders import TableImages, fresh_suite, fresh_suites, picture, question_rows, sample_rows
from updater.gate.sample_suites import (
    CAPACITY,
    MOST_DOMAINS,
    MOST_RIVALS,
    PAGE,
    TEXT_COLUMNS,
    HeldOut,
    best_releases,
    choose_memory,
    learned_before,
    memory_suites,
    reservoir,
)
from updater.gate.suite_items import Part, Seal
from updater.gate.suites import Family, Suite
from updater.service.gate_update import update_suites

MOST = CAPACITY["clip"]


def rows(**domains: int) -> pa.Table:
    named = [(f"{domain}-{i}", domain) for domain, count in domains.items() for i in range(count)]
    return pa.table({"id": [each for each, _ in named], "domain": [domain for _, domain in named]})


def memory(held: pa.Table, family: Family = "clip", units: int = 20, left: int | None = None) -> list[Suite]:
    chosen = choose_memory(held.select(["id", "domain"]), family, units)
    return memory_suites(held.slice(0, left), chosen, family, units, TableImages(held))


def test_what_was_learned_is_a_retention_suite_of_its_family() -> None:
    held, asked = sample_rows(30, "flags"), question_rows(40, "shop", images=20)
    (suite,), (questions,) = memory(held), memory(asked, "vlm")
    assert (suite.name, suite.role, suite.task, len(suite.items())) == ("memory.flags", "retention", "retrieval", 30)
    assert {item.sample_id for item in suite.items()} == set(held["id"].to_pylist())
    assert memory(held, left=0) == [], "rows that are gone are left out"
    assert (questions.name, questions.task, len(questions.items())) == ("memory.shop", "vqa", 40)
    assert memory(asked, "vlm", 21) == [], "twenty images are not 21"
    every = rows(flags=30)
    assert [learned_before(every, fresh).num_rows for fresh in (every.slice(10), every)] == [10, 0], (
        "fresh is no memory"
    )


def test_a_reservoir_is_bounded_and_a_further_row_displaces_at_most_one_and_a_deleted_one_is_replaced() -> None:
    first = choose_memory(rows(flags=2 * MOST), "clip", 20)["memory.flags"]
    assert len(first) == MOST
    shuffled = rows(flags=2 * MOST).take(list(reversed(range(2 * MOST))))
    assert choose_memory(shuffled, "clip", 20)["memory.flags"] == first
    more = choose_memory(rows(flags=2 * MOST + 1), "clip", 20)["memory.flags"]
    assert len(set(first) - set(more)) <= 1 and len(more) == MOST
    without = reservoir([f"flags-{i}" for i in range(2 * MOST) if f"flags-{i}" != first[0]], MOST)
    assert first[0] not in without and set(first[1:]) < set(without) and len(without) == MOST


def test_small_domains_and_samples_without_one_are_one_suite_together_and_the_number_of_suites_is_bounded() -> None:
    def sizes(**domains: int) -> dict[str, int]:
        return {name: len(ids) for name, ids in choose_memory(rows(**domains), "clip", 20).items()}

    assert sizes(flags=30, odd=12, few=9) == {"memory.flags": 30, "memory": 21}
    assert sizes(odd=12) == {}, "with fewer items no suite could exclude a loss"
    assert sizes(**{"": 20}) == {"memory": 20}
    chosen = sizes(**{f"d{n:02d}": 20 + n for n in range(MOST_DOMAINS + 3)})
    assert len(chosen) == MOST_DOMAINS + 1
    assert chosen["memory"] == 20 + 21 + 22, "the smallest three share one"
    assert sizes(**{"a b": 15, "A-b": 15}) == {"memory.a-b": 30}, "names that look alike too"


LEARNED, FRESH, LIMIT = 420, 300, 50
VERSION_TIME = datetime(2026, 1, 1, tzinfo=UTC)


class RecordingStore(SampleStore):
    """Counts how often the image of each row is read."""

    def __init__(self, lake: str) -> None:
        super().__init__(lake)
        self.read: Counter[str] = Counter()

    def rows_at(
        self, addresses: Sequence[int], columns: Sequence[str], version: int | None = None
    ) -> list[dict[str, Any]]:
        rows = super().rows_at(addresses, list(dict.fromkeys([*columns, "id"])), version)
        if "image" in columns:
            self.read.update(row["id"] for row in rows)
        return rows

    def addresses(self, columns: Sequence[str], *args: Any, **values: Any) -> Any:
        assert "image" not in columns
        return super().addresses(columns, *args, **values)


def _row(offset: int, family: str) -> dict[str, Any]:
    words = {"text": f"thing {offset}"}
    if family == "vlm":
        words = {"text": "", "question": f"what is {offset}?", "answer": "it"}
    domain = ("flags", "shop", "common")[min(offset % 20, 2) if offset >= LEARNED else 0]
    return sample(0, offset, split="fresh_eval", id=f"{offset:064x}", image=picture(offset), domain=domain, **words)


@pytest.fixture(params=["clip", "vlm"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def store(tmp_path: Path, family: str) -> RecordingStore:
    made = RecordingStore(str(tmp_path / "lake"))
    rows = [_row(offset, family) for offset in range(LEARNED + FRESH)]
    made.put(rows, [Position("samples", 0, LEARNED + FRESH)])
    return made


def test_images_of_samples_that_are_not_asked_are_not_read(store: RecordingStore, family: str, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home", gate={"max_items": LIMIT, "min_items": 10})  # type: ignore[arg-type]
    update = UpdateRow(
        id="u", family=family, state="trained", recipe={}, seed=0, store_version=store.version(),
        data_from={"samples:0": LEARNED}, data_to={}, incumbent=None, adapter=None,
        cost={}, error=None, created_at=VERSION_TIME, updated_at=VERSION_TIME,
    )  # fmt: skip
    suites, fresh = update_suites(settings, store, update, NOTHING)
    memory = [suite for suite in suites if suite.name.startswith("memory")]
    sizes = {suite.name: len(suite.items()) for suite in (*memory, *fresh)}
    learned = {"memory.flags": 400 if family == "vlm" else 420}
    assert sizes == {**learned, "fresh.common": LIMIT, "fresh.flags": 15, "fresh.shop": 15}
    if family == "clip":
        assert not store.read, "captions are units; nothing is known of images before they are asked"
    asked = {item.sample_id for suite in (*memory, *fresh) for item in suite.items()}
    for suite in (*memory, *fresh):
        assert len(suite.digest()) == 64
        assert [item.read() for item in suite.items()] == [picture(int(i.sample_id, 16)) for i in suite.items()]
    assert set(store.read) == asked


def test_neighbours_are_read_once_and_a_broken_store_is_no_verdict(store: RecordingStore, family: str) -> None:
    held_out = HeldOut(store, store.version(), "text" if family == "clip" else "question", NOTHING)
    every = held_out.rows(TEXT_COLUMNS)["id"].to_pylist()
    ids, unread = every[: 4 * PAGE], every[-1]
    held_out.expect(ids)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(held_out, ids)) == [picture(int(each, 16)) for each in ids]
    assert set(store.read) == set(ids) and set(store.read.values()) == {1}
    shutil.rmtree(store.url)
    with pytest.raises(GateError, match="images of held-out samples"):
        held_out(unread)


@pytest.mark.usefixtures("sealed")
def test_a_quarter_of_the_samples_is_sealed_until_an_audit_has_asked_for_them(
    store: RecordingStore, family: str
) -> None:
    def ids(part: Part, audited: dict[str, int]) -> set[str]:
        seal = Seal(b"secret", tuple(audited.items()))
        held_out = HeldOut(store, store.version(), "text" if family == "clip" else "question", seal)
        return set(held_out.rows(["id"], part=part)["id"].to_pylist())

    judged, sealed = ids("judged", {}), ids("sealed", {})
    assert not judged & sealed and len(judged | sealed) == LEARNED + FRESH
    assert 0.15 < len(sealed) / (LEARNED + FRESH) < 0.35
    audited = {"samples:0": LEARNED}
    assert ids("sealed", audited) == {name for name in sealed if int(name, 16) >= LEARNED}
    assert ids("judged", audited) == judged | {name for name in sealed if int(name, 16) < LEARNED}


# The newest samples


@pytest.mark.parametrize(
    ("domains", "min_items", "expected"),
    [
        ({"fluent3d": 30, "flags": 12, "odd": 3}, 10, {"fresh.fluent3d": 30, "fresh.flags": 12}),
        ({"fluent3d": 30, "flags": 12, "odd": 3}, 100, {"fresh": 45}),
        ({"a": 8, "b": 8, "c": 8, "d": 8, "flags": 9}, 10, {"fresh": 41}),
        ({"a": 8, "b": 8, "c": 8, "d": 8, "flags": 10}, 10, {"fresh.flags": 10, "fresh": 32}),
        ({"flags": 0}, 10, {}),
    ],
)
def test_small_domains_are_one_gain_suite(domains: dict[str, int], min_items: int, expected: dict[str, int]) -> None:
    """A domain that becomes large enough for its own suite does not take the others' items away."""
    parts = [sample_rows(count, domain, [f"{domain} {i}" for i in range(count)]) for domain, count in domains.items()]
    suites = fresh_suites(pa.concat_tables(parts), min_items=min_items)
    assert {suite.name: suite.units() for suite in suites} == expected
    assert {suite.role for suite in suites} <= {"gain"}


def test_fresh_rows_without_a_text_are_left_out_and_names_from_outside_are_made_safe() -> None:
    rows = sample_rows(20, texts=["", " ", *[f"t{i}" for i in range(18)]])
    assert len(fresh_suite(rows).items()) == 18
    assert len(fresh_suite(rows, limit=7).items()) == 7
    assert fresh_suite(sample_rows(3, "Weird/../Domain <x>"), "Weird/../Domain <x>").name == "fresh.weird-..-domain--x-"


def test_a_domain_has_enough_when_its_captions_or_its_images_are_enough() -> None:
    captions = sample_rows(40, "flags", texts=[f"flag {i // 4}" for i in range(40)])
    asked = question_rows(30, "shop", images=15)
    rows = pa.concat_tables([asked, captions], promote_options="default")
    for family, units, name, task in (("clip", 10, "fresh.flags", "retrieval"), ("vlm", 15, "fresh.shop", "vqa")):
        (suite,) = fresh_suites(rows, family=family, min_items=units)
        assert (suite.name, suite.task, suite.role) == (name, task, "gain")
        assert [each.name for each in fresh_suites(rows, family=family, min_items=units + 1)] == ["fresh"]
    assert fresh_suites(captions, family="vlm") == []


# The best releases

BASE = "b" * 64


def judged(ledger: Ledger, name: str, scores: dict[str, float], base: str = BASE, *, share: float | None = 1.0) -> None:
    """An adapter with a verdict; released with a share, or not at all."""
    ledger.register_adapter(name, "clip", base, f"{name}-i", f"{name}-t", {})
    ledger.begin_update(
        f"u-{name}", family="clip", recipe={}, seed=0, store_version=1, data_from={}, data_to={}, incumbent=None
    )
    suites: dict[str, Any] = {suite: {"after": 0.3 + score, "base": 0.3} for suite, score in scores.items()}
    ledger.record_verdict(f"u-{name}", name, "passed", "reports/x", {"suites": suites})
    if share is not None:
        live = ledger.live()
        number = live.number + 1 if live else 1
        ledger.commit_release(number, clip=name, vlm=None, actor="a", reason="r", proposal_id=None, share=share)


def best(ledger: Ledger, suites: list[str], incumbent: str | None, fixed: Sequence[str] = ()) -> dict[str, str]:
    return best_releases(ledger.released_verdicts("clip", BASE), fixed, suites, incumbent)


def test_each_suite_has_the_release_with_the_highest_score_above_the_base(ledger: Ledger) -> None:
    judged(ledger, "clip-1", {"flags": 0.2, "emoji": 0.0, "fresh.facts": 0.2})
    judged(ledger, "clip-2", {"flags": 0.1, "emoji": 0.1, "memory.facts": 0.1})
    judged(ledger, "clip-3", {"flags": 0.1, "emoji": 0.05})
    found = best(ledger, ["flags", "emoji", "new"], "clip-3")
    assert found == {"flags": "clip-1", "emoji": "clip-2"}
    assert best(ledger, ["flags"], "clip-1") == {}, "the incumbent is compared anyway"
    assert best(ledger, ["memory.facts"], "clip-3") == {"memory.facts": "clip-1"}, "back to when it was new"


def test_suites_over_folders_share_the_release_with_the_highest_mean(ledger: Ledger) -> None:
    judged(ledger, "clip-1", {"flags": 0.3, "emoji": -0.2})
    judged(ledger, "clip-2", {"flags": 0.1, "emoji": 0.1, "fresh.facts": 0.2})
    judged(ledger, "clip-3", {"flags": 0.9, "fresh.facts": 0.1})  # it was not asked about emoji
    fixed = {"flags": "clip-2", "emoji": "clip-2"}
    assert best(ledger, ["memory.facts"], None, list(fixed)) == {**fixed, "memory.facts": "clip-2"}
    assert best(ledger, [], "clip-2", list(fixed)) == {}
    assert best(ledger, [], None, ["flags"]) == {"flags": "clip-3"}


def test_only_what_answered_everybody_on_this_base_and_was_not_withdrawn_counts(ledger: Ledger) -> None:
    judged(ledger, "clip-never", {"flags": 0.9}, share=None)
    judged(ledger, "clip-other", {"flags": 0.8}, base="c" * 64)
    judged(ledger, "clip-bad", {"flags": 0.7})
    ledger.withdraw(["clip-bad"], actor="guard", subject="release 2", reason="errors", evidence={})
    judged(ledger, "clip-good", {"flags": 0.1})
    judged(ledger, "clip-trial", {"flags": 0.6}, share=0.1)
    assert best(ledger, ["flags"], None) == {"flags": "clip-good"}


def test_the_number_of_further_adapters_is_bounded(ledger: Ledger) -> None:
    names = [f"s{n}" for n in range(6)]
    for number, own in enumerate((names[:3], names[3:5], names[5:])):
        judged(ledger, f"clip-{number}", dict.fromkeys(own, 0.2))
    found = best(ledger, names, None)
    assert len(set(found.values())) == MOST_RIVALS == 2 and set(found) == set(names[:5])
