"""Dockerfile and compose.yaml: Docker is not available here, so they are linted and compared with the code."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from core.loading import load_settings
from core.settings import Settings
from ops.cli.metrics import targets_of
from tests.support.chart import ROOT, render

BIN = Path(sys.executable).parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
OURS = ("setup", "serve", "ingest", "maintain", "trainer", "console")


def run(*command: str | Path) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def stages() -> dict[str, str]:
    found = re.findall(r"^FROM \S+ AS (\S+)\n(.*?)(?=^FROM |\Z)", DOCKERFILE, re.MULTILINE | re.DOTALL)
    return dict(found)


def test_the_files_pass_their_linters() -> None:
    assert run(BIN / "hadolint", "Dockerfile") == ""
    assert "ok" in run(BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", "compose.yaml")


def test_both_targets_end_as_a_user_without_rights_and_can_tell_their_health() -> None:
    for target in ("cpu", "gpu"):
        assert re.findall(r"^USER (.*)$", stages()[target], re.MULTILINE)[-1:] == ["10001:10001"]
    assert "HEALTHCHECK" in DOCKERFILE.partition("FROM python:${PYTHON} AS run")[2]
    (packages,) = re.findall(r"--no-install-recommends (.*) \\$", stages()["cpu"], re.MULTILINE)
    assert packages == "libnuma1", "what vLLM loads, and no compiler"
    user = next(each for each in render() if each["kind"] == "Deployment")["spec"]["template"]["spec"]
    for word, name in (("useradd --uid", "runAsUser"), ("groupadd --gid", "runAsGroup")):
        assert f"{word} {user['securityContext'][name]}" in DOCKERFILE, "pods run as the image's user"


def test_the_image_has_every_package_and_only_extras_that_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    let_through = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for pattern in project["tool"]["setuptools"]["packages"]["find"]["include"]:
        name = pattern.rstrip("*")
        assert f"COPY {name} /src/{name}" in DOCKERFILE
        assert name in let_through
    assert {"locks", "client"} <= let_through and "COPY client /src/client" in DOCKERFILE


@pytest.mark.parametrize(("flavour", "vlm"), [("cpu", "vlm-cpu"), ("gpu", "gpu")])
def test_a_lock_has_a_version_and_digests_of_everything_that_the_project_names(flavour: str, vlm: str) -> None:
    """`make lock` writes it; fails here after a requirement was added or raised."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    client = tomllib.loads((ROOT / "client" / "pyproject.toml").read_text())["project"]
    extras = ("local", "postgres", "registry", "s3", "traces", vlm)
    wanted = [*project["dependencies"], *(each for name in extras for each in project["optional-dependencies"][name])]
    lock = locked(flavour)
    for line in [*wanted, *client["dependencies"]]:
        requirement = Requirement(line)
        if requirement.name == client["name"]:
            continue  # built from this source
        version = lock[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version.partition("+")[0]), (
            f"{line}: {version} is locked, run `make lock`"
        )
    assert not {"torchaudio", "torchcodec"} & lock.keys(), "their builds for CUDA fail to import without it"
    text = (ROOT / "locks" / f"{flavour}.txt").read_text()
    assert text.count("==") == len(lock) and len(re.findall(r"== ?\S+ \\\n    --hash=sha256:", text)) == len(lock)
    assert f"--requirement locks/{flavour}.txt" in stages()[f"build-{flavour}"]


def test_both_images_have_the_same_versions_but_for_what_cuda_brings() -> None:
    cpu, gpu = locked("cpu"), locked("gpu")
    optional = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (of_gpu,), (of_cpu,) = optional["gpu"], optional["vlm-cpu"]
    assert Requirement(of_gpu).specifier == Requirement(of_cpu).specifier
    assert str(Requirement(of_gpu).specifier).count("<") == 1
    different = {name for name in cpu.keys() & gpu.keys() if cpu[name].partition("+")[0] != gpu[name].partition("+")[0]}
    assert different <= {"setuptools", "triton", "apache-tvm-ffi"}, "vLLM's two builds pin these differently"
    for name in ("ray", "transformers", "torch", "open-clip-torch", "peft", "pylance"):
        assert cpu[name].partition("+")[0] == gpu[name].partition("+")[0]


