"""The lines with ``kubectl exec`` on the pages name what the chart makes, and commands that its image has."""

from __future__ import annotations

import argparse
import shlex
from typing import Any

import pytest

from tests.support.chart import of_kind, render
from tests.support.pages import PAGES, Page, resolve

LINES = [(page.name, line) for page in map(Page, PAGES) for line in page.commands("kubectl") if " exec " in line]
OURS = [(name, line) for name, line in LINES if " -- " in line and "ratchet" in line.partition(" -- ")[2]]


def kubectl() -> argparse.ArgumentParser:
    """What of ``kubectl exec`` the pages use: https://kubernetes.io/docs/reference/kubectl/generated/kubectl_exec."""
    parser = argparse.ArgumentParser("kubectl", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("-n", "--namespace", required=True)
    verbs = parser.add_subparsers(required=True)
    run = verbs.add_parser("exec")
    run.add_argument("target")
    run.add_argument("-c", "--container")
    return parser


def without_env(words: list[str]) -> list[str]:
    """A command line without ``env NAME=VALUE ...`` before it."""
    if words[0] != "env":
        return words
    return [word for number, word in enumerate(words[1:]) if "=" not in word or "ratchet" in words[1 : number + 1]]


def deployments() -> dict[str, Any]:
    """Pod specs of the Deployments of a release that is named as on the pages."""
    found = of_kind(render(name="ratchet"), "Deployment")
    return {each["metadata"]["name"]: each["spec"]["template"]["spec"] for each in found}


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
    spec = deployments()[name]
    container = next(
        each for each in spec["containers"] if asked.container in (None, each["name"])
    )  # kubectl takes the first one
    words = without_env(shlex.split(command))
    assert words[0] == container["command"][0] == "ratchet"
    assert resolve(shlex.join(words)).params is not None


CALLS_SERVING = [(page, line) for page, line in OURS if " releases " in line or line.endswith("ratchet status")]


def test_a_pod_in_which_operators_work_has_the_address_of_the_server_and_its_key() -> None:
    assert CALLS_SERVING
    objects = render(name="ratchet")
    (mounted,) = [each for each in of_kind(objects, "ConfigMap") if "ratchet.yaml" in each["data"]]
    assert "server_url: http://ratchet-serve-svc:8000" in mounted["data"]["ratchet.yaml"]
    for _, line in CALLS_SERVING:
        name = line.partition("deploy/")[2].split()[0]
        env = {each["name"]: each for each in deployments()[name]["containers"][0]["env"]}
        assert env["RATCHET_SERVE__OPERATOR_KEY"]["valueFrom"]["secretKeyRef"] == {
            "name": "ratchet-operator",
            "key": "key",
        }
