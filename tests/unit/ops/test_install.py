from __future__ import annotations

import functools
import os
import re
import runpy
import subprocess
import sys
import sysconfig
import threading
import tomllib
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from core.addresses import free_port

ROOT = Path(__file__).parents[3]
UV = str(Path(sysconfig.get_path("scripts")) / "uv")


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "install.py"))


def stub_wheel(folder: Path, version: str) -> None:
    """A wheel of torch without contents."""
    info = f"torch-{version}.dist-info"
    with zipfile.ZipFile(folder / f"torch-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@contextmanager
def serve_folder(folder: Path) -> Iterator[str]:
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()


def write_project(folder: Path) -> Path:
    project = folder / "a project"
    (project / "package").mkdir(parents=True)
    (project / "pyproject.toml").write_text(
        '[project]\nname = "package"\nversion = "1"\ndependencies = ["torch>=2.13,<2.14"]\n'
        "[project.optional-dependencies]\nlocal = []\n"
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[tool.setuptools]\npackages = ["package"]\n'
    )
    return project


def install(folder: Path, pip: dict[str, str]) -> tuple[str, str]:
    """Run install.py for such a project in a new environment. Returns its output and the installed version of torch."""
    python = folder / "venv" / "bin" / "python"
    subprocess.run([UV, "venv", "-q", "--seed", python.parents[1]], check=True)
    subprocess.run([UV, "pip", "install", "-q", "--python", python, "uv>=0.13,<1"], check=True)
    env = {**{name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_"))}, **pip}
    words = [python, ROOT / "install.py", "local"]
    done = subprocess.run(words, cwd=write_project(folder), env=env, stdout=subprocess.PIPE, text=True, check=True)
    version = "from importlib.metadata import version; print(version('torch'))"
    return done.stdout, subprocess.run([python, "-c", version], capture_output=True, text=True, check=True).stdout


def recording_uv(folder: Path) -> Path:
    """A uv that records its arguments and finds two packages of 1 and 2 MB."""
    uv = folder / "uv"
    lock = "".join(
        f'[[packages]]\nname = "{name}"\nversion = "2.13.0"\nwheels = [{{ url = "http://x/x.whl", size = {size} }}]\n'
        for name, size in (("torch", 1_000_000), ("other", 2_000_000))
    )
    uv.write_text(
        f'#!/bin/sh\necho "$*" >>"{folder}/commands"\nfor last; do :; done\n'
        f'[ "$1" = cache ] && echo "{folder}/cache" && exit\ncat >"$last" <<END\n{lock}END\n'
    )
    uv.chmod(0o755)
    return uv


def test_what_pip_was_told_of_an_index_wheels_and_constraints_is_passed_on(script: dict[str, Any]) -> None:
    listing = r"""
:env:.find-links='/opt/wheels'
global.cert='/etc/ssl/ca.crt'
global.constraint='/etc/a.txt /etc/b.txt'
global.find-links='/other'
global.index-url='https://one.example/simple'
install.index-url='https://mirror.example/simple'
install.extra-index-url='\nhttps://two.example/simple\nhttps://three.example/simple'
global.progress-bar='off'
list.format='json'
"""
    assert script["uv_variables"](listing) == {
        "UV_FIND_LINKS": "/opt/wheels",
        "SSL_CERT_FILE": "/etc/ssl/ca.crt",
        "UV_CONSTRAINT": "/etc/a.txt /etc/b.txt",
        "UV_DEFAULT_INDEX": "https://mirror.example/simple",
        "UV_INDEX": "https://two.example/simple https://three.example/simple",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
    }
    assert script["uv_variables"]("") == {}


@pytest.mark.parametrize("kind", ["folder", pytest.param("index", marks=pytest.mark.long)])
def test_the_builds_for_processors_are_taken_from_where_pip_was_told_to_look(tmp_path: Path, kind: str) -> None:
    wheels = tmp_path / "wheels" / "torch"
    wheels.mkdir(parents=True)
    for version in ("2.13.0", "2.13.0+cpu"):
        stub_wheel(wheels, version)
    with serve_folder(wheels.parent) as url:
        pip = {"PIP_FIND_LINKS": str(wheels)} if kind == "folder" else {"PIP_EXTRA_INDEX_URL": url}
        said, installed = install(tmp_path, pip)
    assert "torch 2.13.0+cpu: the build for processors, from a folder or an index of pip's configuration" in said
    assert installed.strip() == "2.13.0+cpu"


def test_pips_only_index_comes_first_then_pytorchs_and_then_pypi(
    script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch").mkdir(parents=True)
    stub_wheel(tmp_path / "torch", "2.13.1")
    monkeypatch.chdir(write_project(tmp_path))
    uv = recording_uv(tmp_path)
    with serve_folder(tmp_path) as url:
        monkeypatch.setitem(script["choose"].__globals__, "PYTORCH_INDEX", url)  # which answers
        alone = {**os.environ, "UV_DEFAULT_INDEX": url, "UV_NO_CONFIG": "1"}
        plan, source = script["choose"](Path(UV), "local", alone)
        assert (plan.torch, plan.packages, plan.options) == ("2.13.1", 1, ())
        assert source == "from 127.0.0.1, which has no build for processors"
        plan, source = script["choose"](uv, "local", dict(os.environ))
    assert plan.options[0] == "--torch-backend" and source.startswith("from PyTorch's own index")
    first, second = (tmp_path / "commands").read_text().splitlines()
    assert "--torch-backend" not in first and f"--torch-backend {plan.options[1]}" in second
    monkeypatch.setitem(script["choose"].__globals__, "PYTORCH_INDEX", f"http://127.0.0.1:{free_port()}/")
    plan, source = script["choose"](uv, "local", dict(os.environ))
    assert (plan.options, plan.torch, plan.packages, plan.size) == ((), "2.13.0", 2, 3_000_000)
    assert source.startswith("PyPI's build")


def test_a_disk_that_is_too_small_ends_it_before_anything_is_downloaded(script: dict[str, Any], tmp_path: Path) -> None:
    uv, plan = recording_uv(tmp_path), script["Plan"]
    problem = script["missing_space"](plan("2.13.0", 300, 10**15), uv, dict(os.environ))
    assert "2200000.0 GB are needed for 300 packages" in problem and "UV_CACHE_DIR" in problem
    assert not script["missing_space"](plan("2.13.0", 300, 1), uv, dict(os.environ))


def test_an_old_python_is_named_before_an_environment_is_made(tmp_path: Path) -> None:
    old = tmp_path / "python3.9"
    program = "import sys; sys.version_info = (3, 9); exec(sys.argv[1])"
    old.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{program}" "$2"\n')
    old.chmod(0o755)
    command = ["make", "-C", str(ROOT), "demo", f"VENV={tmp_path}/venv", f"PYTHON={old}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0 and "Python 3.11 or later is needed" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_the_demo_installs_its_own_extra_unless_that_of_the_tests_is_there(tmp_path: Path) -> None:
    def planned(target: str) -> str:
        command = ["make", "-n", "-C", str(ROOT), target, f"VENV={tmp_path}"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert "install.py local" in planned("demo")
    (tmp_path / ".installed-local").touch()
    assert "install.py" not in planned("demo")
    assert "install.py dev" in planned("test")
    (tmp_path / ".installed-local").unlink()
    (tmp_path / ".installed-dev").touch()
    assert "install.py" not in planned("demo") + planned("test"), "the tests need all that the demo needs"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert "local" in re.findall(r"[\w-]+", extras["dev"][0])
    assert not any(tool in " ".join(extras["local"]) for tool in ("pytest", "mypy", "ruff", "playwright"))