def locked(flavour: str) -> dict[str, str]:
    text = (ROOT / "locks" / f"{flavour}.txt").read_text()
    lines = re.findall(r"^([A-Za-z0-9._-]+)(?:\[[^]]*\])?==(\S+)", text, re.MULTILINE)
    return {canonicalize_name(name): version for name, version in lines}


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_every_image_is_pinned_its_container_closed_and_nothing_listens_beyond_loopback(name: str) -> None:
    service = COMPOSE["services"][name]
    assert "no-new-privileges:true" in service["security_opt"]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    if name not in OURS:
        assert re.search(r":v?\d", service["image"])
        return
    assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
    assert all("exec" in mount.partition(":")[2].split(",") for mount in service["tmpfs"]), "Ray runs HAProxy from /tmp"


def test_one_service_builds_the_image_and_the_others_wait_for_it() -> None:
    services = {name: COMPOSE["services"][name] for name in OURS}
    assert [name for name, service in services.items() if "build" in service] == ["setup"]
    assert services["setup"]["build"]["target"] == services["setup"]["image"].partition(":")[2]
    for name in set(OURS) - {"setup"}:
        assert services[name]["image"] == services["setup"]["image"]
        assert services[name]["pull_policy"] == "never"  # else Compose asks a registry for it before it builds
        assert services[name]["depends_on"]["setup"] == {"condition": "service_completed_successfully"}


def test_every_password_is_asked_for_and_none_is_given() -> None:
    asked = set(re.findall(r"\$\{(\w+):\?", (ROOT / "compose.yaml").read_text()))
    example = (ROOT / "compose" / "example.env").read_text().splitlines()
    assert {line.rstrip("=") for line in example if line.endswith("=")} == asked
    assert ".env" in (ROOT / ".gitignore").read_text().split()


def test_every_mounted_file_is_there() -> None:
    mounts = [mount for service in COMPOSE["services"].values() for mount in service.get("volumes", [])]
    sources = {mount.partition(":")[0] for mount in mounts}
    assert {source for source in sources if not source.startswith(("./", "$"))} <= COMPOSE["volumes"].keys()
    for source in sources:
        assert not source.startswith("./") or (ROOT / source).exists(), source


def settings() -> Settings:
    environment = {
        name: re.sub(r"\$\{(\w+):\?[^}]*\}", "secret", value)
        for name, value in COMPOSE["services"]["serve"]["environment"].items()
        if name.startswith("RATCHET_")
    }
    return load_settings(ROOT / "compose" / "ratchet.yaml", environ=environment)


def test_the_settings_are_ratchets_and_name_the_services() -> None:
    at = settings()
    urls = (at.ledger.partition("@")[2], at.kafka.bootstrap, at.server.removeprefix("http://"))
    assert {url.partition(":")[0] for url in urls} <= COMPOSE["services"].keys()
    assert at.serve.host == at.metrics_host == at.console.host == "0.0.0.0"


def test_prometheus_scrapes_every_part_under_its_name(tmp_path: Path) -> None:
    text = (ROOT / "compose" / "prometheus.yml").read_text()
    found = yaml.safe_load(text)
    (job,) = found["scrape_configs"]
    there, here = job["static_configs"], targets_of(settings(), "here")
    assert job["job_name"] == "ratchet"
    assert [each["labels"] for each in there] == [each["labels"] for each in here]
    for each, other in zip(there, here, strict=True):
        service, _, port = each["targets"][0].partition(":")
        assert service in COMPOSE["services"]
        assert port == other["targets"][0].rpartition(":")[2]
    local = tmp_path / "prometheus.yml"
    local.write_text(text.replace("/etc/prometheus/rules", str(ROOT / "ops" / "alerts")))
    assert "SUCCESS" in run("promtool", "check", "config", local)


def test_grafana_finds_the_dashboards() -> None:
    provider = yaml.safe_load((ROOT / "compose" / "grafana" / "dashboards.yaml").read_text())["providers"][0]
    mounted = {mount.split(":")[1]: mount.split(":")[0] for mount in COMPOSE["services"]["grafana"]["volumes"]}
    assert list((ROOT / mounted[provider["options"]["path"]]).glob("*.json"))
