"""The images as the Dockerfile builds them, and Compose's containers of them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

from core.waiting import wait_until
from install import PYTORCH_INDEX, answers
from tests.outside.images.engine import Engine, Layer, engine
from tests.support.downloads import NotHere

pytestmark = pytest.mark.timeout(3 * 3600)
ROOT: Final = Path(__file__).parents[3]
BASE: Final = "python:3.11-slim-bookworm"
MB: Final = 1e6
SLIM_BYTES: Final = 1.5e9
CODE_BYTES: Final = 50e6
HEALTHY_SECONDS: Final = 600.0
STOP_SECONDS: Final = 90
SLIM: Final = ("ingest", "maintain", "console")
PARTS: Final = ("serve", "trainer", *SLIM)
FILES: Final = (str(ROOT / "compose.yaml"), "--file", str(Path(__file__).with_name("compose.yaml")))
PROJECT: Final = ("--project-name", "ratchet-images-test", "--project-directory", str(ROOT), "--file", *FILES)
SECRETS: Final = dict.fromkeys(("POSTGRES_PASSWORD", "S3_SECRET_KEY", "OPERATOR_KEY", "GRAFANA_PASSWORD"), "secret")
ASK: Final = """
import json, time, urllib.error, urllib.request
body = json.dumps({"model": "clip", "input": ["a red square"]}).encode()
key = {"authorization": "Bearer secret"}
def ask(path, body=None, **headers):
    headers["content-type"] = "application/json"
    try:
        with urllib.request.urlopen(urllib.request.Request("http://127.0.0.1:8000" + path, body, headers)) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, None
print(ask("/v1/embeddings", body)[0], len(ask("/v1/embeddings", body, **key)[1]["data"][0]["embedding"]))
while ask("/health/ready/vlm", **key)[0] != 200:
    time.sleep(1)
"""
"""Asks the model server without a key, then with one, and waits until the VLM is ready."""
Show = Callable[[str, list[tuple[str, ...]]], None]


@pytest.fixture(scope="module")
def docker() -> Iterator[Engine]:
    try:
        with engine(BASE) as found:
            yield found
    except NotHere as error:
        pytest.skip(f"Docker was left out: {error}")


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout. Its lock for processors has PyPI's PyTorch if PyTorch's own index cannot be reached."""
    copy = tmp_path_factory.mktemp("context")
    listed = subprocess.check_output(["git", "ls-files", "-z", "-c", "-o", "--exclude-standard"], cwd=ROOT, text=True)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    if not answers(PYTORCH_INDEX, None):
        cpu, gpu = ((copy / "locks" / name) for name in ("cpu.txt", "gpu.txt"))
        cpu.write_text(with_pytorch_of(gpu.read_text(), cpu.read_text()))
        dockerfile = copy / "Dockerfile"  # else pip tries that index again and again for each package
        dockerfile.write_text(re.sub(r"--extra-index-url \S+ ", "", dockerfile.read_text()))
    return copy


@pytest.fixture(scope="module")
def images(docker: Engine, context: Path) -> dict[str, list[Layer]]:
    return {target: docker.build(context, target) for target in ("slim", "cpu")}


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str]) -> Show:
    def print_table(title: str, rows: list[tuple[str, ...]]) -> None:
        with capsys.disabled():
            print(f"\n{title}", *(" | ".join(("", *row, "")).strip() for row in rows), sep="\n")

    return print_table


def with_pytorch_of(other: str, lock: str) -> str:
    """``lock`` with the PyTorch of another one, and the CUDA libraries that it needs."""
    packages, others = requirements(lock), requirements(other)
    found = {"torch", "torchvision"}
    while more := {name for name, text in others.items() if parents(text) & found} - found:
        found |= more
    left_out = {"triton", *packages} - {"torch", "torchvision"}
    return "".join((packages | {name: others[name] for name in found - left_out}).values())


def requirements(lock: str) -> dict[str, str]:
    blocks = re.findall(r"^\w.*\n(?:[ #].*\n)*", lock, re.MULTILINE)
    return {re.split(r"[=\[]", block)[0]: block for block in blocks}


def parents(requirement: str) -> set[str]:
    """Packages that need one, by uv's comments."""
    return set(re.findall(r"^ +#(?: via)? +([\w.-]+)$", requirement, re.MULTILINE)) - {"via"}


def shipped_again(before: list[Layer], after: list[Layer]) -> int:
    """Bytes of layers that a registry lacks."""
    there = {layer.digest for layer in before}
    return sum(layer.size for layer in after if layer.digest not in there)


