"""Examples that need neither server nor broker run."""

from __future__ import annotations

import json
import re
from pathlib import Path

from core import metrics
from core.loading import load_settings
from serving.engines.lora import effective_weights
from tests.support.pages import ROOT
from tests.support.tiny import tiny_base
from tests.unit.updater.builders import pools, run
from updater.gate.suites import load_suites
from updater.recipes import load_recipe

EXAMPLES = ROOT / "examples"


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
