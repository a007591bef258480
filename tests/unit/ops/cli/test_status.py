from __future__ import annotations

from typing import Any

from ops.cli.status import catalog_lines, learning_line, replica_lines, rollout_line


def space(missing: int, left: float | None = None, building: bool = False) -> dict[str, Any]:
    return {
        "missing": missing, "coverage": 1 - missing / 1000, "rows_per_second": 80.2, "seconds_left": left,
        "index": {"building": building},
    }  # fmt: skip


def test_a_complete_catalog_takes_one_line_and_a_backfill_says_when_it_ends() -> None:
    catalog = {"corpus_rows": 1000, "coverage": 1.0, "spaces": {"aaaa": space(0)}}
    assert catalog_lines(catalog) == "catalog: 1,000 samples, 100.0% searchable everywhere\n"
    catalog["spaces"] = {"aaaa": space(0), "bbbb": space(250, 3725.4), "cccc": space(250), "dddd": space(0, 0.0, True)}
    lines = catalog_lines(catalog).splitlines()
    assert lines[1:] == [
        "  bbbb is embedded: 75.0%, 80 rows/s, 1:02:05 left",
        "  cccc is embedded: 75.0%, 80 rows/s, no estimate yet",
        "  dddd: its index is being made",
    ]
    assert catalog_lines(None) == ""


def test_replicas_are_told_of_only_where_one_does_not_run() -> None:
    replicas = {"Encoder": {"RUNNING": 2}, "Vlm": {"STARTING": 1, "RUNNING": 1}, "Catalog": {"STOPPING": 1}}
    assert replica_lines(replicas) == "Catalog: 1 stopping\nVlm: 1 running, 1 starting\n"
    assert replica_lines({}) == ""


def test_fresh_items_and_alpha_are_told_and_the_candidate_that_is_kept() -> None:
    told = {
        "fresh_items": 1120, "fresh_items_needed": 1400, "alpha": 0.05, "alpha_spent": 0.038, "kept": None, "lacks": "",
    }  # fmt: skip
    assert learning_line("clip", told).splitlines() == [
        "clip: 1,120 of 1,400 fresh items", "  alpha 0.05: 0.038 spent on gains since the last release, 0.012 left",
    ]  # fmt: skip
    told["kept"] = {"adapter": "clip-a", "looks": 2, "asked_again_with": 1300}
    assert learning_line("clip", told).splitlines()[-1] == "  clip-a: 2 looks, the next with 1,300 fresh items"


def test_the_screen_says_what_is_on_trial_and_what_was_seen() -> None:
    told = {
        "state": "canary", "release": 7, "incumbent": 6, "share": 0.1, "seconds_left": None,
        "compared": {"clip": {"agreed": 39, "inputs": 40}},
    }  # fmt: skip
    assert rollout_line(told) == "canary 10% release 7 against 6: clip agrees on 39 of 40\n"
    watched = {**told, "state": "guard", "share": 1.0, "seconds_left": 61.4}
    assert rollout_line(watched) == "guard watches release 7 against 6: clip agrees on 39 of 40, 61 s left\n"
    assert rollout_line({"state": "idle"}) == ""
