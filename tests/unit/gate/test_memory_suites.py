"""What was learned becomes retention suites: bounded, the same for the same rows, and without what was deleted."""

from __future__ import annotations

import pyarrow as pa
import pytest

from tests.unit.gate.builders import TableImages, question_rows, sample_rows
from updater.gate.sample_suites import CAPACITY, MOST_DOMAINS, choose_memory, learned_before, memory_suites, reservoir

TABLE = ("id", "domain")

MOST = CAPACITY["clip"]


def rows(**domains: int) -> pa.Table:
    return pa.table(
        {
            "id": [f"{domain}-{i}" for domain, count in domains.items() for i in range(count)],
            "domain": [domain for domain, count in domains.items() for _ in range(count)],
        }
    )


def test_a_domain_that_was_learned_is_a_retention_suite() -> None:
    held = sample_rows(30, "flags")
    (suite,) = memory_suites(held, choose_memory(held.select(TABLE), "clip", 20), "clip", 20, TableImages(held))
    assert (suite.name, suite.role, suite.task, len(suite.items())) == ("memory.flags", "retention", "retrieval", 30)
    assert {item.sample_id for item in suite.items()} == set(held["id"].to_pylist())


def test_questions_that_were_learned_are_a_suite_of_the_vlm() -> None:
    held = question_rows(40, "shop", images=20)
    (suite,) = memory_suites(held, choose_memory(held.select(TABLE), "vlm", 20), "vlm", 20, TableImages(held))
    assert (suite.name, suite.task, len(suite.items())) == ("memory.shop", "vqa", 40)
    assert memory_suites(held, choose_memory(held.select(TABLE), "vlm", 21), "vlm", 21, TableImages(held)) == [], (
        "twenty images are not 21"
    )


def test_a_reservoir_is_bounded_and_a_further_row_displaces_at_most_one() -> None:
    first = choose_memory(rows(flags=2 * MOST), "clip", 20)["memory.flags"]
    assert len(first) == MOST
    shuffled = rows(flags=2 * MOST).take(list(reversed(range(2 * MOST))))
    assert choose_memory(shuffled, "clip", 20)["memory.flags"] == first
    more = choose_memory(rows(flags=2 * MOST + 1), "clip", 20)["memory.flags"]
    assert len(set(first) - set(more)) <= 1 and len(more) == MOST


def test_a_deleted_sample_is_replaced_by_the_next_one() -> None:
    ids = [f"flags-{i}" for i in range(2 * MOST)]
    first = reservoir(ids, MOST)
    without = reservoir([name for name in ids if name != first[0]], MOST)
    assert first[0] not in without and set(first[1:]) < set(without) and len(without) == MOST


def test_small_domains_and_samples_without_one_are_one_suite_together() -> None:
    chosen = choose_memory(rows(flags=30, odd=12, few=9), "clip", 20)
    assert {name: len(ids) for name, ids in chosen.items()} == {"memory.flags": 30, "memory": 21}
    assert choose_memory(rows(odd=12), "clip", 20) == {}, "with fewer items no suite could exclude a loss"
    assert "memory" in choose_memory(pa.table({"id": [str(i) for i in range(20)], "domain": [""] * 20}), "clip", 20)


def test_the_number_of_suites_is_bounded() -> None:
    chosen = choose_memory(rows(**{f"d{n:02d}": 20 + n for n in range(MOST_DOMAINS + 3)}), "clip", 20)
    assert len(chosen) == MOST_DOMAINS + 1
    assert len(chosen["memory"]) == 20 + 21 + 22, "the smallest three share one"


def test_domains_whose_names_look_alike_share_a_suite() -> None:
    assert set(choose_memory(rows(**{"a b": 15, "A-b": 15}), "clip", 20)) == {"memory.a-b"}


def test_what_is_fresh_is_no_memory() -> None:
    every = rows(flags=30)
    assert learned_before(every, every.slice(10)).num_rows == 10
    assert learned_before(every, every).num_rows == 0


@pytest.mark.parametrize("count", [0, 30])
def test_a_chosen_row_that_is_gone_is_left_out(count: int) -> None:
    held = sample_rows(30, "flags")
    chosen = choose_memory(held.select(TABLE), "clip", 20)
    suites = memory_suites(held.slice(0, count), chosen, "clip", 20, TableImages(held))
    assert [len(suite.items()) for suite in suites] == ([30] if count else [])
