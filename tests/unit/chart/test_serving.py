from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._private import ray_constants
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve.config import ProxyLocation
from ray.serve.schema import ServeDeploySchema

from benchmarks.cluster.ray_service import quantity
from core.loading import load_settings
from core.settings import Settings
from serving.app import build, drain_seconds
from tests.support import chart
from tests.support.chart import PROFILES, cluster_groups, of_kind, pods, profile, render
from tests.support.tiny import tiny_base
from tests.support.tiny_vlm import tiny_vlm_base


def serve_config(objects: list[dict[str, Any]]) -> ServeDeploySchema:
    return ServeDeploySchema.model_validate(yaml.safe_load(of_kind(objects, "RayService")[0]["spec"]["serveConfigV2"]))


def settings_of(objects: list[dict[str, Any]], folder: Path) -> Settings:
    file = folder / "mounted.yaml"
    file.write_text(chart.settings_text(objects))
    return load_settings(
        environ={
            "RATCHET_CONFIG": str(file),
            "RATCHET_LEDGER_URL": "postgresql://ratchet@db/ratchet",
            "RATCHET_SERVE__OPERATOR_KEY": "k",
            "RATCHET_KAFKA__CLIENT": '{"security_protocol": "SASL_SSL", "sasl_plain_password": "p: {#\'"}',
        }
    )


def deployments(application: Any) -> dict[str, Any]:
    bound = application._bound_deployment
    found = {bound.name: bound}
    for argument in bound.init_args:
        if hasattr(argument, "_bound_deployment"):
            found |= deployments(argument)
    return found


def test_ray_serve_builds_the_application_of_the_chart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_base(tmp_path)
    tiny_vlm_base(tmp_path)
    file = tmp_path / "ratchet.yaml"
    file.write_text(yaml.safe_dump({"home": str(tmp_path), "base": {"clip": "tiny", "vlm": "tiny-vlm"}}))
    monkeypatch.setenv("RATCHET_CONFIG", str(file))
    application = serve_config(render()).applications[0]
    assert application.import_path == f"{build.__module__}:{build.__name__}"
    graph = deployments(call_user_app_builder_with_args_if_necessary(build, application.args))
    assert {"Encoder", "Vlm", "Ingress"} <= graph.keys()
    room = (chart.CHART / "templates" / "_ray.tpl").read_text().split("roomForReplicas")[1]
    counted = dict(re.findall(r'"?(\w+)"? (?::= )?(0\.\d)\b', room))
    assert {name.capitalize().replace("Total", "Catalog"): float(cpus) for name, cpus in counted.items()} == {
        name: deployment.ray_actor_options["num_cpus"] for name, deployment in graph.items()
    }
    for name in PROFILES:
        config = serve_config(render(profile(name)))
        assert config.proxy_location == ProxyLocation.EveryNode
        configured = {each.name: each for each in config.applications[0].deployments}
        assert configured.keys() <= graph.keys()
        for each in configured.keys() & {"Encoder", "Vlm"}:
            assert configured[each].ray_actor_options.num_cpus > 0  # it replaces what the code says


def full_node(objects: list[dict[str, Any]], folder: Path) -> tuple[tuple[float, float], tuple[float, float]]:
    """CPUs and GPUs of a node with as many replicas of each deployment as it may have, and those of a node."""
    at = settings_of(objects, folder).serve
    group = cluster_groups(of_kind(objects, "RayService")[0])[1]
    resources = group["template"]["spec"]["containers"][0]["resources"]
    replicas = {
        "Encoder": at.encoder_replicas, "Vlm": at.vlm_replicas,
        "Ingress": at.ingress_replicas, "Controller": min(2, at.ingress_replicas),
    }  # fmt: skip
    cpus = gpus = 0.0
    for each in serve_config(objects).applications[0].deployments:
        limit = each.max_replicas_per_node
        most = min(replicas[each.name], limit if isinstance(limit, int) else replicas[each.name])
        assert most * group["replicas"] >= replicas[each.name], each.name
        options = each.ray_actor_options if each.name in ("Encoder", "Vlm") else None
        cpus += most * (options.num_cpus if options else 0.2)
        gpus += most * (options.num_gpus if options else 0)
    room = math.ceil(quantity(resources["requests"]["cpu"])) - 0.1  # less the catalog, which may be on any of them
    return (cpus, gpus), (room, float(resources["limits"].get("nvidia.com/gpu", 0)))


