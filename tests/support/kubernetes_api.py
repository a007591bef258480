"""The part of a Kubernetes API server that Helm's ``lookup`` uses: the available kinds, and one object by its name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from helm_python import Config

from tests.support.chart import NEEDED, chart, merged
from tests.support.web_server import reply, web_server

KINDS = {
    "/api/v1": {"Secret": "secrets", "ServiceAccount": "serviceaccounts"},
    "/apis/ray.io/v1": {"RayService": "rayservices", "RayCluster": "rayclusters"},
}
"""Plural names of the namespaced kinds by the path of their group and version."""


@contextmanager
def cluster_with(objects: Sequence[dict[str, Any]]) -> Iterator[Config]:
    """A cluster that has these objects in the namespace ``ml``."""
    with web_server() as server:
        entry = {
            "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.port}"}}],
            "users": [{"name": "u", "user": {}}], "current-context": "x",
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        }  # fmt: skip
        for path, answer in [*_kinds(), *((_path(each), each) for each in objects)]:
            server.pages[path] = reply(json.dumps(answer).encode(), content_type="application/json", connection="close")
        with Config(kubeconfig_content=json.dumps(entry), namespace="ml") as config:
            yield config


def render_on(config: Config, *layers: Any, is_upgrade: bool = False) -> dict[str, str]:
    """The objects, by file, that ``helm install`` (or ``upgrade``) of release ``live`` would apply. Raises
    HelmError.
    """
    values = merged(NEEDED, *layers)
    return config.render(chart(), values, name="live", namespace="ml", is_install=not is_upgrade, is_upgrade=is_upgrade)


def _kinds() -> Iterator[tuple[str, dict[str, Any]]]:
    for path, names in KINDS.items():
        resources = [{"kind": kind, "name": name, "namespaced": True, "verbs": ["get"]} for kind, name in names.items()]
        version = path.removeprefix("/api/").removeprefix("/apis/")
        yield path, {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": resources}


def _path(found: dict[str, Any]) -> str:
    version = found["apiVersion"]
    root = f"/apis/{version}" if "/" in version else f"/api/{version}"
    return f"{root}/namespaces/ml/{KINDS[root][found['kind']]}/{found['metadata']['name']}"
