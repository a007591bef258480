"""Kubernetes' own code for the admission level ``restricted``, and checkov, judge what the chart makes. The first is
built, the second downloaded on first use.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.chart import EVERYTHING, ROOT, pods, profile, render
from tests.support.downloads import NotHere, from_go

KUBERNETES = "v0.34.1"
"""Of Kubernetes 1.34, which `make outside` sets up."""
MAIN = """package main

import (
	"encoding/json"
	"fmt"
	"os"

	core "k8s.io/api/core/v1"
	"k8s.io/pod-security-admission/api"
	"k8s.io/pod-security-admission/policy"
)

// Reads a list of pods, and says what the level forbids in each.
func main() {
	var pods []core.Pod
	if err := json.NewDecoder(os.Stdin).Decode(&pods); err != nil {
		panic(err)
	}
	evaluator, err := policy.NewEvaluator(policy.DefaultChecks())
	if err != nil {
		panic(err)
	}
	level := api.LevelVersion{Level: api.LevelRestricted, Version: api.LatestVersion()}
	for _, pod := range pods {
		all := policy.AggregateCheckResults(evaluator.EvaluatePod(level, &pod.ObjectMeta, &pod.Spec))
		if !all.Allowed {
			fmt.Println(pod.Name, all.ForbiddenDetail())
		}
	}
}
"""
CHECKOV = "checkov==3.3.30"
ONE = {
    ("CKV_K8S_8", "live-ratchet-test"): "asks once and ends, so nothing probes it",
    ("CKV_K8S_9", "live-ratchet-test"): "asks once and ends, so nothing probes it",
    ("CKV_K8S_38", "training-head"): "Ray's autoscaler beside it asks Kubernetes for pods",
}
"""Exceptions of one object; those of all are in ``helm/checkov.yaml``."""


def as_pods(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"apiVersion": "v1", "kind": "Pod", **each, "metadata": {**each["metadata"], "name": component}}
        for component, each in pods(objects)
    ]


def forbidden(objects: list[dict[str, Any]]) -> str:
    """What the level ``restricted`` forbids."""
    try:
        program = from_go(f"pod-security-{KUBERNETES}", "k8s.io/pod-security-admission", KUBERNETES, MAIN)
    except NotHere as error:
        pytest.skip(str(error))
    done = subprocess.run([program], input=json.dumps(as_pods(objects)), capture_output=True, text=True, check=True)
    return done.stdout


def test_the_admission_level_restricted_lets_every_pod_in(objects: list[dict[str, Any]]) -> None:
    assert forbidden(objects) == ""


def test_the_admission_level_refuses_a_pod_that_may_become_root() -> None:
    objects = copy.deepcopy(render())
    dict(pods(objects))["console"]["spec"]["containers"][0]["securityContext"]["allowPrivilegeEscalation"] = True
    assert "console" in (found := forbidden(objects)) and "allowPrivilegeEscalation" in found


@pytest.mark.long
def test_checkov_finds_nothing_but_the_exceptions_that_have_a_reason(tmp_path: Path) -> None:
    """In pods of Ray as well, as plain pods: checkov does not know their kinds."""
    objects = render(profile("gpu"), EVERYTHING)
    ray = [each for each in objects if each["kind"] in ("RayService", "RayCluster")]
    failed = checkov(tmp_path, yaml.safe_dump_all([*objects, *as_pods(ray)]))
    everywhere = yaml.safe_load((ROOT / "helm" / "checkov.yaml").read_text())["skip-check"]
    assert {each for each in failed if each[0] not in everywhere} == ONE.keys()
    assert {check for check, _ in failed} - {check for check, _ in ONE} == set(everywhere), "needed no more"


def checkov(folder: Path, text: str) -> set[tuple[str, str]]:
    """Failed checks, each with the name of its object."""
    (folder / "objects.yaml").write_text(text)
    program = [Path(sys.executable).parent / "uv", "tool", "run", "--python", sys.executable, CHECKOV]
    options = ["--framework", "kubernetes", "--skip-download", "--output", "json", "--file", "objects.yaml"]
    done = subprocess.run([*program, *options], capture_output=True, text=True, cwd=folder)
    if not done.stdout:
        pytest.skip(f"{CHECKOV} does not run here: {done.stderr[-300:]}")
    report = json.loads(done.stdout)
    assert report["summary"]["parsing_errors"] == 0 and report["summary"]["passed"] > 500
    return {(each["check_id"], each["resource"].rpartition(".")[2]) for each in report["results"]["failed_checks"]}