def test_all_replicas_fit_on_the_workers_in_whatever_order_they_are_placed(tmp_path: Path) -> None:
    """Ray puts each replica on any node that has room. One that is left fits somewhere if nodes have room for as many
    of each deployment as they may have; without limits, encoders take the room of a VLM.
    """
    for name in PROFILES:
        (cpus, gpus), (room, room_gpus) = full_node(render(profile(name)), tmp_path)
        assert cpus <= room + 1e-9 and gpus <= room_gpus + 1e-9, name
    unlimited = {"serving": {"actors": {"encoder": {"maxPerNode": 100}, "vlm": {"maxPerNode": 100}}}}
    (_, gpus), (_, room_gpus) = full_node(render(profile("multigpu"), unlimited), tmp_path)
    assert gpus > room_gpus


@pytest.mark.parametrize("deadline", [30, 600.5])
def test_a_node_that_ends_has_time_for_successors_and_what_is_in_flight(deadline: float, tmp_path: Path) -> None:
    assert hasattr(ray_constants, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S")  # Ray reads the variable of this name
    objects = render(profile("cpu"), {"settings": {"serve": {"deadline_seconds": deadline}}})
    in_flight = drain_seconds(settings_of(objects, tmp_path))
    for group in cluster_groups(of_kind(objects, "RayService")[0]):
        spec = group["template"]["spec"]
        drain = int(chart.variables(spec["containers"][0])["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert drain >= in_flight + 60  # Serve stops replicas that long before the end of the drain
        assert spec["terminationGracePeriodSeconds"] > drain


NODE = {"cpu": 7.5, "memory": 29 * 2**30}


def requested(template: dict[str, Any]) -> dict[str, float]:
    """Kubernetes' reservation for a pod: the sum of its containers, or the maximum of its init containers."""
    first, then = (
        [{name: quantity(str(each["resources"]["requests"][name])) for name in NODE} for each in containers]
        for containers in (template["spec"].get("initContainers", []), template["spec"]["containers"])
    )
    return {name: max([sum(each[name] for each in then), *(each[name] for each in first)]) for name in NODE}


def test_two_nodes_of_the_profile_without_gpus_have_room_for_the_second_cluster_of_an_upgrade() -> None:
    """Each pod goes to the node with fewer of its kind, then to the one with more room, as Kubernetes scores them."""
    templates = dict(pods(render(profile("cpu"))))
    cluster = ["serving-head", "serving-worker", "serving-worker"]
    nodes: list[dict[str, Any]] = [{"pods": [], "left": dict(NODE)} for _ in range(2)]
    for component in [*cluster, "updater", "ingest", "maintain", "console", *cluster, "migration", "test"]:
        asked = requested(templates[component])
        node = min(nodes, key=lambda each: (each["pods"].count(component), -each["left"]["cpu"]))
        node["pods"].append(component)
        node["left"] = {name: node["left"][name] - asked[name] for name in NODE}
        assert min(node["left"].values()) >= 0, (component, node)


def test_helm_test_asks_the_pods_of_this_version_and_not_those_that_still_serve() -> None:
    """While the second cluster of an upgrade has no room, the first one answers to the name that clients use."""

    def asked(values: Any) -> tuple[dict[str, str], dict[str, str]]:
        """Selector of the service that ``helm test`` calls, and labels of a worker."""
        objects = render(values)
        (test,) = of_kind(objects, "Pod")
        command = test["spec"]["containers"][0]["command"]
        name = command[command.index("--server") + 1].removeprefix("http://").removesuffix(":8000")
        (service,) = [each for each in of_kind(objects, "Service") if each["metadata"]["name"] == name]
        assert service["spec"]["ports"][0]["port"] == 8000
        return service["spec"]["selector"], dict(pods(objects))["serving-worker"]["metadata"]["labels"]

    before, workers_before = asked({})
    assert before.items() <= workers_before.items()
    for change in (
        {"settings": {"serve": {"max_batch": 7}}}, {"image": {"tag": "next"}}, {"podAnnotations": {"a.example/b": "c"}},
        {"serving": {"head": {"resources": {"requests": {"cpu": "2"}}}}}, {"serving": {"workers": {"replicas": 3}}},
        {"extraEnv": [{"name": "A", "value": "b"}]},
    ):  # fmt: skip
        after, workers_after = asked(change)
        assert after.items() <= workers_after.items(), change
        assert not after.items() <= workers_before.items(), change
    in_place, _ = asked({"serving": {"actors": {"encoder": {"cpus": 0.25}}}, "ingest": {"replicas": 2}})
    assert in_place == before
