from __future__ import annotations

import json
from functools import cache
from typing import Any

import kubernetes_validate
import pytest
from helm_python import lint
from jsonschema import Draft202012Validator

from tests.support.chart import CHART, NEEDED, ROOT, merged, of_kind, pods

KUBERNETES = ("1.28", "1.32", "1.37")
"""The oldest that the docs name, one between, and the newest that has schemas."""


@cache
def custom(kind: str) -> Draft202012Validator | None:
    folder = ROOT / "tests" / "support" / "crds"
    if kind == "RayCluster":  # a RayService has one inside
        spec = json.loads((folder / "RayService.json").read_text())["properties"]["spec"]
        return Draft202012Validator({"properties": {"spec": spec["properties"]["rayClusterConfig"]}})
    path = folder / f"{kind}.json"
    return Draft202012Validator(json.loads(path.read_text())) if path.exists() else None


def test_every_profile_passes_helms_lint(values: Any) -> None:
    report = lint(CHART, merged(NEEDED, values), strict=True)
    assert report["total_charts_linted"] == 1
    assert not report["errors"]
    assert [found["error"] for found in report["messages"] if found["severity"] > 1] == []


@cache
def check(text: str) -> None:
    """Raise when an object is not valid. Most objects are the same in all profiles and are checked once."""
    found = json.loads(text)
    schema = custom(found["kind"])
    if schema is None:
        for version in KUBERNETES:
            kubernetes_validate.validate(found, version, strict=True)
    else:
        schema.validate(found)


def test_every_object_is_valid(objects: list[dict[str, Any]]) -> None:
    for each in objects:
        check(json.dumps(each, sort_keys=True))
    for _, template in pods([each for each in objects if each["kind"] in ("RayService", "RayCluster")]):
        check(json.dumps({"apiVersion": "v1", "kind": "Pod", **template}, sort_keys=True))


@pytest.mark.parametrize(
    "kind",
    ["Deployment", "RayService", "RayCluster", "ScaledObject", "TriggerAuthentication", "PodMonitor", "PrometheusRule"],
)
def test_a_field_that_kubernetes_or_an_operator_does_not_know_is_found(
    kind: str, everything: list[dict[str, Any]]
) -> None:
    unknown: Any = {"misspelt": 1}
    wrong = merged(
        of_kind(everything, kind)[0], {"spec": {"template": {"spec": unknown}} if kind == "Deployment" else unknown}
    )
    with pytest.raises(Exception, match="misspelt"):
        check(json.dumps(wrong))
