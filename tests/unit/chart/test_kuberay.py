"""KubeRay takes the RayService: its schemas and the rules of its own code, of the versions that the docs name.

The rules are those of ``ray-operator/controllers/ray`` in ray-project/kuberay, read at the tags v1.5.0, v1.5.1, v1.6.2
and v1.7.0: ``utils/validation.go`` (ValidateRayServiceMetadata, ValidateRayServiceSpec, ValidateRayClusterSpec),
``utils/constant.go`` (names and ports), ``common/service.go`` (BuildServeService) and ``common/pod.go``.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from helm_python import HelmError
from jsonschema import Draft202012Validator
from ray.serve._private import constants

from benchmarks.cluster.ray_service import compared_by_kuberay
from core.settings import Settings
from serving.ray import ray_session
from tests.support.chart import EVERYTHING, PROFILES, ROOT, merged, of_kind, profile, render

CASES = [merged(profile(name), extra) for name in PROFILES for extra in ({}, EVERYTHING)]
IDS = [f"{name}{extra}" for name in PROFILES for extra in ("", " with everything")]
VERSIONS = {"1.5.1": "RayService-1.5.1.json", "1.6.2": "RayService-1.6.2.json", "1.7": "RayService.json"}
TRAINING = {version: file for version, file in VERSIONS.items() if version != "1.5.1"}
"""Versions with RayCluster's ``upgradeStrategy``."""
MAX_NAME = 53 - len("-xxxxx")
"""MaxRayServiceNameLength: of a cluster's 53, less what KubeRay appends."""
DNS_1035 = r"[a-z]([-a-z0-9]*[a-z0-9])?"
REFUSED = {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME", "RAY_enable_autoscaler_v2"}
"""ValidateRayClusterSpec refuses a head with one of them, where GcsFaultToleranceOptions are to be used."""
MANAGED = {
    "FQ_RAY_IP", "RAY_IP", "RAY_CLUSTER_NAME", "RAY_CLUSTER_NAMESPACE", "RAY_CLOUD_INSTANCE_ID", "RAY_NODE_TYPE_NAME",
    "KUBERAY_GEN_RAY_START_CMD", "RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_PORT",
}  # fmt: skip
"""setContainerEnvVars and SetContainerTokenAuthEnvVars add these."""
PORTS = {"gcs-server": 6379, "dashboard": 8265, "client": 10001, "metrics": 8080, "serve": 8000}
"""getDefaultPorts: what the services of a head are made of, once it names any port."""


@pytest.fixture(params=CASES, ids=IDS)
def service(request: pytest.FixtureRequest) -> dict[str, Any]:
    (found,) = of_kind(render(request.param), "RayService")
    return found


def groups(service: dict[str, Any]) -> list[dict[str, Any]]:
    """The group of the head, then those of workers."""
    cluster = service["spec"]["rayClusterConfig"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def ray_container(group: dict[str, Any]) -> dict[str, Any]:
    """RayContainerIndex is 0: the first container is Ray's, whatever its name."""
    first: dict[str, Any] = group["template"]["spec"]["containers"][0]
    return first


@cache
def schema(file: str) -> Draft202012Validator:
    return Draft202012Validator(json.loads((ROOT / "tests" / "support" / "crds" / file).read_text()))


@pytest.mark.parametrize("version", VERSIONS)
def test_the_resource_of_each_version_has_every_field(service: dict[str, Any], version: str) -> None:
    schema(VERSIONS[version]).validate(service)


def test_the_first_version_takes_it_without_a_token_only() -> None:
    of_first = schema("RayService-1.5.0.json")
    (with_token,) = of_kind(render(EVERYTHING), "RayService")
    assert [error for error in of_first.iter_errors(with_token) if "authOptions" in error.message]
    (without,) = of_kind(render(EVERYTHING, {"serving": {"rayAuth": "disabled"}}), "RayService")
    of_first.validate(without)
    assert "authOptions" not in without["spec"]["rayClusterConfig"]


def test_the_page_for_deployers_names_the_versions_that_are_tested() -> None:
    page = (ROOT / "docs" / "deployer.md").read_text()
    assert "operator 1.5.1 to 1.7; 1.5.0 with `serving.rayAuth: disabled`" in page


def test_its_name_is_a_label_that_is_short_enough(service: dict[str, Any]) -> None:
    """ValidateRayServiceMetadata."""
    assert re.fullmatch(DNS_1035, service["metadata"]["name"])
    (longest,) = of_kind(render({"fullnameOverride": "a" * 40}), "RayService")
    assert len(longest["metadata"]["name"]) <= MAX_NAME


def test_a_release_whose_name_kuberay_would_refuse_is_not_installed() -> None:
    for name in ("2nd", "v1.2"):
        with pytest.raises(HelmError, match=rf"{name}-ratchet cannot be the name .* Set fullnameOverride"):
            render(name=name)
        assert render({"fullnameOverride": "second"}, name=name)


def test_the_head_has_the_ports_that_services_are_made_of(service: dict[str, Any]) -> None:
    """getPortsFromCluster takes those of the head's first container; BuildServeService wants one named serve there."""
    head, *workers = groups(service)
    ports = {port["name"]: port["containerPort"] for port in ray_container(head)["ports"]}
    assert ports.items() >= PORTS.items()
    for group in workers:
        assert {"name": "serve", "containerPort": 8000, "protocol": "TCP"} in ray_container(group)["ports"]
    assert "headService" not in head  # ValidateRayServiceSpec refuses a name of its own
    assert service["spec"]["excludeHeadPodFromServeSvc"] is True  # it has no replicas, and its probe asks none


def test_no_variable_is_one_that_kuberay_refuses_or_sets_itself(service: dict[str, Any]) -> None:
    for group in groups(service):
        names = [each["name"] for each in ray_container(group)["env"]]
        assert len(names) == len(set(names))
        assert not {*names} & (REFUSED | MANAGED)


def test_workers_have_both_bounds_also_where_nothing_scales_them(service: dict[str, Any]) -> None:
    cluster = service["spec"]["rayClusterConfig"]
    assert cluster["enableInTreeAutoscaling"] is False and "autoscalerOptions" not in cluster
    for group in cluster["workerGroupSpecs"]:
        assert 0 < group["minReplicas"] == group["replicas"] == group["maxReplicas"]


@pytest.mark.parametrize("version", VERSIONS)
def test_ray_adds_workers_where_more_are_allowed(version: str) -> None:
    """DefaultHeadPodTemplate puts the autoscaler beside the head, which has to be allowed to call Kubernetes."""
    serve = {"encoder_replicas": 2, "encoder_max_replicas": 12}
    more = {"settings": {"serve": serve}, "serving": {"workers": {"replicas": 2, "maxReplicas": 6}}}
    objects = render(profile("cpu"), EVERYTHING, more)
    (service,) = of_kind(objects, "RayService")
    schema(VERSIONS[version]).validate(service)
    cluster = service["spec"]["rayClusterConfig"]
    head, workers = groups(service)
    assert cluster["enableInTreeAutoscaling"] is True
    assert (workers["minReplicas"], workers["replicas"], workers["maxReplicas"]) == (2, 2, 6)
    autoscaler = cluster["autoscalerOptions"]
    assert autoscaler["image"] == ray_container(head)["image"] and autoscaler["idleTimeoutSeconds"] == 600
    assert autoscaler["securityContext"]["readOnlyRootFilesystem"] is True
    mounted = {mount["name"] for mount in autoscaler["volumeMounts"]}
    assert mounted <= {volume["name"] for volume in head["template"]["spec"]["volumes"]} and "tmp" in mounted
    assert head["template"]["spec"]["automountServiceAccountToken"] is True
    assert workers["template"]["spec"]["automountServiceAccountToken"] is False
    deployments = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"][0]["deployments"]
    encoder = next(each for each in deployments if each["name"] == "Encoder")
    assert encoder["max_replicas_per_node"] == 2  # 12 on 6
    (policy,) = [
        each for each in of_kind(objects, "NetworkPolicy") if each["metadata"]["name"] == "live-ratchet-serving"
    ]
    assert {"ports": [{"protocol": "TCP", "port": 443}]} in policy["spec"]["egress"]


@pytest.mark.parametrize(
    "change",
    [
        {"workers": {"replicas": 4}},
        {"workers": {"maxReplicas": 9}},
        {"workers": {"tolerations": [{"operator": "Exists"}]}},
        {"head": {"tolerations": [{"operator": "Exists"}]}},
        {"requestTimeoutSeconds": 60},
    ],
    ids=str,
)
def test_what_kuberay_and_serve_would_not_change_in_a_running_cluster_makes_a_new_one(change: Any) -> None:
    """KubeRay compares neither numbers of workers nor tolerations, and Serve reads HTTP options only when it starts."""
    autoscaled = {"serving": {"workers": {"replicas": 2, "maxReplicas": 8}}}
    before, after = (
        of_kind(render(autoscaled, each), "RayService")[0]["spec"]["rayClusterConfig"]
        for each in ({}, {"serving": change})
    )
    assert compared_by_kuberay(before) != compared_by_kuberay(after)


def test_what_serve_changes_in_a_running_cluster_makes_no_new_one() -> None:
    before, after = (
        of_kind(render({"serving": {"actors": {"encoder": {"cpus": cpus}}}}), "RayService")[0]["spec"]
        for cpus in (0.5, 0.25)
    )
    assert before["serveConfigV2"] != after["serveConfigV2"]
    assert before["rayClusterConfig"] == after["rayClusterConfig"]


def test_what_the_api_server_would_fill_in_is_said(service: dict[str, Any], training: list[dict[str, Any]]) -> None:
    """Defaults of KubeRay's definitions, in lists that are compared as a whole: Argo CD would see a difference, and who
    applies the same objects again a conflict."""
    (cluster,) = of_kind(training, "RayCluster")
    for spec in (service["spec"]["rayClusterConfig"], cluster["spec"]):
        for group in spec["workerGroupSpecs"]:
            assert group["numOfHosts"] == 1
        for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
            for container in group["template"]["spec"]["containers"]:
                assert {port["protocol"] for port in container.get("ports", [])} == {"TCP"}


def test_rays_autoscaler_gets_the_resources_that_are_set() -> None:
    resources = {"requests": {"cpu": "1", "memory": "2Gi"}, "limits": {"memory": "3Gi"}}
    autoscaled = {"serving": {"workers": {"maxReplicas": 4}, "autoscaler": {"resources": resources}}}
    objects = render(EVERYTHING, autoscaled)
    (service,), (cluster,) = of_kind(objects, "RayService"), of_kind(objects, "RayCluster")
    for spec in (service["spec"]["rayClusterConfig"], cluster["spec"]):
        assert spec["autoscalerOptions"]["resources"] == resources


def test_parameters_of_ray_start_are_text_and_resources_come_from_one_place(service: dict[str, Any]) -> None:
    """validateRayGroupResources and validateRayGroupLabels; generateRayStartCommand takes CPUs from the requests."""
    for group in groups(service):
        parameters = group["rayStartParams"]
        assert all(isinstance(value, str) for value in parameters.values())
        assert not {"labels", "redis-password", "redis-username"} & parameters.keys()
        assert not {"resources", "labels"} & group.keys()
        resources = ray_container(group)["resources"]
        assert "num-cpus" in parameters or {**resources["requests"], **resources["limits"]}.get("cpu")


def test_a_token_is_of_a_ray_that_has_them_and_of_the_one_in_the_image(service: dict[str, Any]) -> None:
    cluster = service["spec"]["rayClusterConfig"]
    version = tuple(map(int, cluster["rayVersion"].split(".")))
    assert cluster["authOptions"] == {"mode": "token"}  # RayService has no enableK8sTokenAuth
    assert version >= (2, 52, 0)
    assert cluster["rayVersion"] == importlib.metadata.version("ray")


def test_what_kuberay_would_add_to_a_pod_is_there_already(service: dict[str, Any]) -> None:
    """It adds probes that call wget, which the image has not, and shared memory of the size of all memory, where there
    is none; it puts ``ray start`` in the place of command and arguments."""
    for group in groups(service):
        container = ray_container(group)
        assert {"livenessProbe", "readinessProbe"} <= container.keys()
        assert "/dev/shm" in [mount["mountPath"] for mount in container["volumeMounts"]]
        assert not {"command", "args"} & container.keys()
        assert not [name for name in group["template"]["metadata"]["labels"] if name.startswith("ray.io/")]
        others = group["template"]["spec"]["initContainers"]
        assert "wait-gcs-ready" not in [each["name"] for each in others]


def test_an_upgrade_is_one_of_kuberays(service: dict[str, Any]) -> None:
    assert service["spec"]["upgradeStrategy"]["type"] in ("NewCluster", "None")
    assert "upgradeStrategy" not in service["spec"]["rayClusterConfig"]  # ValidateRayClusterUpgradeOptions


def test_serves_switches_have_the_names_that_ray_reads(service: dict[str, Any]) -> None:
    source = inspect.getsource(constants)
    for group in groups(service):
        for variable in ray_container(group)["env"]:
            if variable["name"].startswith("RAY_SERVE_"):
                assert f'"{variable["name"]}"' in source, variable["name"]


def test_a_proxy_has_as_long_to_get_ready_and_a_message_as_many_bytes_as_on_one_machine(
    service: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environ: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", environ)
    ray_session.prepare_environment(Settings(home=tmp_path))
    monkeypatch.undo()
    for group in groups(service):
        told = {each["name"]: each.get("value", "") for each in ray_container(group)["env"]}
        for name in ("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH"):
            assert told[name] == environ[name]
        assert float(told["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"]) > constants.RAY_SERVE_HAPROXY_STARTUP_TIMEOUT_S


@pytest.fixture
def training() -> list[dict[str, Any]]:
    workers = {"enabled": True, "gpus": 1, "maxReplicas": 8, "tolerations": [{"operator": "Exists"}]}
    return render(profile("multigpu"), EVERYTHING, {"updater": {"workers": workers}})


def test_the_cluster_that_trains_has_no_worker_while_nothing_trains(training: list[dict[str, Any]]) -> None:
    (cluster,) = of_kind(training, "RayCluster")
    (updater,) = [
        each for each in of_kind(training, "Deployment") if each["metadata"]["name"] == "live-ratchet-updater"
    ]
    spec = cluster["spec"]
    for version in TRAINING.values():  # a RayService has the same specification inside
        whole = json.loads((ROOT / "tests" / "support" / "crds" / version).read_text())
        Draft202012Validator(whole["properties"]["spec"]["properties"]["rayClusterConfig"]).validate(spec)
    head, workers = spec["headGroupSpec"], spec["workerGroupSpecs"][0]
    assert (workers["replicas"], workers["minReplicas"], workers["maxReplicas"]) == (0, 0, 8)
    assert spec["enableInTreeAutoscaling"] is True and spec["autoscalerOptions"]["idleTimeoutSeconds"] == 300
    assert ray_container(workers)["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert "nvidia.com/gpu" not in ray_container(head)["resources"]["limits"]
    assert {"gcs-server": 6379, "dashboard": 8265, "client": 10001}.items() <= {
        port["name"]: port["containerPort"] for port in ray_container(head)["ports"]
    }.items()
    trainer = updater["spec"]["template"]["spec"]
    homes = {
        next(volume for volume in pod["volumes"] if volume["name"] == "home")["persistentVolumeClaim"]["claimName"]
        for pod in (trainer, head["template"]["spec"], workers["template"]["spec"])
    }
    assert homes == {"updater"}, "all of them see the updater's home"
    for group in (head, workers):
        places = {mount["name"]: mount["mountPath"] for mount in ray_container(group)["volumeMounts"]}
        assert (
            places.items()
            >= {mount["name"]: mount["mountPath"] for mount in trainer["containers"][0]["volumeMounts"]}.items()
        )


def test_an_upgrade_replaces_the_pods_of_the_cluster_that_trains(training: list[dict[str, Any]]) -> None:
    """KubeRay changes no pod of a RayCluster otherwise: steps would go on with the code of the version before."""
    (cluster,) = of_kind(training, "RayCluster")
    assert cluster["spec"]["upgradeStrategy"] == {"type": "Recreate"}
    page = (ROOT / "docs" / "deployer.md").read_text()
    assert "1.6 to 1.7 for `updater.workers`" in page


def test_the_updater_finds_the_cluster_that_trains_and_its_token(training: list[dict[str, Any]]) -> None:
    (cluster,) = of_kind(training, "RayCluster")
    config = next(each for each in of_kind(training, "ConfigMap") if "ratchet.yaml" in each["data"])
    settings = Settings.model_validate(yaml.safe_load(config["data"]["ratchet.yaml"]))
    assert settings.updater.ray_address == f"ray://{cluster['metadata']['name']}-head-svc:10001"
    (updater,) = [
        each for each in of_kind(training, "Deployment") if each["metadata"]["name"] == "live-ratchet-updater"
    ]
    env = {each["name"]: each for each in updater["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert env["RAY_AUTH_MODE"]["value"] == "token"
    secret = env["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]
    assert secret == {"name": cluster["metadata"]["name"], "key": "auth_token"}
    policies = {each["metadata"]["name"]: each["spec"] for each in of_kind(training, "NetworkPolicy")}
    into = policies["live-ratchet-training"]["ingress"][1]
    assert into["ports"] == [{"protocol": "TCP", "port": 10001}]
    assert into["from"][0]["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "updater"
    out = policies["live-ratchet-updater"]["egress"][-1]
    assert out["ports"] == into["ports"]


def test_a_cluster_that_trains_needs_a_home_that_all_see() -> None:
    assert not of_kind(render(), "RayCluster")
    with pytest.raises(HelmError, match=r"updater\.storage\.existingClaim"):
        render({"updater": {"workers": {"enabled": True}}})


def test_what_the_clean_up_of_redis_mounts_and_runs_as_outlives_an_uninstall() -> None:
    """buildRedisCleanupJob runs a pod like the head's when Helm has deleted everything that is not to be kept."""
    chosen = {"priorityClasses": {"create": True}}
    objects = render(EVERYTHING, chosen)
    kept = {
        (each["kind"], each["metadata"]["name"])
        for each in objects
        if each["metadata"].get("annotations", {}).get("helm.sh/resource-policy") == "keep"
    }
    head = of_kind(objects, "RayService")[0]["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]
    maps = [volume["configMap"]["name"] for volume in head["volumes"] if "configMap" in volume]
    needed = {
        ("ServiceAccount", head["serviceAccountName"]),
        ("PriorityClass", head["priorityClassName"]),
        *(("ConfigMap", name) for name in maps),
    }
    ours = {(each["kind"], each["metadata"]["name"]) for each in objects}
    assert kept == needed & ours
    assert len(kept) == 3
    without = render(EVERYTHING, chosen, {"serving": {"gcsFaultTolerance": {"enabled": False}}})
    assert not [each for each in without if "helm.sh/resource-policy" in each["metadata"].get("annotations", {})]
