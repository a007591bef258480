from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ratchet_client
from core import errors as server_errors
from ratchet_client import AsyncClient, AsyncProducer, Client, Producer, errors

FORBIDDEN = {"torch", "ray", "numpy", "pydantic", "core", "demo", "ops", "streams", "serving", "updater"}
LOADED = "import json, sys; before = set(sys.modules); {}; print(json.dumps(sorted(set(sys.modules) - before)))"


def loaded_by(statement: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", LOADED.format(statement)], capture_output=True, text=True, timeout=120, check=True
    )
    return {name.partition(".")[0] for name in json.loads(done.stdout)} - sys.stdlib_module_names


def test_every_exported_name_is_there_and_nothing_else() -> None:
    assert ratchet_client.__all__ == sorted(ratchet_client.__all__) == dir(ratchet_client)
    for name in ratchet_client.__all__:
        assert getattr(ratchet_client, name).__name__ == name
        assert inspect.getdoc(getattr(ratchet_client, name))
    with pytest.raises(AttributeError, match="Produser"):
        _ = ratchet_client.Produser


def test_every_error_of_the_tree_is_exported_and_drawn_and_those_of_the_server_have_the_same_base() -> None:
    kinds = {name for name, kind in vars(errors).items() if inspect.isclass(kind)}
    drawn = set(re.findall(r"^[ │├└─]*([A-Z]\w+)", errors.__doc__ or "", re.MULTILINE)) - {"Every", "Errors"}
    assert kinds == drawn == {name for name in ratchet_client.__all__ if name in vars(errors)}
    theirs = [kind for kind in vars(server_errors).values() if inspect.isclass(kind)]
    assert errors.RatchetError in theirs and all(issubclass(kind, errors.RatchetError) for kind in theirs)


@pytest.mark.parametrize(
    ("names", "needs"),
    [("__all__", set()), ("AsyncProducer, Producer, Sample", {"kafka", "PIL"}), ("AsyncClient, Client", {"httpx"})],
)
def test_what_a_name_needs_is_loaded_with_it_and_nothing_else(names: str, needs: set[str]) -> None:
    loaded = loaded_by(f"from ratchet_client import {names}")
    assert {"ratchet_client", *needs} <= loaded
    assert not loaded & ({*FORBIDDEN, "kafka", "PIL", "httpx"} - needs)


@pytest.mark.parametrize(("one", "other"), [(Client, AsyncClient), (Producer, AsyncProducer)])
def test_both_kinds_have_the_same_methods_with_the_same_arguments(one: type, other: type) -> None:
    def arguments(kind: type) -> dict[str, list[inspect.Parameter]]:
        public = {name: getattr(kind, name) for name in dir(kind) if name == "__init__" or not name.startswith("_")}
        return {name: list(inspect.signature(call).parameters.values()) for name, call in public.items()}

    expected = arguments(one)
    expected.pop("send_checked", None)  # the real imports were checked in other processes
    assert arguments(other) == expected


def test_its_version_is_the_server_s() -> None:
    root = Path(server_errors.__file__).parents[1]
    versions = [re.findall(r'^version = "(.*)"', (root / path).read_text(), re.MULTILINE) for path in
                ("pyproject.toml", "client/pyproject.toml", "methods/pyproject.toml")]  # fmt: skip
    assert versions[0] == versions[1] == versions[2]
    for name in ("client", "methods"):
        assert f'"ratchet-{name}=={versions[0][0]}"' in (root / "pyproject.toml").read_text()
