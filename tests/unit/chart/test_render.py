"""What Helm makes of the chart is what Kubernetes and the operators take."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import kubernetes_validate
import pytest
from helm_python import lint
from jsonschema import Draft202012Validator

from tests.support.chart import CHART, EVERYTHING, NEEDED, PROFILES, ROOT, merged, of_kind, pods, profile, render

CASES = [(name, extra) for name in ("default", *PROFILES) for extra in ("least", "everything")]
KUBERNETES = ("1.28", "1.32", "1.37")
"""The oldest that the docs name, one between, and the newest that has schemas."""


def values(name: str, extra: str) -> Any:
    return merged(NEEDED, profile(name), EVERYTHING if extra == "everything" else {})


@cache
def custom(kind: str) -> Draft202012Validator | None:
    """The schema of a custom resource, from its operator's definition."""
    folder = ROOT / "tests" / "support" / "crds"
    if kind == "RayCluster":  # a RayService has one inside
        spec = json.loads((folder / "RayService.json").read_text())["properties"]["spec"]
        return Draft202012Validator({"properties": {"spec": spec["properties"]["rayClusterConfig"]}})
    path = folder / f"{kind}.json"
    return Draft202012Validator(json.loads(path.read_text())) if path.exists() else None


@pytest.mark.parametrize(("name", "extra"), CASES)
def test_every_profile_passes_helms_lint(name: str, extra: str) -> None:
    report = lint(CHART, values(name, extra), strict=True)
    assert report["total_charts_linted"] == 1
    assert not report["errors"]
    assert [found["error"] for found in report["messages"] if found["severity"] > 1] == []


@cache
def check(text: str) -> None:
    """Raise when an object is not valid. Most objects are the same in all profiles, and are looked at once."""
    found = json.loads(text)
    schema = custom(found["kind"])
    if schema is None:
        for version in KUBERNETES:
            kubernetes_validate.validate(found, version, strict=True)
    else:
        schema.validate(found)


@pytest.mark.parametrize(("name", "extra"), CASES)
def test_every_object_is_valid(name: str, extra: str) -> None:
    objects = render(values(name, extra))
    for each in objects:
        check(json.dumps(each, sort_keys=True))
    for _, template in pods([each for each in objects if each["kind"] in ("RayService", "RayCluster")]):
        check(json.dumps({"apiVersion": "v1", "kind": "Pod", **template}, sort_keys=True))


def test_a_field_that_kubernetes_does_not_know_is_found() -> None:
    deployment = merged(of_kind(render(), "Deployment")[0], {"spec": {"template": {"spec": {"misspelt": 1}}}})
    with pytest.raises(kubernetes_validate.ValidationError, match="misspelt"):
        check(json.dumps(deployment))


def test_the_schemas_of_custom_resources_refuse_what_the_operators_do_not_know() -> None:
    for kind in ("RayService", "RayCluster", "ScaledObject", "TriggerAuthentication", "PodMonitor", "PrometheusRule"):
        wrong = merged(of_kind(render(EVERYTHING), kind)[0], {"spec": {"misspelt": 1}})
        schema = custom(kind)
        assert schema is not None
        assert any("misspelt" in error.message for error in schema.iter_errors(wrong)), kind


def test_everything_adds_what_the_least_does_not_have() -> None:
    least = {each["kind"] for each in render()}
    everything = {each["kind"] for each in render(EVERYTHING)}
    optional = {"Ingress", "PodMonitor", "PrometheusRule", "ScaledObject", "TriggerAuthentication"}
    assert least.isdisjoint(optional)
    assert optional <= everything


def test_names_are_short_enough_for_kuberay() -> None:
    for each in render({"fullnameOverride": "a" * 40}):
        assert len(each["metadata"]["name"]) <= 63
    assert len(of_kind(render({"fullnameOverride": "a" * 40}), "RayService")[0]["metadata"]["name"]) <= 47
