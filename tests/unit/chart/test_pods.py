from __future__ import annotations

from typing import Any

import pytest
from ray._private import ray_constants

from core.settings.watching import Traces
from serving.ray.ray_session import tracing_environment
from tests.support.chart import EVERYTHING, containers, named, of_kind, pods, render, variables

TRAINING = {"training-head", "training-worker"}
SERVING = {"serving-head", "serving-worker"}
WORKLOADS = {*SERVING, "ingest", "maintain", "updater", "console"}


def ray_pods(objects: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {component: pod["spec"]["containers"][0] for component, pod in pods(objects) if component in SERVING}


def test_every_part_of_the_product_has_its_pods(objects: list[dict[str, Any]]) -> None:
    training = TRAINING if of_kind(objects, "RayCluster") else set()
    assert {component for component, _ in pods(objects)} == {*WORKLOADS, *training, "migration", "test"}


def test_every_container_has_few_rights_a_read_only_root_and_bounds(objects: list[dict[str, Any]]) -> None:
    for component, spec, container in containers(objects):
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


def test_every_container_that_stays_has_three_probes(objects: list[dict[str, Any]]) -> None:
    for component, template in pods(objects):
        for container in template["spec"]["containers"] if component in WORKLOADS else []:
            ports = {port["name"] for port in container["ports"]}
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                assert container[probe]["httpGet"]["port"] in ports, (component, container["name"], probe)


def test_requests_go_to_workers_whose_models_answer(objects: list[dict[str, Any]]) -> None:
    ray = ray_pods(objects)
    assert ray["serving-worker"]["readinessProbe"]["httpGet"] == {"path": "/health/ready", "port": "serve"}
    # KubeRay deploys the application when the head is ready: it cannot wait for the application.
    assert ray["serving-head"]["readinessProbe"]["httpGet"]["path"] == "/api/healthz"


def test_every_ray_pod_has_haproxys_limits_and_logs_to_standard_error(objects: list[dict[str, Any]]) -> None:
    """As Ray's workers and Ray Serve read it: ray_constants and ray.serve._private.constants."""
    wanted = {
        "RAY_SERVE_HAPROXY_BINARY_PATH": "/usr/local/bin/ratchet-haproxy", "FORWARDED_ALLOW_IPS": "none",
        ray_constants.LOGGING_REDIRECT_STDERR_ENVIRONMENT_VARIABLE: "1", "RAY_SERVE_LOG_TO_STDERR": "1",
        "RAY_BACKEND_LOG_LEVEL": "warning", "RAY_LOGGER_LEVEL": "warning",
    }  # fmt: skip
    for container in ray_pods(objects).values():
        assert wanted.items() <= variables(container).items()


def test_traces_are_off_unless_a_collector_is_named() -> None:
    traces = Traces(endpoint="http://collector:4318/v1/traces", share=0.5)
    expected = tracing_environment(traces)
    for values, on in (({}, False), ({"settings": {"traces": traces.model_dump()}}, True)):
        objects = render(values)
        for container in ray_pods(objects).values():
            assert {name: each for name, each in variables(container).items() if name in expected} == (
                expected if on else {}
            )
        egress = named(objects, "NetworkPolicy", "serving")["spec"]["egress"]
        assert (4318 in [port["port"] for rule in egress for port in rule.get("ports", ())]) is on


def test_no_pod_gets_a_token_of_the_cluster_but_where_ray_adds_pods(objects: list[dict[str, Any]]) -> None:
    for component, template in pods(objects):
        assert template["spec"]["automountServiceAccountToken"] is (component == "training-head")
    assert of_kind(objects, "ServiceAccount")[0]["automountServiceAccountToken"] is False


@pytest.mark.parametrize("made", [True, False], ids=["made by the chart", "named"])
def test_serving_goes_before_training(made: bool) -> None:
    named_ = {"serving": "important", "training": "unimportant"}
    objects = render(EVERYTHING, {"priorityClasses": {"create": True} if made else named_})
    of_pod = {component: template["spec"].get("priorityClassName") for component, template in pods(objects)}
    training = {"updater", *TRAINING}
    (high,) = {of_pod[component] for component in WORKLOADS - training}
    (low,) = {of_pod[component] for component in training}
    classes = {each["metadata"]["name"]: each for each in of_kind(objects, "PriorityClass")}
    if not made:
        assert (high, low, classes) == ("important", "unimportant", {})
        return
    assert classes[low]["preemptionPolicy"] == "Never"
    assert classes[high]["value"] > classes[low]["value"]


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


@pytest.mark.parametrize(
    ("storage", "volume"),
    [
        ({}, {"emptyDir": {"sizeLimit": "10Gi"}}),
        (
            {"storageClass": "fast", "sizeLimit": "20Gi"},
            {"ephemeral": {"volumeClaimTemplate": {"spec": {
                "accessModes": ["ReadWriteOnce"], "storageClassName": "fast",
                "resources": {"requests": {"storage": "20Gi"}},
            }}}},
        ),
    ],
)  # fmt: skip
def test_each_ingest_pod_has_a_disk_of_its_own_for_the_index_of_duplicates(storage: Any, volume: Any) -> None:
    spec = dict(pods(render({"ingest": {"replicas": 3, "storage": storage}})))["ingest"]["spec"]
    assert {"name": "home", "mountPath": "/var/lib/ratchet"} in spec["containers"][0]["volumeMounts"]
    (home,) = [each for each in spec["volumes"] if each["name"] == "home"]
    assert home == {"name": "home", **volume}


def test_pods_spread_over_nodes_and_zones(objects: list[dict[str, Any]]) -> None:
    for component, template in pods(objects):
        if component in WORKLOADS:
            spread = template["spec"]["topologySpreadConstraints"]
            assert {each["topologyKey"] for each in spread} == {"kubernetes.io/hostname", "topology.kubernetes.io/zone"}
            for each in spread:
                assert each["labelSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()


def test_every_pod_has_what_the_installation_adds() -> None:
    objects = render(EVERYTHING)
    ca = "/etc/ratchet/ca/ca.crt"
    for component, template in pods(objects):
        assert template["metadata"]["annotations"]["example.org/team"] == "ml", component
        assert template["spec"]["runtimeClassName"] == "nvidia"
    for component, spec, container in containers(objects):
        told = variables(container)
        wanted = {**dict.fromkeys(("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE"), ca),
                  "HTTPS_PROXY": "http://proxy:3128"}  # fmt: skip
        assert wanted.items() <= told.items(), (component, container["name"])
        assert len(told) == len(container["env"]), "a name twice"
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert (mounts["ca"], mounts["cache"]) == ("/etc/ratchet/ca", "/cache")
        (volume,) = [volume for volume in spec["volumes"] if volume["name"] == "ca"]
        assert volume["configMap"] == {"name": "company-ca", "items": [{"key": "ca.crt", "path": "ca.crt"}]}


def test_the_bundle_of_cas_may_be_in_a_secret() -> None:
    for _, spec, container in containers(render({"caBundle": {"secret": "company-ca", "key": "bundle.pem"}})):
        volume = next(volume for volume in spec["volumes"] if volume["name"] == "ca")
        assert volume["secret"]["secretName"] == "company-ca"
        assert variables(container)["SSL_CERT_FILE"] == "/etc/ratchet/ca/bundle.pem"
