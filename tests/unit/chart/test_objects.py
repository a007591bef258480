"""How the objects of the chart fit together: selectors, secrets, open ports, scaling."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.chart import EVERYTHING, NEEDED, merged, of_kind, pods, profile, render

Selector = dict[str, Any]


def selects(selector: Selector, labels: dict[str, str]) -> bool:
    """What Kubernetes makes of a label selector (of the operators, ``In`` is the one used here)."""
    for each in selector.get("matchExpressions", []):
        assert each["operator"] == "In"
        if labels.get(each["key"]) not in each["values"]:
            return False
    return bool(selector.get("matchLabels", {}).items() <= labels.items())


@pytest.fixture(scope="module")
def objects() -> list[dict[str, Any]]:
    return render(profile("cpu"), EVERYTHING)


@pytest.fixture(scope="module")
def labels(objects: list[dict[str, Any]]) -> dict[str, dict[str, str]]:
    return {component: template["metadata"]["labels"] for component, template in pods(objects)}


def chosen(selector: Selector, labels: dict[str, dict[str, str]]) -> set[str]:
    return {component for component, found in labels.items() if selects(selector, found)}


def test_each_service_selects_the_pods_of_one_part(
    objects: list[dict[str, Any]], labels: dict[str, dict[str, str]]
) -> None:
    services = of_kind(objects, "Service")
    assert services
    for service in services:
        component = service["metadata"]["labels"]["app.kubernetes.io/component"]
        assert chosen({"matchLabels": service["spec"]["selector"]}, labels) == {component}
        template = next(template for name, template in pods(objects) if name == component)
        ports = {port["name"] for container in template["spec"]["containers"] for port in container["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports


def test_budgets_and_monitors_select_pods_that_are_there(
    objects: list[dict[str, Any]], labels: dict[str, dict[str, str]]
) -> None:
    budgets = {each["metadata"]["name"]: each["spec"] for each in of_kind(objects, "PodDisruptionBudget")}
    assert chosen(budgets["live-ratchet-serving"]["selector"], labels) == {"serving-worker"}
    assert chosen(budgets["live-ratchet-ingest"]["selector"], labels) == {"ingest"}
    for monitor in of_kind(objects, "PodMonitor"):
        port = monitor["spec"]["podMetricsEndpoints"][0]["port"]
        for component in chosen(monitor["spec"]["selector"], labels):
            template = next(template for name, template in pods(objects) if name == component)
            assert port in {p["name"] for container in template["spec"]["containers"] for p in container["ports"]}


def test_a_budget_leaves_a_drain_possible() -> None:
    """Ray pods have no scale, so a budget is a number that stays available; with one worker there is none."""
    for replicas in (1, 2, 5):
        budgets = of_kind(render({"serving": {"workers": {"replicas": replicas}}}), "PodDisruptionBudget")
        kept = [each["spec"]["minAvailable"] for each in budgets if each["metadata"]["name"].endswith("-serving")]
        assert kept == ([replicas - 1] if replicas > 1 else [])


def test_secrets_come_from_secrets_and_only_where_they_are_needed(objects: list[dict[str, Any]]) -> None:
    names: dict[str, set[str]] = {}
    for component, template in pods(objects):
        spec = template["spec"]
        for container in spec["containers"]:
            for variable in container["env"]:
                reference = variable.get("valueFrom", {}).get("secretKeyRef")
                if reference:
                    names.setdefault(component, set()).add(reference["name"])
                assert reference or not any(word in variable["name"] for word in ("KEY", "SECRET", "LEDGER", "CLIENT"))
    assert names["migration"] == {"ratchet-ledger"}
    assert names["test"] == {"ratchet-operator"}
    # It reads serving's /metrics, and calls the cluster that trains.
    assert names["updater"] == {"ratchet-ledger", "ratchet-s3", "ratchet-operator", "live-ratchet-training"}
    assert names["training-worker"] == names["training-head"] == {"ratchet-s3"}
    assert names["console"] == {"ratchet-ledger", "ratchet-s3", "ratchet-operator", "ratchet-kafka", "ratchet-oidc"}
    assert names["maintain"] == {"ratchet-ledger", "ratchet-s3", "ratchet-kafka"}
    assert names["ingest"] == {*names["maintain"], "ratchet-split"}
    assert names["serving-worker"] == {"ratchet-ledger", "ratchet-s3", "ratchet-operator"}
    assert not of_kind(objects, "Secret")


def test_the_stores_of_all_pods_are_the_same(objects: list[dict[str, Any]]) -> None:
    for component, template in pods(objects):
        variables = {each["name"]: each.get("value") for each in template["spec"]["containers"][0]["env"]}
        if component not in ("migration", "test"):
            assert variables["AWS_ENDPOINT_URL"] == "http://seaweedfs:8333"
            assert variables["AWS_ALLOW_HTTP"] == "true"
            if not component.startswith("training-"):  # what a step needs comes with the call
                assert variables["RATCHET_CONFIG"] == "/etc/ratchet/ratchet.yaml"


def test_migration_runs_before_install_and_upgrade_and_needs_nothing_that_is_not_there_yet(
    objects: list[dict[str, Any]],
) -> None:
    job = of_kind(objects, "Job")[0]
    assert job["metadata"]["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade"
    spec = job["spec"]["template"]["spec"]
    assert spec["containers"][0]["command"] == ["ratchet", "admin", "migrate"]
    assert not {"serviceAccountName", "priorityClassName"} & spec.keys()
    assert [each["configMap"]["name"] for each in spec["volumes"] if "configMap" in each] == [
        "company-ca"
    ]  # not the chart's


def test_migration_and_test_go_where_they_are_told_and_before_training_where_a_class_is_named() -> None:
    placed = {
        "nodeSelector": {"pool": "small"},
        "tolerations": [{"key": "pool", "operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
    }
    templates = dict(pods(render({"migration": placed, "priorityClasses": {"serving": "important"}})))
    for component in ("migration", "test"):
        spec = templates[component]["spec"]
        assert {**placed, "priorityClassName": "important"}.items() <= spec.items(), component


def test_a_migration_that_fails_says_so_within_a_minute_and_is_cleared_away(objects: list[dict[str, Any]]) -> None:
    """Pauses of 10 and 20 s between three attempts of a few seconds; Helm 4 prints the log of the last one."""
    (job,) = of_kind(objects, "Job")
    assert job["spec"]["backoffLimit"] == 2
    assert job["metadata"]["annotations"]["helm.sh/hook-output-log-policy"] == "hook-failed"
    assert job["spec"]["ttlSecondsAfterFinished"] == 24 * 3600  # Helm deletes hooks of releases that are gone never
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["terminationMessagePolicy"] == "FallbackToLogsOnError"


def policies(objects: list[dict[str, Any]], component: str, labels: dict[str, dict[str, str]]) -> list[Any]:
    """The specs of all policies that hold for a component."""
    found = [each["spec"] for each in of_kind(objects, "NetworkPolicy")]
    return [spec for spec in found if selects(spec["podSelector"], labels[component])]


def outward(objects: list[dict[str, Any]], component: str, labels: dict[str, dict[str, str]]) -> set[int]:
    """Ports that a component may call outside of Ray."""
    rules = [rule for spec in policies(objects, component, labels) for rule in spec.get("egress", [])]
    assert all("ports" in rule or "podSelector" in rule["to"][0] for rule in rules), "an opening without a port"
    return {port["port"] for rule in rules for port in rule.get("ports", [])}


def test_every_pod_is_closed_both_ways_and_calls_only_what_is_named(
    objects: list[dict[str, Any]], labels: dict[str, dict[str, str]]
) -> None:
    dns, ledger, kafka, redis, serve = 53, 5432, 9092, 6379, 8000
    store = {443, 80}  # and the credentials of the cloud, from its metadata
    for component in labels:
        assert {"policyTypes": ["Ingress", "Egress"]}.items() <= policies(objects, component, labels)[0].items()
    assert outward(objects, "migration", labels) == {dns, ledger}
    assert outward(objects, "test", labels) == {dns, serve}
    assert outward(objects, "ingest", labels) == {dns, ledger, kafka, *store}
    assert outward(objects, "maintain", labels) == {dns, ledger, kafka, *store}
    assert outward(objects, "updater", labels) == {dns, ledger, *store, serve, 10001}
    assert outward(objects, "training-worker", labels) == {dns, *store, 6443}  # a policy of its head, too
    assert outward(objects, "console", labels) == {dns, ledger, kafka, *store, serve}
    assert outward(objects, "serving-worker", labels) == {dns, ledger, *store, redis}


def callers(spec: dict[str, Any], port: int | str, labels: dict[str, dict[str, str]]) -> set[str]:
    """The components, as far as they are named one by one, that a policy lets in at a port."""
    peers = [
        peer["podSelector"]
        for rule in spec.get("ingress", [])
        if any(each["port"] == port for each in rule.get("ports", []))
        for peer in rule["from"]
        if peer.get("podSelector") and "namespaceSelector" not in peer
    ]
    return {name for selector in peers for name in chosen(selector, labels)}


@pytest.mark.parametrize("off", ["", "console", "updater"])
def test_serving_lets_in_the_parts_that_call_it(off: str) -> None:
    """With clients of another namespace only: the console, and the trainer, which reads how long requests take."""
    values = {"networkPolicy": {"ingress": {"clients": [{"namespaceSelector": {"matchLabels": {"a": "b"}}}]}}}
    objects = render(values, {off: {"enabled": False}} if off else {})
    labels = {component: template["metadata"]["labels"] for component, template in pods(objects)}
    found = {name for spec in policies(objects, "serving-head", labels) for name in callers(spec, 8000, labels)}
    assert found == {"console", "updater", "test"} - {off}


def test_the_ingress_controller_reaches_what_is_published() -> None:
    controller = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "ingress-nginx"}}}
    for values, published in (
        ({}, set()),
        ({"enabled": True, "host": "a.example"}, {8000}),
        ({"enabled": True, "host": "a.example", "consoleHost": "c.example"}, {8000, 8001}),
    ):
        rules = [
            rule
            for each in of_kind(render({"ingress": values}), "NetworkPolicy")
            for rule in each["spec"].get("ingress", [])
        ]
        assert {port["port"] for rule in rules if controller in rule["from"] for port in rule["ports"]} == published


def test_rays_autoscaler_reaches_the_api_server_also_where_policies_see_its_own_port() -> None:
    """Most network plugins look at a packet after the Service's address and port have been replaced."""
    autoscaled = {"serving": {"workers": {"replicas": 2, "maxReplicas": 4}}}
    objects = render(EVERYTHING, autoscaled)
    labels = {component: template["metadata"]["labels"] for component, template in pods(objects)}
    for head in ("serving-head", "training-head"):
        assert {443, 6443} <= outward(objects, head, labels)
    named = {
        "networkPolicy": {"egress": {"kubernetes": {"to": [{"ipBlock": {"cidr": "10.0.0.1/32"}}], "ports": [16443]}}}
    }
    opened = {"to": [{"ipBlock": {"cidr": "10.0.0.1/32"}}], "ports": [{"protocol": "TCP", "port": 16443}]}
    assert opened in policies(render(autoscaled, named), "serving-head", labels)[-1]["egress"]


