"""The chart of the checkout, rendered by Helm's own code, as Python objects."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from helm_python import Chart

CHART = Path(__file__).parents[2] / "helm" / "ratchet"

Object = dict[str, Any]


def merged(*layers: Any) -> Any:
    """Later mappings over earlier ones, as Helm merges values files."""
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in copy.deepcopy(layer).items():
            both = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = merged(result[key], value) if both else value
    return result


def profile(name: str) -> Any:
    """The values file of a profile; ``default`` has none."""
    return {} if name == "default" else yaml.safe_load((CHART / f"values-{name}.yaml").read_text())


@cache
def chart() -> Chart:
    """The chart as it lies in the repository."""
    return Chart.load(CHART)


def render_chart(values: Any, name: str, namespace: str) -> list[Object]:
    """All objects of a release. Raises HelmValuesError, HelmRenderError."""
    return list(_render(json.dumps(values), name, namespace))


@cache
def _render(values: str, name: str, namespace: str) -> tuple[Object, ...]:
    texts = chart().render(json.loads(values), name=name, namespace=namespace)
    manifests = [text for path, text in texts.items() if path.endswith(".yaml")]
    # The C parser: dashboards and rules are long.
    return tuple(each for text in manifests for each in yaml.load_all(text, yaml.CSafeLoader) if each)


def of_kind(objects: Sequence[Object], kind: str) -> list[Object]:
    """The objects of one kind."""
    return [each for each in objects if each["kind"] == kind]


def pods(objects: Sequence[Object]) -> Iterator[tuple[str, Object]]:
    """Every pod template by the component that it is of."""
    for each in objects:
        if each["kind"] in ("RayService", "RayCluster"):
            cluster = each["spec"].get("rayClusterConfig", each["spec"])
            for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
                yield _component(group["template"]), group["template"]
        elif each["kind"] in ("Deployment", "Job"):
            yield _component(each["spec"]["template"]), each["spec"]["template"]
        elif each["kind"] == "Pod":
            yield _component(each), each


def _component(template: Object) -> str:
    return str(template["metadata"]["labels"]["app.kubernetes.io/component"])
