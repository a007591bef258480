"""Every command of the chart, the compose file and the pages is valid for its program; every probe asks for an existing
path.
"""

from __future__ import annotations

import argparse
import inspect
import re
import shlex
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
from tests.support.chart import ROOT, cluster_groups, containers, of_kind, render, settings_text
from tests.support.pages import PAGES, Page, resolve

SERVICES: dict[str, Any] = {
    name: each
    for name, each in yaml.safe_load((ROOT / "compose.yaml").read_text())["services"].items()
    if each["image"].startswith("ratchet:")
}
SECRETS = {
    "RATCHET_LEDGER_URL": "postgresql://ratchet@db/ratchet",
    "RATCHET_KAFKA__CLIENT": '{"security_protocol": "SASL_SSL"}',
    "RATCHET_KAFKA__SCHEMA_REGISTRY_AUTH": "user:password",
}
"""Contents of Secrets that have a format; others are any text."""
METRICS = {"/metrics"}
"""Paths of the exporters of ingest, maintenance, the updater and replicas: :func:`core.metrics.listen`."""


@pytest.fixture(scope="module")
def routes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    console: FastAPI = build_console(Settings(home=tmp_path_factory.mktemp("console")))
    return {
        "console": {str(route.path) for route in console.routes if hasattr(route, "path")},
        "serve": set(openapi()["paths"]),
        "agent": set(re.findall(r'@routes\.get\("([^"]+)"\)', inspect.getsource(healthz_agent))),
        **dict.fromkeys(("ingest", "maintain", "updater", "exporter"), METRICS),
    }


def test_ratchet_takes_every_command(objects: list[dict[str, Any]], tmp_path: Path) -> None:
    """As its command line parses them, including folders that must exist."""
    seen = set()
    for component, _, container in containers(objects):
        if container["name"] == "ray":
            continue  # KubeRay writes its command
        mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
        words = [str(tmp_path) if word in mounts else word for word in container["command"]]
        assert words[0] == "ratchet", component
        seen.add(" ".join(resolve(shlex.join(words), strict=True).command_path.split()[1:]))
    assert {"ingest", "maintain", "trainer", "console", "admin migrate", "metrics serve", "doctor"} <= seen


@pytest.mark.parametrize("line", ["ratchet metrics serve", "ratchet releases show"])
def test_a_command_without_what_it_needs_is_found(line: str) -> None:
    with pytest.raises(Exception, match="Missing parameter"):
        resolve(line, strict=True)


def test_ray_start_takes_the_parameters_of_every_group(service: dict[str, Any]) -> None:
    """KubeRay adds its own and passes all as ``--name=value`` (convertParamMap in its common/pod.go)."""
    for number, group in enumerate(cluster_groups(service)):
        words = [f"--{name}={value}" for name, value in group["rayStartParams"].items()]
        own = ["--block", "--metrics-export-port=8080", "--dashboard-agent-listen-port=52365", "--memory=1000"]
        role = ["--address=head:6379"] if number else ["--head"]
        parsed = scripts.start.make_context("start", [*role, *own, *words]).params
        assert parsed["head"] is (number == 0) and isinstance(parsed["object_store_memory"], int)


def test_every_container_has_settings_that_are_ratchets(objects: list[dict[str, Any]], tmp_path: Path) -> None:
    """Its variables, and the mounted file that they name."""
    file = tmp_path / "ratchet.yaml"
    file.write_text(settings_text(objects))
    for component, _, container in containers(objects):
        environ = {each["name"]: each.get("value") or SECRETS.get(each["name"], "x") for each in container["env"]}
        if "RATCHET_CONFIG" in environ:
            mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
            assert environ["RATCHET_CONFIG"] in mounts, component
            environ["RATCHET_CONFIG"] = str(file)
        load_settings(environ=environ)


def test_every_probe_asks_a_route_of_its_process(objects: list[dict[str, Any]], routes: dict[str, set[str]]) -> None:
    asked = set()
    for _, _, container in containers(objects):
        for name in {"startupProbe", "livenessProbe", "readinessProbe"} & container.keys():
            get = container[name]["httpGet"]
            process = get["port"] if container["name"] == "ray" else container["name"]
            assert get["path"] in routes[process], (container["name"], name)
            asked.add((process, get["path"]))
        if container["name"] == "ray":
            ports = {port["name"]: port["containerPort"] for port in container["ports"]}
            assert ports["agent"] == ray_constants.DEFAULT_DASHBOARD_AGENT_LISTEN_PORT
    assert ("serve", "/health/ready") in asked and ("console", "/health/ready") in asked


