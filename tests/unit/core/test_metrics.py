from __future__ import annotations

import ast
import errno
import inspect
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.stream.small_disk import SmallDisk
from core import metrics
from core.ledger.rows import VerdictRow
from core.metrics import declared
from core.metrics.exposition import AllocatedDict
from core.metrics.learning import Score

ROOT = Path(__file__).resolve().parents[3]
DECLARED: dict[str, MetricWrapperBase] = {
    name: each for name, each in vars(declared).items() if isinstance(each, MetricWrapperBase)
}


def name_of(metric: MetricWrapperBase) -> str:
    """The exported name: the client strips `_total` from the name of a counter and appends it again."""
    return str(metric._name) + ("_total" if isinstance(metric, Counter) else "")


def sources(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from (ROOT / folder).rglob("*.py")


def test_a_metric_is_named_by_the_conventions_and_none_outlives_its_process() -> None:
    for metric in DECLARED.values():
        name = name_of(metric)
        assert name.startswith("ratchet_") and name.endswith("_total") == isinstance(metric, Counter), name
        if isinstance(metric, Gauge) and not any(name.startswith(each) for each in metrics.NAME_PREFIXES.values()):
            assert metric._multiprocess_mode.startswith("live"), f"{name} forgets processes that died"
    assert set(declared.LABELS) == {label for metric in DECLARED.values() for label in metric._labelnames}


def test_every_declared_metric_has_a_verb_and_every_verb_is_called_outside_of_tests() -> None:
    used = {
        node.attr
        for path in sources("core/metrics")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "d"
    }
    assert set(DECLARED) == used
    groups = [name for name in metrics.__all__ if inspect.isclass(getattr(metrics, name))]
    verbs = [f"{group}.{verb}" for group in groups for verb in vars(getattr(metrics, group)) if verb[0] != "_"]
    paths = sources("core", "demo", "ops", "streams", "serving", "updater")
    text = "\n".join(path.read_text() for path in paths if path.parent != ROOT / "core/metrics")
    assert [verb for verb in verbs if f"metrics.{verb}(" not in text] == []


def exported(part: metrics.Process) -> dict[str, float]:
    return {
        sample.name + "".join(f" {key}={value}" for key, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(metrics.exposition(part).decode())
        for sample in family.samples
    }


def test_verbs_record_under_the_names_that_prometheus_scrapes() -> None:
    stored = "ratchet_ingest_samples_total split=train"
    passed = "ratchet_gate_verdicts_total family=clip outcome=passed"
    before = {**exported("ingest"), **exported("update")}
    metrics.ingest.stored(2, "train")
    metrics.ingest.lag(0, 7)
    metrics.gate.decided("clip", "passed", 1.5, 2.0)
    metrics.update.budget(3.0, 5.0, 1.0)
    assert exported("ingest")[stored] == before.get(stored, 0) + 2
    assert exported("ingest")["ratchet_ingest_lag_records partition=0"] == 7
    assert exported("update")[passed] == before.get(passed, 0) + 1
    assert exported("update")["ratchet_budget_level_flops"] == 3e9


def test_a_part_exports_what_is_its_own() -> None:
    metrics.build.started("ingest")
    metrics.dependency.state("ledger", "ok")
    ours = {"ingest": "ratchet_ingest_records_total", "maintain": "ratchet_events_waiting",
            "update": "ratchet_budget_level_flops", "serve": "ratchet_http_in_flight_requests"}  # fmt: skip
    for part in (*metrics.NAME_PREFIXES, "serve"):
        names = {name.split(" ")[0] for name in exported(part)}
        assert {other for other in ours.values() if other in names} == {ours[part]}
        assert {"ratchet_build_info", "ratchet_dependency_state"} <= names


def test_suites_and_shifts_of_an_older_verdict_are_gone_after_the_next() -> None:
    old = Score("fresh.pixel", "gain", 0.2, 0.2, 0.4, None)
    new = Score("emoji", "retention", 0.5, 0.5, 0.49, 0.03)
    for family, score in (("clip", old), ("vlm", old), ("clip", new)):
        metrics.gate.scored(family, [score])
    metrics.gate.shifted("clip", {"image": (0.01, 0.04), "text": (0.0, 0.0)})
    shift = "ratchet_gate_feature_shift_ratio family=clip model={} tower={}"
    assert exported("update")[shift.format("base", "image")] == 0.04
    metrics.gate.shifted("clip", {"text": (0.02, 0.03)})
    found = exported("update")
    score = "ratchet_gate_suite_score_ratio family={} model=candidate role={} suite={}"
    assert score.format("clip", "gain", "fresh.pixel") not in found
    assert found[score.format("clip", "retention", "emoji")] == 0.49
    assert found["ratchet_gate_margin_left_ratio family=clip suite=emoji"] == 0.03
    assert found[score.format("vlm", "gain", "fresh.pixel")] == 0.4  # the other model's stay
    assert found[shift.format("incumbent", "text")] == 0.02
    assert shift.format("base", "image") not in found


def test_gain_and_forgetting_are_mean_differences_to_the_base() -> None:
    def verdict(suites: dict[str, tuple[str, float, float]]) -> VerdictRow:
        rows = {name: {"role": role, "base": base, "after": after} for name, (role, base, after) in suites.items()}
        return VerdictRow(update_id="u", adapter="clip-a", outcome="passed", report_key="", summary={"suites": rows})

    found = verdict({"a": ("gain", 0.2, 0.5), "b": ("retention", 0.6, 0.5), "c": ("retention", 0.4, 0.42)})
    assert found.gain == pytest.approx(0.3)
    assert found.forgetting == pytest.approx(0.04)
    assert math.isnan(verdict({}).gain) and math.isnan(verdict({}).forgetting)


COUNTS = """
import os, signal
from core import metrics
metrics.http.in_flight(3)
metrics.release.live("encoder", 7)
metrics.http.request("/v1/x", 200, 0.1)
print("ready", flush=True)
signal.pause()
"""


def test_processes_add_up_and_a_killed_one_leaves_no_gauges(tmp_path: Path) -> None:
    environ = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    show = [sys.executable, "-c", "from core import metrics; print(metrics.exposition('serve').decode())"]

    def page() -> str:
        return subprocess.run(show, env=environ, capture_output=True, text=True, check=True).stdout

    processes = [
        subprocess.Popen([sys.executable, "-c", COUNTS], env=environ, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        for process in processes:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        both = page()
        processes[0].kill()
        processes[0].wait()
        one = page()
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert "ratchet_http_in_flight_requests 6.0" in both
    assert "ratchet_http_in_flight_requests 3.0" in one
    assert f'ratchet_release_live{{part="encoder",pid="{processes[0].pid}"}} 7.0' in both
    assert f'pid="{processes[0].pid}"' not in one
    assert 'ratchet_http_requests_total{route="/v1/x",status="200"} 2.0' in one  # what was counted stays counted
    assert "ratchet_ingest_" not in both and "ratchet_gate_" not in both


def test_the_alerts_on_latency_count_by_buckets_that_are_there() -> None:
    alerts = (ROOT / "helm/ratchet/files/alerts/slo.yaml").read_text()
    bounds = {float(bound) for bound in re.findall(r'_http_request_seconds_bucket\{[^}]*le="([\d.]+)"', alerts)}
    assert isinstance(declared.HTTP_SECONDS, Histogram)
    assert bounds and bounds <= set(declared.HTTP_SECONDS._upper_bounds)


ON_A_SMALL_DISK = """
import gc, sys
from core import metrics
from core.metrics.exposition import AllocatedDict
metrics.http.in_flight(3)
print("counts", flush=True)
sys.stdin.readline()
for number in range(2000):  # more labels than the first block of a file holds
    metrics.http.request(f"/v1/{number}", 200, 0.1)
print("counts more", flush=True)
sys.stdin.readline()
for each in gc.get_objects():
    if isinstance(each, AllocatedDict):
        each._retry_at = 0.0  # as if the time until the next try had passed
metrics.http.request("/v1/x", 200, 0.1)
print(metrics.exposition("serve").decode(), flush=True)
"""


def in_file(path: Path) -> dict[str, float]:
    return {key: value for key, value, _, _ in MmapedDict.read_all_values_from_file(str(path))}  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("full_from_the_start", [True, False])
def test_a_process_goes_on_when_the_disk_of_its_metrics_is_full(tmp_path: Path, full_from_the_start: bool) -> None:
    with SmallDisk(tmp_path / "metrics", size=4 << 20) as disk:
        if not disk.mounted:
            pytest.skip("no file system can be mounted here")
        environ = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(disk.folder), "PYTHONPATH": str(ROOT)}
        if full_from_the_start:
            disk.fill()
        process = subprocess.Popen(
            [sys.executable, "-c", ON_A_SMALL_DISK],
            env=environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == "counts\n"
        disk.fill()
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "counts more\n"
        disk.free()
        page, _ = process.communicate("\n")
    assert process.returncode == 0
    assert 'ratchet_http_requests_total{route="/v1/x",status="200"} 1.0' in page


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the disk is full; the first element can be changed."""
    state, allocate = [True], os.posix_fallocate

    def fallocate(descriptor: int, offset: int, size: int) -> None:
        if state[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        allocate(descriptor, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    monkeypatch.setattr(import_module("core.metrics.exposition"), "RETRY_SECONDS", 0.0)  # not its function
    return state


def test_values_wait_in_memory_while_the_disk_is_full_and_the_file_stays(tmp_path: Path, full: list[bool]) -> None:
    path, long = tmp_path / "counter_1.db", "b" * (1 << 17)
    counts = AllocatedDict(str(path))
    counts.write_value("a", 2.0, 0.0)
    assert counts.read_value("a") == (2.0, 0.0) and counts.read_value("b") == (0.0, 0.0)
    assert not path.exists(), "readers cannot read an empty file"
    full[0] = False
    counts.write_value("a", 3.0, 0.0)
    assert in_file(path) == {"a": 3.0}
    full[0] = True  # so that it cannot grow
    counts.write_value(long, 5.0, 0.0)
    counts.write_value("a", 2.0, 0.0)
    assert in_file(path) == {"a": 2.0} and counts.read_value(long) == (5.0, 0.0)
    full[0] = False
    counts.write_value(long, 6.0, 0.0)
    assert in_file(path) == {"a": 2.0, long: 6.0}
    counts.close()  # type: ignore[no-untyped-call]


def test_a_folder_that_is_gone_ends_nothing(tmp_path: Path) -> None:
    counts = AllocatedDict(str(tmp_path / "none" / "counter_1.db"))
    counts.write_value("a", 2.0, 0.0)
    assert counts.read_value("a") == (2.0, 0.0)
    counts.close()  # type: ignore[no-untyped-call]
