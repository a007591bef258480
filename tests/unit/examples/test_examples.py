"""Examples that need neither server nor broker run, and each one is on the page of examples."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

from core import metrics
from core.loading import load_settings
from core.settings import Settings
from ops.alerts import Target
from ops.cli.metrics import targets_of
from serving.engines.lora import effective_weights
from tests.support.pages import ROOT, Page
from tests.support.tiny import tiny_base
from tests.unit.updater.builders import pools, run
from updater.gate.suites import load_suites
from updater.recipes import load_recipe

EXAMPLES = ROOT / "examples"


def test_each_example_is_on_the_page_and_in_the_tests() -> None:
    page = Page(EXAMPLES / "README.md")
    linked = {(EXAMPLES / link).resolve() for link in page.links}
    files = {path for path in EXAMPLES.rglob("*.*") if path.is_file() and "pictures" not in path.parts}
    assert files - {page.path} == {path for path in linked if path.is_relative_to(EXAMPLES) and path.is_file()}
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_examples.py"))
    for path in files - {page.path}:
        assert path.name in tests, path


def test_the_suite_can_be_asked(tmp_path: Path) -> None:
    (suite,) = load_suites([EXAMPLES / "suite" / "shapes.yaml"], tmp_path)
    assert suite.data == "examples/suite/pictures"  # from where the repository is
    moved = suite.model_copy(update={"data": str(EXAMPLES / "suite" / "pictures")})
    assert (len(moved.items()), {item.text for item in moved.items()}) == (12, {"circle", "square", "bar"})
    assert "gate.suites" in Path(EXAMPLES / "suite" / "shapes.yaml").read_text()
    load_settings(overrides={"gate.suites": [EXAMPLES / "suite"]}, environ={})


def test_the_recipe_trains_the_text_tower_alone(tmp_path: Path) -> None:
    plan = load_recipe(str(EXAMPLES / "recipe" / "gentle.yaml")).model_copy(update={"max_steps": 3, "batch_size": 12})
    base = tiny_base(tmp_path / "home")
    done = run(base, tmp_path / "update", recipe=plan, pools=pools(replay=12))
    assert done.adapter.startswith("clip-")
    changed = effective_weights(done.directory, base.build_model())
    assert changed and not any(name.startswith("visual.") for name in changed)


def test_the_dashboard_asks_for_metrics_and_labels_that_there_are() -> None:
    known = metrics.names()
    panels = json.loads((EXAMPLES / "grafana" / "team.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) == 6
    for panel in panels:
        assert panel["title"] and panel["description"].endswith(".")
        for target in panel["targets"]:
            found = re.findall(r"\bratchet_[a-z0-9_]+", target["expr"])
            labels = set().union(*(known[name] for name in found))
            asked = re.findall(r"\bby \((\w+)\)|\{\{(\w+)\}\}", target["expr"] + target["legendFormat"])
            assert found and {one or other for one, other in asked} <= labels, target


def test_prometheus_scrapes_the_ports_of_the_defaults() -> None:
    config = yaml.safe_load((EXAMPLES / "grafana" / "prometheus.yml").read_text())
    [job] = config["scrape_configs"]
    wanted: list[Target] = targets_of(Settings(), "127.0.0.1")
    assert sorted(map(str, job["static_configs"])) == sorted(map(str, wanted))
