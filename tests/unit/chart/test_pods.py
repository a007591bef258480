from __future__ import annotations

import json
from functools import cache
from typing import Any

import kubernetes_validate
from helm_python import lint
from jsonschema import Draft202012Validator
from ray._private import ray_constants

from benchmarks.cluster.ray_service import quantity
from tests.support import chart
from tests.support.chart import EVERYTHING, ROOT, containers, named, of_kind, pods, profile, render, selects, variables

KUBERNETES = ("1.28", "1.32", "1.37")
"""The oldest that the docs name, one between, and the newest that has schemas."""
TRAINING = {"training-head", "training-worker"}
SERVING = {"serving-head", "serving-worker"}
WORKLOADS = {*SERVING, "ingest", "maintain", "updater", "console"}


def ray_pods(objects: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {component: pod["spec"]["containers"][0] for component, pod in pods(objects) if component in SERVING}


@cache
def custom(kind: str) -> Draft202012Validator | None:
    folder = ROOT / "tests" / "support" / "crds"
    if kind == "RayCluster":  # a RayService has one inside
        spec = json.loads((folder / "RayService.json").read_text())["properties"]["spec"]
        return Draft202012Validator({"properties": {"spec": spec["properties"]["rayClusterConfig"]}})
    path = folder / f"{kind}.json"
    return Draft202012Validator(json.loads(path.read_text())) if path.exists() else None


@cache
def check(text: str) -> None:
    """Raise when an object is not valid. Most objects are the same in all profiles and are checked once."""
    found = json.loads(text)
    schema = custom(found["kind"])
    if schema is not None:
        schema.validate(found)
        return
    for version in KUBERNETES:
        kubernetes_validate.validate(found, version, strict=True)


def test_every_profile_passes_helms_lint_and_every_object_is_valid(values: Any, objects: list[dict[str, Any]]) -> None:
    report = lint(chart.CHART, chart.merged(chart.NEEDED, values), strict=True)
    assert report["total_charts_linted"] == 1 and not report["errors"]
    assert [found["error"] for found in report["messages"] if found["severity"] > 1] == []
    for each in objects:
        check(json.dumps(each, sort_keys=True))
    for _, template in pods([each for each in objects if each["kind"] in ("RayService", "RayCluster")]):
        check(json.dumps({"apiVersion": "v1", "kind": "Pod", **template}, sort_keys=True))


def test_every_container_has_few_rights_a_read_only_root_and_bounds(objects: list[dict[str, Any]]) -> None:
    assert of_kind(objects, "ServiceAccount")[0]["automountServiceAccountToken"] is False
    for component, spec, container in containers(objects):
        assert spec["automountServiceAccountToken"] is (component == "training-head"), "where Ray adds pods"
        assert spec["securityContext"]["runAsNonRoot"] is True and spec["securityContext"]["runAsUser"] > 0, component
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        assert not [name for name, volume in volumes.items() if "hostPath" in volume]
        assert all(volume["emptyDir"]["sizeLimit"] for volume in volumes.values() if "emptyDir" in volume), component
        security, mounts = container["securityContext"], container["volumeMounts"]
        assert security["allowPrivilegeEscalation"] is False and security["readOnlyRootFilesystem"] is True
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert {mount["name"] for mount in mounts} <= volumes.keys(), component
        home = variables(container)["HOME"]
        assert {"/tmp", "/home/ratchet", home} <= {mount["mountPath"] for mount in mounts}
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys(), component
        assert "memory" in container["resources"]["limits"], component


def test_a_pod_asks_for_the_disk_that_it_usually_fills(objects: list[dict[str, Any]]) -> None:
    """Else the scheduler puts pods on a node without room for it, and the kubelet evicts them."""
    for component, template in pods(objects):
        asked = [each["resources"]["requests"] for each in template["spec"]["containers"]]
        disk = sum(quantity(each["ephemeral-storage"]) for each in asked if "ephemeral-storage" in each)
        empty = [volume["emptyDir"] for volume in template["spec"]["volumes"] if "emptyDir" in volume]
        room = sum(quantity(each["sizeLimit"]) for each in empty if each.get("medium") != "Memory")
        assert 0 < disk <= room, component


def test_each_part_has_its_pods_which_are_probed_and_spread_over_nodes(objects: list[dict[str, Any]]) -> None:
    optional = {*TRAINING, "indexes"} if of_kind(objects, "RayCluster") else set()
    assert {component for component, _ in pods(objects)} == {*WORKLOADS, *optional, "migration", "test"}
    for component, template in pods(objects):
        if component not in {*WORKLOADS, "indexes"}:
            continue
        for container in template["spec"]["containers"]:
            ports = {port["name"] for port in container["ports"]}
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                assert container[probe]["httpGet"]["port"] in ports, (component, container["name"], probe)
        spread = template["spec"]["topologySpreadConstraints"]
        assert {each["topologyKey"] for each in spread} == {"kubernetes.io/hostname", "topology.kubernetes.io/zone"}
        for each in spread:
            assert each["labelSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()


def test_ray_pods_get_requests_once_their_models_answer_and_log_where_pods_do(objects: list[dict[str, Any]]) -> None:
    """As Ray's workers and Ray Serve read it: ray_constants and ray.serve._private.constants."""
    wanted = {
        "RAY_SERVE_HAPROXY_BINARY_PATH": "/usr/local/bin/ratchet-haproxy", "FORWARDED_ALLOW_IPS": "none",
        ray_constants.LOGGING_REDIRECT_STDERR_ENVIRONMENT_VARIABLE: "1", "RAY_SERVE_LOG_TO_STDERR": "1",
        "RAY_BACKEND_LOG_LEVEL": "warning", "RAY_LOGGER_LEVEL": "warning",
    }  # fmt: skip
    ray = ray_pods(objects)
    for container in ray.values():
        assert wanted.items() <= variables(container).items()
    assert ray["serving-worker"]["readinessProbe"]["httpGet"] == {"path": "/health/ready", "port": "serve"}
    # KubeRay deploys the application when the head is ready: it cannot wait for the application.
    assert ray["serving-head"]["readinessProbe"]["httpGet"]["path"] == "/api/healthz"


def test_one_process_trains_and_one_maintains_and_no_upgrade_adds_a_writer(objects: list[dict[str, Any]]) -> None:
    for part, command in (("updater", "trainer"), ("maintain", "maintain")):
        spec = named(objects, "Deployment", part)["spec"]
        assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})
        assert spec["template"]["spec"]["containers"][0]["command"] == ["ratchet", command]
    for deployment in of_kind(objects, "Deployment"):
        strategy = deployment["spec"]["strategy"]
        assert strategy["type"] == "Recreate" or strategy["rollingUpdate"]["maxSurge"] == 0
    scaled = {each["spec"]["scaleTargetRef"]["name"] for each in of_kind(objects, "ScaledObject")}
    assert scaled <= {"live-ratchet-ingest"} and not of_kind(objects, "HorizontalPodAutoscaler")


