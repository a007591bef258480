from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from benchmarks.closed_loop import closed_loop
from core.errors import ConfigError
from ops.cli.main import app
from ops.planning import capacity
from ops.planning.capacity import MAX_BATCH, CapacityPlan, Cell, ServiceTimes, built_in, fit, machine_of

KNOWN = ServiceTimes(first=0.02, each=0.01, request=0.005)


def count(plan: CapacityPlan, name: str) -> float:
    return next(part.count for part in plan.parts if part.name == name)


def planned(machine: str = "amx", **load: float) -> CapacityPlan:
    measured = built_in()
    return capacity.make_plan(capacity.Load(**load), measured, measured.machines[machine])


def test_times_are_found_in_the_rates_that_they_lead_to() -> None:
    cells: list[Cell] = []
    for items, clients in ((1, 1), (1, 8), (1, 32), (16, 1), (16, 8)):
        inputs = min(items * clients, MAX_BATCH)
        cells.append(("image", items, clients, inputs / KNOWN.batch(inputs, inputs / items)))
    assert vars(fit(cells, "image", MAX_BATCH)) == pytest.approx(vars(KNOWN))
    with pytest.raises(ValueError, match="0 measured rates of texts"):
        fit(cells, "text", MAX_BATCH)


def test_the_simulation_agrees_with_what_was_measured() -> None:
    for name, machine in built_in().machines.items():
        for kind, items, clients, rate in machine.cells:
            if items == 1:
                times = fit(machine.cells, kind, MAX_BATCH)
                simulated = closed_loop(times, clients, 1, MAX_BATCH, requests=2000).requests_per_second
                assert simulated == pytest.approx(rate, rel=0.35), (name, kind, clients)


def test_waits_are_those_of_queueing_theory() -> None:
    """One at a time, all alike (M/D/1): the mean wait is load / 2 (1 - load) of a service."""
    times = ServiceTimes(first=0.1, each=0.0, request=0.0)
    load = capacity.open_loop(times, rate=5.0, encoders=1, max_batch=1, requests=200_000)
    assert load.busy == pytest.approx(0.5, rel=0.02)
    assert load.requests_per_second == pytest.approx(5.0, rel=0.02)
    assert 0.1 < load.p50 < 0.15 and load.p99 > 0.25
    idle = capacity.open_loop(times, rate=0.01, encoders=1, max_batch=1)
    assert (idle.p50, idle.p99) == pytest.approx((0.1, 0.1))


def test_encoders_keep_the_deadline_and_grow_with_the_load() -> None:
    answers = [capacity.encoders_for(KNOWN, rate, 0.5) for rate in (10, 100, 1000, 10_000)]
    for number, outcome in answers:
        assert outcome.p99 <= 0.5 and outcome.busy <= 0.8 and number >= 1
    numbers = [number for number, _ in answers]
    assert numbers == sorted(numbers) and numbers[-1] > 100
    assert capacity.encoders_for(KNOWN, 100, 0.1)[0] >= capacity.encoders_for(KNOWN, 100, 5.0)[0]
    with pytest.raises(ConfigError, match="without any other"):
        capacity.encoders_for(KNOWN, 1, 0.01)


def test_each_part_of_a_load_has_its_line_and_its_source() -> None:
    plan = planned(images_per_second=100, texts_per_second=50, searches_per_second=20, corpus=2e6, stream_per_day=5e5,
                   price_hour=0.1)  # fmt: skip
    assert [part.name for part in plan.parts] == [
        "encoders for images", "encoders for texts", "ingress replicas", "catalog", "encoders for a backfill",
        "ingest workers", "partitions", "lake", "updaters", "ledger", "machines", "cost",
    ]  # fmt: skip
    assert count(plan, "catalog") == pytest.approx(4.4)
    assert count(plan, "partitions") == 2 * count(plan, "ingest workers")
    assert count(plan, "cost") == pytest.approx(count(plan, "machines") * 0.1 * 730)
    assert len(plan.sources) == 5 and all("ratchet bench" in source for source in plan.sources)
    assert count(planned(stream_per_day=1), "machines") == 2, "one ingests, one learns"
    small = planned(images_per_second=1)
    assert small.warnings == [] and "updaters" not in [part.name for part in small.parts]
    assert planned("avx512", images_per_second=100).parts[0].count > count(plan, "encoders for images")
    sizes = (10, 18, 99, 908, 5000)
    workers = [count(planned(stream_per_day=2e7, image_kb=size), "ingest workers") for size in sizes]
    assert workers == sorted(workers) and workers[0] == workers[1] and workers[-1] > 4 * workers[-2]
    too_much = planned(searches_per_second=5000, corpus=1e9, stream_per_day=1e8, p99_seconds=5)
    for word in ("searches:", "catalog:", "backfill:", "learning:"):
        assert word in " ".join(too_much.warnings)


def test_what_is_no_load_is_refused() -> None:
    wrong: dict[str, float] = {"images_per_second": -1.0, "corpus": math.nan, "p99_seconds": 0.0, "image_kb": 0.0}
    for name, value in wrong.items():
        with pytest.raises(ConfigError, match=name.replace("_", " ")):
            planned(**{name: value})


def plan_command(*words: str) -> Result:
    return CliRunner().invoke(app, ["admin", "plan", *words], env={"COLUMNS": "200"})


def test_your_own_measurement_takes_the_place_of_ours(tmp_path: Path) -> None:
    ours = built_in().machines["avx512"]
    rows = [
        {"model": model, "kind": kind, "items": items, "concurrency": clients,
         "sides": {"ratchet": {"items_per_second": rate * factor}, "raw": {"items_per_second": 1e9}}}
        for model, factor in (("ViT-L-14", 1.0), ("shipped", 7.0))
        for kind, items, clients, rate in ours.cells
    ]  # fmt: skip
    path = tmp_path / "encode.txt"
    path.write_text("a table\n" + json.dumps({"cells": rows, "machine": {"cores": 16}}) + "\n")
    assert machine_of(path) == capacity.Machine(source=f"ratchet bench encode, {path}", cores=16, cells=ours.cells)
    result = plan_command("--texts", "100", "--measured", str(path), "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert plan["load"]["texts_per_second"] == 100 and plan["sources"][0].endswith(str(path))
    assert plan["parts"][0]["unit"] == "of 16 cores"
    for text in ("", "no json", "{}", '{"cells": [], "machine": {"cores": 2}}', "[1]", '"cells"'):
        path.write_text(text)
        with pytest.raises(ConfigError, match="no figures of `ratchet bench encode`"):
            machine_of(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        machine_of(tmp_path / "nothing")


def test_the_table_says_why_and_whence_and_its_figures_are_those_of_the_docs() -> None:
    result = plan_command("--images", "20", "--stream", "1e7")
    words = ("encoders for images", "simulated p50", "passed over", "Counted with:", "commit d98e718")
    assert [each for each in words if each not in result.output] == []
    wrong = plan_command("--machine", "cray")
    assert isinstance(wrong.exception, ConfigError) and "amx, avx512" in wrong.exception.fix
    page = (Path(__file__).parents[3] / "docs" / "benchmarks" / "README.md").read_text()
    for kind, items, clients, rate in (cell for machine in built_in().machines.values() for cell in machine.cells):
        assert f"| {kind} | {items} | {clients} | {rate:g} (" in page, (kind, items, clients, rate)
    figures = (
        "14.48", "5.8 ms", "2.2 GiB", "3,688", "1,070", "384", "41.2", "1.85", "596 MiB", "6,600", "2.88 GiB",
    )  # fmt: skip
    assert [figure for figure in figures if figure not in page] == []
