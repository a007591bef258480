"""What holds for every pod of the chart, in every profile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from ray._private import ray_constants

from core.settings.watching import Traces
from serving.ray.ray_session import tracing_environment
from tests.support.chart import EVERYTHING, PROFILES, merged, of_kind, pods, profile, render

WORKLOADS = {"serving-head", "serving-worker", "ingest", "maintain", "updater", "console"}
CASES = [profile(name) for name in PROFILES] + [merged(profile(name), EVERYTHING) for name in PROFILES]
IDS = [*PROFILES, *(f"{name} with everything" for name in PROFILES)]


@pytest.fixture(params=CASES, ids=IDS)
def objects(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return render(request.param)


def containers(objects: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(component, pod spec, container), those that run before the others included."""
    for component, template in pods(objects):
        for container in [*template["spec"].get("initContainers", []), *template["spec"]["containers"]]:
            yield component, template["spec"], container


def test_every_part_of_the_product_has_its_pods(objects: list[dict[str, Any]]) -> None:
    training = {"training-head", "training-worker"} if of_kind(objects, "RayCluster") else set()
    assert {component for component, _ in pods(objects)} == {*WORKLOADS, *training, "migration", "test"}


def test_no_pod_runs_as_root_or_may_become_it(objects: list[dict[str, Any]]) -> None:
    for component, spec, container in containers(objects):
        assert spec["securityContext"]["runAsNonRoot"] is True, component
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        assert not [volume for volume in spec["volumes"] if "hostPath" in volume]


def test_every_root_is_read_only_and_what_is_written_has_a_bound(objects: list[dict[str, Any]]) -> None:
    for component, spec, container in containers(objects):
        assert container["securityContext"]["readOnlyRootFilesystem"] is True, component
        mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert {"/tmp", "/home/ratchet"} <= mounted
        home = next(each["value"] for each in container["env"] if each["name"] == "HOME")
        assert home in mounted
        for volume in spec["volumes"]:
            assert "emptyDir" not in volume or volume["emptyDir"]["sizeLimit"], (component, volume["name"])