def test_a_change_of_code_ships_less_than_50_megabytes_again_and_slim_is_small(
    docker: Engine, context: Path, images: dict[str, list[Layer]], show: Show
) -> None:
    with (context / "core" / "errors.py").open("a") as module:
        module.write("\nCHANGED = True\n")
    again = {target: shipped_again(layers, docker.build(context, target)) for target, layers in images.items()}
    for target, layers in images.items():
        rows = [(f"{layer.size / MB:,.1f} MB", layer.instruction[:100]) for layer in layers if layer.size > MB / 10]
        total = sum(layer.size for layer in layers)
        rows += [(f"{total / MB:,.1f} MB", "in all"), (f"{again[target] / MB:,.1f} MB", "again after a change of code")]
        show(f"ratchet:{target}", rows)
    assert max(again.values()) < CODE_BYTES
    assert sum(layer.size for layer in images["slim"]) < SLIM_BYTES


@pytest.mark.parametrize(("target", "absent"), [("slim", "torch triton vllm transformers"), ("cpu", "triton")])
def test_an_image_lacks_what_its_parts_do_not_import_and_lists_what_it_has(
    docker: Engine, images: dict[str, list[Layer]], target: str, absent: str
) -> None:
    image = f"ratchet:{target}"
    program = f"import importlib.util as u; print([name for name in {absent.split()} if u.find_spec(name)])"
    assert docker("run", "--rm", "--entrypoint", "python", image, "-c", program) == "[]\n"
    listing = docker("run", "--rm", "--entrypoint", "cat", image, "/usr/local/share/ratchet/sbom.cdx.json")
    components = {component["name"] for component in json.loads(listing)["components"]}
    assert {"ratchet-server", "ratchet-client", "pyarrow"} <= components and not components & set(absent.split())


@pytest.fixture(scope="module")
def started(
    docker: Engine, images: dict[str, list[Layer]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    """IDs of Compose's containers, by part."""
    environment = {**SECRETS, "DATA": str(tmp_path_factory.mktemp("data"))}

    def compose(*words: str, seconds: float = 300) -> str:
        return docker("compose", *PROJECT, *words, seconds=seconds, **environment)

    try:
        compose("up", "--detach", "--no-build", *PARTS, seconds=HEALTHY_SECONDS)
        yield {part: compose("ps", "--all", "--quiet", part).strip() for part in PARTS}
    finally:
        compose("down", "--volumes", "--timeout", str(STOP_SECONDS))


def test_every_part_runs_without_rights_is_healthy_and_ends_cleanly(
    docker: Engine, started: dict[str, str], show: Show
) -> None:
    ended = {}
    rows = [("part", "image", "healthy after", "memory", "after SIGTERM")]
    for part, container in started.items():
        assert wait_until(partial(healthy, docker, container), HEALTHY_SECONDS, pause=1), docker("logs", container)
        status = docker("exec", container, "cat", "/proc/1/status")
        for line in ("Uid:\t10001\t10001", "NoNewPrivs:\t1", "CapEff:\t0000000000000000", "CapBnd:\t0000000000000000"):
            assert line in status, part
        assert "Read-only file system" in docker("exec", container, "sh", "-c", "touch /usr/local/x 2>&1 || true")
    assert docker("exec", started["serve"], "python", "-c", ASK, seconds=HEALTHY_SECONDS).split() == ["401", "384"]
    for part, container in started.items():
        memory = docker("stats", "--no-stream", "--format", "{{.MemUsage}}", container).partition(" /")[0]
        begun = time.monotonic()
        docker("stop", "--time", str(STOP_SECONDS), container, seconds=STOP_SECONDS + 30)
        took = time.monotonic() - begun
        (inspected,) = docker.inspect(container)
        ended[part] = inspected["State"]["ExitCode"]
        rows.append((part, inspected["Config"]["Image"], f"{seconds_to_healthy(inspected):.0f} s", memory,
                     f"{took:.0f} s, exit {ended[part]}"))  # fmt: skip
    show("Compose", rows)
    assert ended == dict.fromkeys(PARTS, 0)


def healthy(docker: Engine, container: str) -> bool:
    (inspected,) = docker.inspect(container)
    return bool(inspected["State"]["Health"]["Status"] == "healthy")


def seconds_to_healthy(inspected: dict[str, Any]) -> float:
    """From a container's start to the first check that it passed, of the last five."""
    passed = next(check for check in inspected["State"]["Health"]["Log"] if check["ExitCode"] == 0)
    return (moment(passed["Start"]) - moment(inspected["State"]["StartedAt"])).total_seconds()


def moment(text: str) -> datetime:
    """Docker's times have nanoseconds."""
    return datetime.fromisoformat(re.sub(r"(\.\d{6})\d*", r"\1", text))