def test_ratchet_takes_the_commands_of_the_compose_file() -> None:
    for name, service in SERVICES.items():
        if "entrypoint" not in service:
            assert resolve(shlex.join(["ratchet", *service["command"]]), strict=True), name
        for line in re.findall(r"^ratchet .*$", str(service["command"][0]), re.MULTILINE):
            assert resolve(line, strict=True), line
    setup = SERVICES["setup"]["command"][0]
    assert "ratchet admin migrate" in setup and "ratchet base build" in setup


def test_the_health_checks_of_the_compose_file_ask_what_is_there(routes: dict[str, set[str]]) -> None:
    settings = Context(ROOT / "compose" / "ratchet.yaml", []).settings
    ports = {
        "ingest": settings.ingest.metrics_port, "maintain": settings.maintain.metrics_port,
        "updater": settings.updater.metrics_port, "console": settings.console.port,
    }  # fmt: skip
    for name, service in SERVICES.items():
        for text in service.get("healthcheck", {}).get("test", []):
            for port, path in re.findall(r"http://127\.0\.0\.1:(\d+)(/[\w/]+)", text):
                process = "updater" if name == "trainer" else name
                assert (int(port), path in routes[process]) == (ports[process], True), name


# Lines with `kubectl exec` on the pages

LINES = [(page.name, line) for page in map(Page, PAGES) for line in page.commands("kubectl") if " exec " in line]
OURS = [(name, line) for name, line in LINES if " -- " in line and "ratchet" in line.partition(" -- ")[2]]


def kubectl() -> argparse.ArgumentParser:
    """The flags of ``kubectl exec`` on the pages:
    https://kubernetes.io/docs/reference/kubectl/generated/kubectl_exec.
    """
    parser = argparse.ArgumentParser("kubectl", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("-n", "--namespace", required=True)
    run = parser.add_subparsers(required=True).add_parser("exec")
    run.add_argument("target")
    run.add_argument("-c", "--container")
    return parser


def without_env(words: list[str]) -> list[str]:
    if words[0] != "env":
        return words
    return [word for number, word in enumerate(words[1:]) if "=" not in word or "ratchet" in words[1 : number + 1]]


def deployments() -> dict[str, Any]:
    found = of_kind(render(name="ratchet"), "Deployment")
    return {each["metadata"]["name"]: each["spec"]["template"]["spec"]["containers"] for each in found}


def test_the_pages_show_what_operators_do_in_a_pod() -> None:
    words = [" ".join(without_env(shlex.split(line.partition(" -- ")[2]))) for _, line in OURS]
    for begin in ("ratchet status", "ratchet releases rollback", "ratchet keys create", "ratchet base upgrade"):
        assert any(line.startswith(begin) for line in words), begin


@pytest.mark.parametrize(("page", "line"), OURS, ids=[f"{page}: {line[:60]}" for page, line in OURS])
def test_a_command_in_a_pod_is_one_of_ratchet_in_a_deployment_of_the_chart(page: str, line: str) -> None:
    head, _, command = line.partition(" -- ")
    asked = kubectl().parse_args(shlex.split(head)[1:])
    kind, _, name = asked.target.partition("/")
    assert kind == "deploy"
    # kubectl takes the first one
    container = next(each for each in deployments()[name] if asked.container in (None, each["name"]))
    words = without_env(shlex.split(command))
    assert words[0] == container["command"][0] == "ratchet"
    assert resolve(shlex.join(words)).params is not None


def test_a_pod_in_which_operators_work_has_the_address_of_the_server_and_its_key() -> None:
    lines = [line for _, line in OURS if " releases " in line or line.endswith("ratchet status")]
    assert lines
    assert "server_url: http://ratchet-serve-svc:8000" in settings_text(render(name="ratchet"))
    for line in lines:
        name = line.partition("deploy/")[2].split()[0]
        env = {each["name"]: each for each in deployments()[name][0]["env"]}
        key = env["RATCHET_SERVE__OPERATOR_KEY"]["valueFrom"]["secretKeyRef"]
        assert key == {"name": "ratchet-operator", "key": "key"}
