"""The part of a Kubernetes API server that Helm's ``lookup`` asks: what kinds there are, and one object by its name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

from helm_python import Config

from tests.support.chart import NEEDED, chart, merged

KINDS = {
    "/api/v1": {"Secret": "secrets", "ServiceAccount": "serviceaccounts"},
    "/apis/ray.io/v1": {"RayService": "rayservices", "RayCluster": "rayclusters"},
}
"""Plural names of the namespaced kinds by the path of their group and version."""


@contextmanager
def cluster_with(objects: Sequence[dict[str, Any]], kinds: dict[str, dict[str, str]] = KINDS) -> Iterator[Config]:
    """A cluster that has these kinds, and these objects in the namespace ``ml``."""
    answers = dict(_kinds(kinds)) | {_path(each): each for each in objects}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            missing = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}
            body = json.dumps(answers.get(path, missing)).encode()
            self.send_response(200 if path in answers else 404)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    entry = {
        "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
        "users": [{"name": "u", "user": {}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    try:
        with Config(kubeconfig_content=json.dumps(entry), namespace="ml") as config:
            yield config
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def render_on(config: Config, *layers: Any, is_upgrade: bool = False) -> dict[str, str]:
    """What ``helm install`` (or ``upgrade``) of release ``live`` would apply, by file. Raises HelmError."""
    values = merged(NEEDED, *layers)
    return config.render(chart(), values, name="live", namespace="ml", is_install=not is_upgrade, is_upgrade=is_upgrade)


def _kinds(kinds: dict[str, dict[str, str]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, names in kinds.items():
        resources = [{"kind": kind, "name": name, "namespaced": True, "verbs": ["get"]} for kind, name in names.items()]
        version = path.removeprefix("/api/").removeprefix("/apis/")
        yield path, {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": resources}


def _path(found: dict[str, Any]) -> str:
    version = found["apiVersion"]
    root = f"/apis/{version}" if "/" in version else f"/api/{version}"
    return f"{root}/namespaces/ml/{KINDS[root][found['kind']]}/{found['metadata']['name']}"