@pytest.mark.parametrize("name", ["kuberay-operator", "kuberay"], ids=["its chart", "its kustomize manifests"])
def test_kuberay_reaches_ray_however_it_was_installed(name: str) -> None:
    """Labels of the operator's pods in helm-chart/kuberay-operator and in ray-operator/config/manager of KubeRay."""
    operator = {"app.kubernetes.io/name": name, "app.kubernetes.io/component": "kuberay-operator"}
    objects = render(EVERYTHING)
    for policy in ("serving", "training"):
        spec = next(
            each["spec"]
            for each in of_kind(objects, "NetworkPolicy")
            if each["metadata"]["name"] == f"live-ratchet-{policy}"
        )
        let_in = {
            port["port"]
            for rule in spec["ingress"]
            for peer in rule["from"]
            if peer.get("namespaceSelector") == {} and selects(peer["podSelector"], operator)
            for port in rule["ports"]
        }
        assert {8265, 52365} <= let_in, policy


def test_cloud_identities_are_reached_by_the_users_of_the_object_store_alone() -> None:
    for cidr, port in (("169.254.169.254/32", 80), ("169.254.169.252/32", 988), ("169.254.170.23/32", 80)):
        values = {"networkPolicy": {"egress": {"cloudIdentity": [{"cidr": cidr, "port": port}]}}}
        opened = {"to": [{"ipBlock": {"cidr": cidr}}], "ports": [{"protocol": "TCP", "port": port}]}
        objects = render(values)
        labels = {component: template["metadata"]["labels"] for component, template in pods(objects)}
        found = {
            name for name in labels for spec in policies(objects, name, labels) if opened in spec.get("egress", [])
        }
        assert found == labels.keys() - {"migration", "test"}
    rules = [rule for each in of_kind(render(), "NetworkPolicy") for rule in each["spec"].get("egress", [])]
    assert not [rule for rule in rules for peer in rule.get("to", []) if "ipBlock" in peer], "closed by default"


