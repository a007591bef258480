"""Every container's command is one that its program takes, with its variables, and every probe asks what is there."""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fastapi import FastAPI
from ray._private import ray_constants
from ray.dashboard.modules.reporter import healthz_agent
from ray.scripts import scripts

from core.loading import load_settings
from core.settings import Settings
from ops.cli.context import Context
from ops.console.app import build_console
from serving.http.app import openapi
from tests.support.chart import EVERYTHING, PROFILES, ROOT, merged, of_kind, pods, profile, render
from tests.support.pages import resolve

NAMES = ("default", *PROFILES)
CASES = [merged(profile(name), extra) for name in NAMES for extra in ({}, EVERYTHING)]
IDS = [f"{name}{extra}" for name in NAMES for extra in ("", " with everything")]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
SECRETS = {
    "RATCHET_LEDGER_URL": "postgresql://ratchet@db/ratchet",
    "RATCHET_KAFKA__CLIENT": '{"security_protocol": "SASL_SSL"}',
    "RATCHET_KAFKA__SCHEMA_REGISTRY_AUTH": "user:password",
}
"""What the Secrets hold; others are any text."""
METRICS = {"/metrics"}
"""What the exporters of ingest, maintenance, the updater and replicas have: :func:`core.metrics.listen`."""


@pytest.fixture(scope="module", params=CASES, ids=IDS)
def objects(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return render(request.param)


@pytest.fixture(scope="module")
def routes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Paths that each process of the chart answers, by container."""
    console = build_console(Settings(home=tmp_path_factory.mktemp("console")))
    return {
        "console": paths(console),
        "serve": set(openapi()["paths"]),
        "agent": set(re.findall(r'@routes\.get\("([^"]+)"\)', inspect.getsource(healthz_agent))),
        **dict.fromkeys(("ingest", "maintain", "updater", "exporter"), METRICS),
    }


def paths(app: FastAPI) -> set[str]:
    return {str(route.path) for route in app.routes if hasattr(route, "path")}


def containers(objects: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(component, container), those that run before the others included."""
    for component, template in pods(objects):
        for container in [*template["spec"].get("initContainers", []), *template["spec"]["containers"]]:
            yield component, container


def test_ratchet_takes_every_command(objects: list[dict[str, Any]], tmp_path: Path) -> None:
    """As its command line parses them, folders that have to exist included."""
    seen = set()
    for component, container in containers(objects):
        if container["name"] == "ray":
            continue  # KubeRay writes its command
        mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
        words = [str(tmp_path) if word in mounts else word for word in container["command"]]
        assert words[0] == "ratchet", component
        context = resolve(shlex.join(words), strict=True)
        seen.add(" ".join(context.command_path.split()[1:]))
    assert {"ingest", "maintain", "trainer", "console", "admin migrate", "metrics serve", "doctor"} <= seen


def test_a_command_without_what_it_needs_is_found() -> None:
    for line in ("ratchet metrics serve", "ratchet releases show"):
        with pytest.raises(Exception, match="Missing parameter"):
            resolve(line, strict=True)


def test_ray_start_takes_the_parameters_of_every_group(objects: list[dict[str, Any]]) -> None:
    """KubeRay adds its own and passes all as ``--name=value`` (convertParamMap in its common/pod.go)."""
    cluster = of_kind(objects, "RayService")[0]["spec"]["rayClusterConfig"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        head = group is cluster["headGroupSpec"]
        words = [f"--{name}={value}" for name, value in group["rayStartParams"].items()]
        own = ["--block", "--metrics-export-port=8080", "--dashboard-agent-listen-port=52365", "--memory=1000"]
        role = ["--head"] if head else ["--address=head:6379"]
        parsed = scripts.start.make_context("start", [*role, *own, *words]).params
        assert parsed["head"] is head
        assert isinstance(parsed["object_store_memory"], int)


def test_every_container_has_settings_that_are_ratchets(objects: list[dict[str, Any]], tmp_path: Path) -> None:
    """Its variables, and the mounted file where they name it."""
    (mounted,) = [each for each in of_kind(objects, "ConfigMap") if "ratchet.yaml" in each["data"]]
    file = tmp_path / "ratchet.yaml"
    file.write_text(mounted["data"]["ratchet.yaml"])
    for component, container in containers(objects):
        environ = {each["name"]: each.get("value") or SECRETS.get(each["name"], "x") for each in container["env"]}
        if "RATCHET_CONFIG" in environ:
            mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
            assert environ["RATCHET_CONFIG"] in mounts, component
            environ["RATCHET_CONFIG"] = str(file)
        load_settings(environ=environ)


def test_every_probe_asks_a_route_of_its_process(objects: list[dict[str, Any]], routes: dict[str, set[str]]) -> None:
    asked = set()
    for _, container in containers(objects):
        for name in ("startupProbe", "livenessProbe", "readinessProbe"):
            if name not in container:
                continue
            get = container[name]["httpGet"]
            process = get["port"] if container["name"] == "ray" else container["name"]
            assert get["path"] in routes[process], (container["name"], name)
            asked.add((process, get["path"]))
    assert ("serve", "/health/ready") in asked and ("console", "/health/ready") in asked


def test_rays_agent_listens_where_it_is_probed(objects: list[dict[str, Any]]) -> None:
    for _, container in containers(objects):
        if container["name"] == "ray":
            ports = {port["name"]: port["containerPort"] for port in container["ports"]}
            assert ports["agent"] == ray_constants.DEFAULT_DASHBOARD_AGENT_LISTEN_PORT


def compose_services() -> dict[str, dict[str, Any]]:
    return {name: each for name, each in COMPOSE["services"].items() if each["image"].startswith("ratchet:")}


def test_ratchet_takes_the_commands_of_the_compose_file() -> None:
    for name, service in compose_services().items():
        if "entrypoint" not in service:
            assert resolve(shlex.join(["ratchet", *service["command"]]), strict=True), name
        for line in re.findall(r"^ratchet .*$", str(service["command"][0]), re.MULTILINE):
            assert resolve(line, strict=True), line
    setup = compose_services()["setup"]["command"][0]
    assert "ratchet admin migrate" in setup and "ratchet base build" in setup


def test_the_health_checks_of_the_compose_file_ask_what_is_there(routes: dict[str, set[str]], tmp_path: Path) -> None:
    settings = Context(ROOT / "compose" / "ratchet.yaml", []).settings
    ports = {
        "ingest": settings.ingest.metrics_port, "maintain": settings.maintain.metrics_port,
        "updater": settings.updater.metrics_port, "console": settings.console.port,
    }  # fmt: skip
    for name, service in compose_services().items():
        for text in service.get("healthcheck", {}).get("test", []):
            for port, path in re.findall(r"http://127\.0\.0\.1:(\d+)(/[\w/]+)", text):
                process = "updater" if name == "trainer" else name
                assert (int(port), path in routes[process]) == (ports[process], True), name
