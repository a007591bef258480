"""The chart of the checkout, rendered by Helm's own code, with the required values and with all options."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from helm_python import Chart

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "ratchet"
Object = dict[str, Any]
PROFILES = ("cpu", "gpu", "multigpu")
NEEDED: dict[str, Any] = {
    "image": {"repository": "registry.example/ratchet"},
    "ledger": {"existingSecret": {"name": "ratchet-ledger"}},
    "objectStore": {"artifacts": "s3://models/ratchet", "lake": "s3://models/lake"},
    "kafka": {"bootstrap": "kafka-1:9092,kafka-2:9092"},
    "operatorKey": {"existingSecret": {"name": "ratchet-operator"}},
}
EVERYTHING: dict[str, Any] = {
    "objectStore": {"endpoint": "http://seaweedfs:8333", "existingSecret": {"name": "ratchet-s3"}},
    "kafka": {"existingSecret": {"name": "ratchet-kafka"}},
    "bases": {"source": "volume", "existingClaim": "bases"},
    "settings": {
        "kafka": {"partitions": 6}, "gate": {"suites": ["/data/suites"]}, "updater": {"workers": 4},
        "console": {"oidc": {"issuer": "https://id.example", "client_id": "ratchet",
                             "console_url": "https://c.example", "readers": ["*"]}},
    },
    "serving": {"gcsFaultTolerance": {"enabled": True, "redisAddress": "redis:6379",
                                      "existingSecret": {"name": "redis", "usernameKey": "user"}}},
    "ingest": {"storage": {"storageClass": "fast"}, "splitKey": {"existingSecret": {"name": "ratchet-split"}},
               "keda": {"enabled": True, "sasl": "scram_sha512", "tls": "enable"}},
    "console": {"oidc": {"existingSecret": {"name": "ratchet-oidc"}}},
    "updater": {"storage": {"existingClaim": "updater"}, "data": {"existingClaim": "suites"},
                "workers": {"enabled": True}},
    "indexes": {"enabled": True, "env": [
        {"name": "PGPASSWORD", "valueFrom": {"secretKeyRef": {"name": "shop", "key": "password"}}}]},
    "ingress": {"enabled": True, "className": "nginx", "host": "a.example", "consoleHost": "c.example"},
    "podAnnotations": {"example.org/team": "ml"},
    "runtimeClassName": "nvidia",
    "caBundle": {"configMap": "company-ca"},
    "extraEnv": [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}],
    "extraVolumes": [{"name": "cache", "emptyDir": {"sizeLimit": "1Gi"}}],
    "extraVolumeMounts": [{"name": "cache", "mountPath": "/cache"}],
    "networkPolicy": {"egress": {"cloudIdentity": [{"cidr": "169.254.169.254/32", "port": 80}]}},
    "monitoring": {"podMonitors": True, "rules": True, "dashboards": True, "labels": {"release": "prometheus"},
                   "runbooks": "https://git.example/runbooks"},
}  # fmt: skip
"""Every option that adds an object or a part of one."""


def merged(*layers: Any) -> Any:
    """Merge mappings as Helm merges values files: later ones win."""
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in copy.deepcopy(layer).items():
            both = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = merged(result[key], value) if both else value
    return result


def profile(name: str) -> Any:
    """The values file of a profile; ``default`` has none."""
    return {} if name == "default" else yaml.safe_load((CHART / f"values-{name}.yaml").read_text())


def render(*layers: Any, name: str = "live", namespace: str = "ml") -> list[Object]:
    """All objects of a release. Raises HelmValuesError, HelmRenderError."""
    return render_chart(merged(NEEDED, *layers), name, namespace)


@cache
def chart() -> Chart:
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
    return [each for each in objects if each["kind"] == kind]


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Evaluate a label selector with the two operators that are used here."""
    for each in selector.get("matchExpressions", []):
        assert each["operator"] in ("In", "DoesNotExist")
        if labels.get(each["key"]) not in each.get("values", [None]):
            return False
    return bool(selector.get("matchLabels", {}).items() <= labels.items())


def pods(objects: Sequence[Object]) -> Iterator[tuple[str, Object]]:
    """Pods and templates of pods, by their component."""
    for each in objects:
        templates = [each] if each["kind"] == "Pod" else []
        if each["kind"] in ("RayService", "RayCluster"):
            templates = [group["template"] for group in cluster_groups(each)]
        elif each["kind"] in ("Deployment", "Job"):
            templates = [each["spec"]["template"]]
        for template in templates:
            yield str(template["metadata"]["labels"]["app.kubernetes.io/component"]), template


def containers(objects: Sequence[Object]) -> Iterator[tuple[str, Object, Object]]:
    """(component, pod spec, container), including init containers."""
    for component, template in pods(objects):
        for container in [*template["spec"].get("initContainers", []), *template["spec"]["containers"]]:
            yield component, template["spec"], container


def variables(container: Object) -> dict[str, str]:
    """The values of a container's environment; empty for values from a Secret."""
    return {each["name"]: each.get("value", "") for each in container["env"]}


def cluster_groups(cluster: Object) -> list[Object]:
    """The group of the head, then those of workers; of a RayService or a RayCluster."""
    spec = cluster["spec"].get("rayClusterConfig", cluster["spec"])
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def named(objects: Sequence[Object], kind: str, part: str) -> Object:
    (found,) = [each for each in of_kind(objects, kind) if each["metadata"]["name"] == f"live-ratchet-{part}"]
    return found


def settings_text(objects: Sequence[Object]) -> str:
    (text,) = [each["data"]["ratchet.yaml"] for each in of_kind(objects, "ConfigMap") if "ratchet.yaml" in each["data"]]
    return str(text)