def test_rays_ports_are_open_to_ray_alone(objects: list[dict[str, Any]], labels: dict[str, dict[str, str]]) -> None:
    rules = [rule for spec in policies(objects, "serving-head", labels) for rule in spec.get("ingress", [])]
    without_port = [rule["from"] for rule in rules if "ports" not in rule]
    assert [chosen(peer["podSelector"], labels) for peers in without_port for peer in peers] == [
        {"serving-head", "serving-worker"}
    ]


def test_the_metrics_ports_are_open_to_prometheus(
    objects: list[dict[str, Any]], labels: dict[str, dict[str, str]]
) -> None:
    for component in ("ingest", "maintain", "updater"):
        rules = [rule for spec in policies(objects, component, labels) for rule in spec.get("ingress", [])]
        assert [rule["ports"][0]["port"] for rule in rules] == ["metrics"]


def test_keda_scales_ingest_by_lag_up_to_the_partitions(objects: list[dict[str, Any]]) -> None:
    spec = of_kind(objects, "ScaledObject")[0]["spec"]
    assert spec["maxReplicaCount"] == EVERYTHING["settings"]["kafka"]["partitions"]
    trigger = spec["triggers"][0]
    assert trigger["type"] == "kafka"
    assert trigger["metadata"]["bootstrapServers"] == NEEDED["kafka"]["bootstrap"]
    authentication = of_kind(objects, "TriggerAuthentication")[0]
    assert trigger["authenticationRef"]["name"] == authentication["metadata"]["name"]
    ingest = next(each for each in of_kind(objects, "Deployment") if each["metadata"]["name"].endswith("-ingest"))
    assert "replicas" not in ingest["spec"], "each upgrade would undo what KEDA decided"
    assert not of_kind(render(), "ScaledObject"), "off by default"