def test_each_bound_topic_has_its_own_ingest_and_no_two_deployments_select_the_same_pods() -> None:
    names = ["samples.Gate_7", "samples.gate-7"]
    topics = [{"name": name, "source": f"gate-{number}"} for number, name in enumerate(names)]
    objects = render(profile("cpu"), {"settings": {"kafka": {"topics": topics}}, "ingest": {"replicas": 2}})
    ingest = [each for each in of_kind(objects, "Deployment") if "-ingest" in each["metadata"]["name"]]
    templates = [each["spec"]["template"] for each in ingest]
    commands = [each["spec"]["containers"][0]["command"] for each in templates]
    assert commands == [["ratchet", "ingest"], *(["ratchet", "ingest", "--topic", name] for name in names)]
    assert [each["spec"]["replicas"] for each in ingest] == [2, 2, 2]
    assert len({each["metadata"]["name"] for each in ingest}) == 3
    budget = named(objects, "PodDisruptionBudget", "ingest")["spec"]["selector"]
    for number, template in enumerate(templates):
        labels = template["metadata"]["labels"]
        assert [selects(each["spec"]["selector"], labels) for each in ingest] == [i == number for i in range(3)]
        assert selects(budget, labels)


def test_only_containers_that_ask_for_gpus_see_any(values: Any, objects: list[dict[str, Any]]) -> None:
    """Also on nodes whose default runtime is NVIDIA's, and with an image that sets NVIDIA_VISIBLE_DEVICES=all."""
    for component, spec, container in containers(objects):
        on_gpu = "nvidia.com/gpu" in container["resources"]["limits"]
        visible = variables(container).get("NVIDIA_VISIBLE_DEVICES")
        assert visible == (None if on_gpu else "void"), (component, container["name"])
        if container in spec["containers"][:1]:
            wanted = values.get("runtimeClassName") if on_gpu else None
            assert spec.get("runtimeClassName") == wanted, component


def test_parts_without_a_model_have_the_slim_image() -> None:
    def tags(**image: str) -> dict[str, str]:
        found = containers(render({"image": image}))
        return {component: container["image"] for component, _, container in found}

    slim = {"ingest", "maintain", "console", "migration", "test"}
    default = tags(flavour="gpu")
    assert {part for part, image in default.items() if image.endswith("-slim")} == slim
    assert all(image.endswith("-gpu") for part, image in default.items() if part not in slim)
    assert set(tags(tag="mine").values()) == {"registry.example/ratchet:mine"}, "one image for all"
    assert {
        part for part, image in tags(tag="mine", slimTag="small").items() if image == "registry.example/ratchet:small"
    } == slim


def test_every_pod_has_what_the_installation_adds() -> None:
    for component, template in pods(render(EVERYTHING)):
        assert template["metadata"]["annotations"]["example.org/team"] == "ml", component
    ca = dict.fromkeys(("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE"), "/etc/ratchet/ca/ca.crt")
    for component, spec, container in containers(render(EVERYTHING)):
        told = variables(container)
        assert {**ca, "HTTPS_PROXY": "http://proxy:3128"}.items() <= told.items(), (component, container["name"])
        assert len(told) == len(container["env"]), "a name twice"
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert (mounts["ca"], mounts["cache"]) == ("/etc/ratchet/ca", "/cache")
        (volume,) = [volume for volume in spec["volumes"] if volume["name"] == "ca"]
        assert volume["configMap"] == {"name": "company-ca", "items": [{"key": "ca.crt", "path": "ca.crt"}]}
    for _, spec, container in containers(render({"caBundle": {"secret": "company-ca", "key": "bundle.pem"}})):
        (volume,) = [volume for volume in spec["volumes"] if volume["name"] == "ca"]
        assert volume["secret"]["secretName"] == "company-ca"
        assert variables(container)["SSL_CERT_FILE"] == "/etc/ratchet/ca/bundle.pem"