def test_every_mount_has_its_volume(objects: list[dict[str, Any]]) -> None:
    for component, spec, container in containers(objects):
        volumes = {volume["name"] for volume in spec["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes, component


def test_every_container_says_what_it_needs(objects: list[dict[str, Any]]) -> None:
    for component, _, container in containers(objects):
        resources = container["resources"]
        assert {"cpu", "memory"} <= resources["requests"].keys(), component
        assert "memory" in resources["limits"], component


def test_every_container_that_stays_has_three_probes(objects: list[dict[str, Any]]) -> None:
    for component, template in pods(objects):
        for container in template["spec"]["containers"] if component in WORKLOADS else []:
            ports = {port["name"] for port in container["ports"]}
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                assert container[probe]["httpGet"]["port"] in ports, (component, container["name"], probe)


def test_requests_go_to_workers_whose_models_answer(objects: list[dict[str, Any]]) -> None:
    ray = {component: template["spec"]["containers"][0] for component, template in pods(objects)}
    assert ray["serving-worker"]["readinessProbe"]["httpGet"] == {"path": "/health/ready", "port": "serve"}
    # KubeRay deploys the application when the head is ready: it cannot wait for the application.
    assert ray["serving-head"]["readinessProbe"]["httpGet"]["path"] == "/api/healthz"


def test_haproxy_of_every_ray_pod_has_the_limits_of_the_settings(objects: list[dict[str, Any]]) -> None:
    for component, template in pods(objects):
        if component in ("serving-head", "serving-worker"):
            env = {each["name"]: each.get("value") for each in template["spec"]["containers"][0]["env"]}
            assert env["RAY_SERVE_HAPROXY_BINARY_PATH"] == "/usr/local/bin/ratchet-haproxy"
            assert env["FORWARDED_ALLOW_IPS"] == "none"


def test_what_replicas_log_is_on_standard_error_of_their_pod(objects: list[dict[str, Any]]) -> None:
    for component, template in pods(objects):
        if component in ("serving-head", "serving-worker"):
            env = {each["name"]: each.get("value") for each in template["spec"]["containers"][0]["env"]}
            # What Ray's workers and Ray Serve ask for, see ray_constants and ray.serve._private.constants.
            assert env[ray_constants.LOGGING_REDIRECT_STDERR_ENVIRONMENT_VARIABLE] == "1"
            assert env["RAY_SERVE_LOG_TO_STDERR"] == "1"
            assert env["RAY_BACKEND_LOG_LEVEL"] == env["RAY_LOGGER_LEVEL"] == "warning"


def test_traces_are_off_unless_a_collector_is_named() -> None:
    traces = Traces(endpoint="http://collector:4318/v1/traces", share=0.5)
    expected = tracing_environment(traces)

    def environments(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [
            {each["name"]: each.get("value") for each in template["spec"]["containers"][0]["env"]}
            for component, template in pods(objects)
            if component in ("serving-head", "serving-worker")
        ]

    def opened(objects: list[dict[str, Any]]) -> list[int]:
        policies = {each["metadata"]["name"].split("-")[-1]: each for each in of_kind(objects, "NetworkPolicy")}
        return [port["port"] for rule in policies["serving"]["spec"]["egress"] for port in rule.get("ports", ())]

    off, on = render(), render({"settings": {"traces": traces.model_dump()}})
    assert not any(set(expected) & set(each) for each in environments(off))
    assert all({name: each[name] for name in expected} == expected for each in environments(on))
    assert (4318 in opened(off), 4318 in opened(on)) == (False, True)


def test_no_pod_gets_a_token_of_the_cluster_but_where_ray_adds_pods(objects: list[dict[str, Any]]) -> None:
    for component, template in pods(objects):
        assert template["spec"]["automountServiceAccountToken"] is (component == "training-head")
    assert of_kind(objects, "ServiceAccount")[0]["automountServiceAccountToken"] is False


def test_ray_has_shared_memory_that_holds_its_object_store(objects: list[dict[str, Any]]) -> None:
    cluster = of_kind(objects, "RayService")[0]["spec"]["rayClusterConfig"]
    units = {"Mi": 2**20, "Gi": 2**30}
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        spec = group["template"]["spec"]
        shm = next(volume["emptyDir"] for volume in spec["volumes"] if volume["name"] == "shm")
        assert shm["medium"] == "Memory"
        size = int(shm["sizeLimit"][:-2]) * units[shm["sizeLimit"][-2:]]
        assert size >= int(group["rayStartParams"]["object-store-memory"])
        assert "/dev/shm" in {mount["mountPath"] for mount in spec["containers"][0]["volumeMounts"]}


@pytest.mark.parametrize("made", [True, False], ids=["made by the chart", "named"])
def test_serving_goes_before_training(made: bool) -> None:
    named = {"serving": "important", "training": "unimportant"}
    objects = render(EVERYTHING, {"priorityClasses": {"create": True} if made else named})
    of_pod = {component: template["spec"].get("priorityClassName") for component, template in pods(objects)}
    training = {"updater", "training-head", "training-worker"}
    (high,) = {of_pod[component] for component in WORKLOADS - training}
    (low,) = {of_pod[component] for component in training}
    classes = {each["metadata"]["name"]: each for each in of_kind(objects, "PriorityClass")}
    if not made:
        assert (high, low, classes) == ("important", "unimportant", {})
        return
    assert classes[low]["preemptionPolicy"] == "Never"
    assert classes[high]["value"] > classes[low]["value"]


def test_there_is_one_trainer_and_nothing_scales_it(objects: list[dict[str, Any]]) -> None:
    updater = next(each for each in of_kind(objects, "Deployment") if each["metadata"]["name"].endswith("-updater"))
    assert updater["spec"]["replicas"] == 1
    assert updater["spec"]["strategy"] == {"type": "Recreate"}
    for scaler in of_kind(objects, "ScaledObject"):
        assert scaler["spec"]["scaleTargetRef"]["name"] == "live-ratchet-ingest"
    assert not of_kind(objects, "HorizontalPodAutoscaler")


def test_maintenance_is_one_process_that_ends_before_the_next_begins(objects: list[dict[str, Any]]) -> None:
    maintain = next(each for each in of_kind(objects, "Deployment") if each["metadata"]["name"].endswith("-maintain"))
    assert maintain["spec"]["replicas"] == 1
    assert maintain["spec"]["strategy"] == {"type": "Recreate"}
    container = maintain["spec"]["template"]["spec"]["containers"][0]
    assert container["command"] == ["ratchet", "maintain"]


def test_each_ingest_pod_has_a_disk_of_its_own_for_the_index_of_duplicates() -> None:
    def home(values: dict[str, Any]) -> dict[str, Any]:
        template = dict(pods(render({"ingest": {"replicas": 3, "storage": values}})))["ingest"]
        mounts = {mount["name"]: mount["mountPath"] for mount in template["spec"]["containers"][0]["volumeMounts"]}
        assert mounts["home"] == "/var/lib/ratchet"
        return next(volume for volume in template["spec"]["volumes"] if volume["name"] == "home")

    assert home({}) == {"name": "home", "emptyDir": {"sizeLimit": "10Gi"}}
    claim = home({"storageClass": "fast", "sizeLimit": "20Gi"})["ephemeral"]["volumeClaimTemplate"]["spec"]
    assert claim == {
        "accessModes": ["ReadWriteOnce"],
        "storageClassName": "fast",
        "resources": {"requests": {"storage": "20Gi"}},
    }


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
        variables = {each["name"]: each.get("value") for each in container["env"]}
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE"):
            assert variables[name] == ca, (component, container["name"])
        assert mounts["ca"] == "/etc/ratchet/ca"
        assert volumes["ca"]["configMap"] == {"name": "company-ca", "items": [{"key": "ca.crt", "path": "ca.crt"}]}
        assert variables["HTTPS_PROXY"] == "http://proxy:3128"
        assert mounts["cache"] == "/cache"
        assert len(variables) == len(container["env"]), "a name twice"


def test_the_bundle_of_cas_may_lie_in_a_secret() -> None:
    for _, spec, container in containers(render({"caBundle": {"secret": "company-ca", "key": "bundle.pem"}})):
        volume = next(volume for volume in spec["volumes"] if volume["name"] == "ca")
        assert volume["secret"]["secretName"] == "company-ca"
        assert {"name": "SSL_CERT_FILE", "value": "/etc/ratchet/ca/bundle.pem"} in container["env"]