def test_no_upgrade_adds_a_writer_of_the_sample_store(objects: list[dict[str, Any]]) -> None:
    for deployment in of_kind(objects, "Deployment"):
        strategy = deployment["spec"]["strategy"]
        assert strategy["type"] == "Recreate" or strategy["rollingUpdate"]["maxSurge"] == 0


def test_who_administers_a_namespace_can_install_everything(objects: list[dict[str, Any]]) -> None:
    """With Kubernetes' role ``admin`` and the editor roles of the operators; nothing belongs to the whole cluster."""
    admin = {
        "ConfigMap", "Service", "ServiceAccount", "Deployment", "Job", "Pod", "Ingress", "NetworkPolicy",
        "PodDisruptionBudget",
    }  # fmt: skip
    of_operators = {"RayService", "RayCluster", "ScaledObject", "TriggerAuthentication", "PodMonitor", "PrometheusRule"}
    assert {each["kind"] for each in objects} == admin | of_operators


def test_two_releases_of_one_name_in_two_namespaces_share_no_object() -> None:
    one, other = (
        {(each["kind"], each["metadata"]["name"]) for each in objects if each["kind"] == "PriorityClass"}
        for objects in (
            render({"priorityClasses": {"create": True}}, namespace=namespace) for namespace in ("ml", "other")
        )
    )
    assert one and other and not one & other


def test_what_is_published_is_neither_metrics_nor_the_operators_calls(objects: list[dict[str, Any]]) -> None:
    rules = of_kind(objects, "Ingress")[0]["spec"]["rules"]
    paths = {path["path"] for rule in rules if rule["host"] == "a.example" for path in rule["http"]["paths"]}
    assert "/v1" in paths
    assert not [path for path in paths if "/admin".startswith(path) or "/metrics".startswith(path)]


def test_job_and_processes_have_the_names_that_they_have_on_one_machine(objects: list[dict[str, Any]]) -> None:
    from core.loading import load_settings
    from ops.cli.metrics import targets_of

    made = {
        tuple(rule["replacement"] for rule in each["spec"]["podMetricsEndpoints"][0]["relabelings"])
        for each in of_kind(objects, "PodMonitor")
    }
    known = targets_of(load_settings(environ={}, overrides={"serve.ray_metrics_port": 8089}), "here")
    assert made == {("ratchet", each["labels"]["process"]) for each in known}


def test_every_object_says_which_release_it_is_of() -> None:
    for each in render(merged(profile("multigpu"), EVERYTHING)):
        labels = each["metadata"]["labels"]
        assert labels["app.kubernetes.io/instance"] == "live"
        assert {"helm.sh/chart", "app.kubernetes.io/name", "app.kubernetes.io/managed-by"} <= labels.keys()
