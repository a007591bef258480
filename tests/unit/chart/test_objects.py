"""Services, budgets, secrets, network policies, monitoring and what else the chart makes beside its pods."""

from __future__ import annotations

import json
import re
import runpy
from itertools import product
from typing import Any

import pytest
import yaml

from core.loading import load_settings
from core.settings import Settings
from ops.cli.metrics import targets_of
from tests.support.chart import EVERYTHING, ROOT, merged, named, of_kind, pods, profile, render, selects, variables

Labels = dict[str, dict[str, str]]
RULES = {"monitoring": {"rules": True}}


def labels_of(objects: list[dict[str, Any]]) -> Labels:
    return {component: template["metadata"]["labels"] for component, template in pods(objects)}


@pytest.fixture(scope="module")
def labels(everything: list[dict[str, Any]]) -> Labels:
    return labels_of(everything)


def chosen(selector: dict[str, Any], labels: Labels) -> set[str]:
    return {component for component, found in labels.items() if selects(selector, found)}


def ports_of(objects: list[dict[str, Any]], component: str) -> set[str]:
    template = next(template for name, template in pods(objects) if name == component)
    return {port["name"] for container in template["spec"]["containers"] for port in container["ports"]}


def test_services_budgets_and_monitors_select_their_pods(everything: list[dict[str, Any]], labels: Labels) -> None:
    services = of_kind(everything, "Service")
    assert services
    for service in services:
        component = service["metadata"]["labels"]["app.kubernetes.io/component"]
        assert chosen({"matchLabels": service["spec"]["selector"]}, labels) == {component}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports_of(everything, component)
    for part, component in (("serving", "serving-worker"), ("ingest", "ingest")):
        budget = named(everything, "PodDisruptionBudget", part)
        assert chosen(budget["spec"]["selector"], labels) == {component}
    made = set()
    for monitor in of_kind(everything, "PodMonitor"):
        endpoint = monitor["spec"]["podMetricsEndpoints"][0]
        made.add(tuple(rule["replacement"] for rule in endpoint["relabelings"]))
        for component in chosen(monitor["spec"]["selector"], labels):
            assert endpoint["port"] in ports_of(everything, component)
    on_one_machine = targets_of(load_settings(environ={}, overrides={"serve.ray_metrics_port": 8089}), "here")
    assert made == {("ratchet", each["labels"]["process"]) for each in on_one_machine}


def test_secrets_come_from_secrets_and_only_where_they_are_needed(everything: list[dict[str, Any]]) -> None:
    names: dict[str, set[str]] = {}
    for component, template in pods(everything):
        for variable in (each for container in template["spec"]["containers"] for each in container["env"]):
            reference = variable.get("valueFrom", {}).get("secretKeyRef")
            if reference:
                names.setdefault(component, set()).add(reference["name"])
            assert reference or not any(word in variable["name"] for word in ("KEY", "SECRET", "LEDGER", "CLIENT"))
    ledger, store, operator, kafka = "ratchet-ledger", "ratchet-s3", "ratchet-operator", "ratchet-kafka"
    expected = {
        "migration": {ledger},
        "test": {operator},
        "updater": {ledger, store, operator, "live-ratchet-training"},  # it reads serving's /metrics, and calls Ray
        "indexes": {ledger, store, "shop"},
        "training-worker": {store},
        "training-head": {store},
        "console": {ledger, store, operator, kafka, "ratchet-oidc"},
        "maintain": {ledger, store, kafka},
        "ingest": {ledger, store, kafka, "ratchet-split"},
        "serving-worker": {ledger, store, operator},
    }
    assert {name: names[name] for name in expected} == expected
    assert not of_kind(everything, "Secret")
    for component, template in pods(everything):
        if component not in ("migration", "test"):
            told = variables(template["spec"]["containers"][0])
            assert (told["AWS_ENDPOINT_URL"], told["AWS_ALLOW_HTTP"]) == ("http://seaweedfs:8333", "true")
            # what a step of training needs comes with the call
            assert component.startswith("training-") or told["RATCHET_CONFIG"] == "/etc/ratchet/ratchet.yaml"


def test_migration_runs_before_everything_and_a_failure_says_so_soon(everything: list[dict[str, Any]]) -> None:
    """It needs nothing that is created later. Pauses of 10 and 20 s between three attempts of a few seconds; Helm 4
    prints the log of the last one, and never deletes hooks of uninstalled releases.
    """
    (job,) = of_kind(everything, "Job")
    annotations, spec = job["metadata"]["annotations"], job["spec"]["template"]["spec"]
    assert annotations["helm.sh/hook"] == "pre-install,pre-upgrade"
    assert annotations["helm.sh/hook-output-log-policy"] == "hook-failed"
    assert (job["spec"]["backoffLimit"], job["spec"]["ttlSecondsAfterFinished"]) == (2, 24 * 3600)
    pull_seconds = 6.1e9 / 2e6  # the largest image at 2 MB/s; the deadline counts from the Job's start
    assert job["spec"]["activeDeadlineSeconds"] > pull_seconds
    (container,) = spec["containers"]
    assert container["command"] == ["ratchet", "admin", "migrate"]
    assert container["terminationMessagePolicy"] == "FallbackToLogsOnError"
    assert not {"serviceAccountName", "priorityClassName"} & spec.keys()
    maps = [each["configMap"]["name"] for each in spec["volumes"] if "configMap" in each]
    assert maps == ["company-ca"]  # not the chart's
    tolerations = [{"key": "pool", "operator": "Exists"}]
    placed = {"nodeSelector": {"pool": "small"}, "tolerations": tolerations, "affinity": {"nodeAffinity": {}}}
    templates = dict(pods(render({"migration": placed, "priorityClasses": {"serving": "important"}})))
    for component in ("migration", "test"):
        assert {**placed, "priorityClassName": "important"}.items() <= templates[component]["spec"].items(), component


def test_who_administers_a_namespace_can_install_everything(everything: list[dict[str, Any]]) -> None:
    """With Kubernetes' role ``admin`` and the editor roles of the operators; no object is cluster-scoped."""
    admin = {
        "ConfigMap", "Service", "ServiceAccount", "Deployment", "Job", "Pod", "NetworkPolicy", "PodDisruptionBudget",
    }  # fmt: skip
    optional = {"Ingress", "RayCluster", "ScaledObject", "TriggerAuthentication", "PodMonitor", "PrometheusRule"}
    assert {each["kind"] for each in everything} == admin | {"RayService"} | optional
    assert optional.isdisjoint(each["kind"] for each in render()), "off by default"
    for each in render(merged(profile("multigpu"), EVERYTHING)):
        known = each["metadata"]["labels"]
        assert known["app.kubernetes.io/instance"] == "live"
        assert {"helm.sh/chart", "app.kubernetes.io/name", "app.kubernetes.io/managed-by"} <= known.keys()
    installed = [render({"priorityClasses": {"create": True}}, namespace=namespace) for namespace in ("ml", "other")]
    one, other = ({each["metadata"]["name"] for each in of_kind(made, "PriorityClass")} for made in installed)
    assert one and other and not one & other


def test_what_is_published_is_neither_metrics_nor_the_operators_calls(everything: list[dict[str, Any]]) -> None:
    hosts = of_kind(everything, "Ingress")[0]["spec"]["rules"]
    paths = {path["path"] for rule in hosts if rule["host"] == "a.example" for path in rule["http"]["paths"]}
    assert "/v1" in paths
    hidden = ("/admin", "/metrics", "/docs", "/openapi.json")
    assert not [path for path in paths for each in hidden if each.startswith(path)]
    controller = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "ingress-nginx"}}}
    on = {"enabled": True, "host": "a.example"}
    for ingress, published in (({}, set()), (on, {8000}), ({**on, "consoleHost": "c.example"}, {8000, 8001})):
        found = rules(render({"ingress": ingress}), "ingress")
        assert {port["port"] for rule in found if controller in rule["from"] for port in rule["ports"]} == published


def test_the_ingress_lets_bodies_through_that_the_server_takes() -> None:
    """ingress-nginx takes 1 MiB by default; an annotation of the installation wins."""
    name = "nginx.ingress.kubernetes.io/proxy-body-size"
    ingress: dict[str, Any] = {"enabled": True, "host": "a.example"}
    for size in (None, 3 << 20):
        told = {"serve": {"max_image_bytes": size} if size else {}}
        objects = render({"ingress": ingress, "settings": told})
        expected = Settings.model_validate(told).serve.max_body_bytes
        assert of_kind(objects, "Ingress")[0]["metadata"]["annotations"] == {name: str(expected)}
    own = render({"ingress": {**ingress, "annotations": {name: "64m", "a.example/b": "c"}}})
    assert of_kind(own, "Ingress")[0]["metadata"]["annotations"] == {name: "64m", "a.example/b": "c"}


def keda(*layers: Any) -> tuple[dict[str, str], dict[str, tuple[str, str]]]:
    """Metadata of KEDA's trigger, and its parameters with the Secret or ConfigMap and the key of each."""
    objects = render({"kafka": {"existingSecret": {"name": "ratchet-kafka"}}}, *layers)
    (scaled,) = of_kind(objects, "ScaledObject")
    found = {
        each["parameter"]: (each["name"], each["key"])
        for auth in of_kind(objects, "TriggerAuthentication")
        for references in auth["spec"].values()
        for each in references
    }
    (trigger,) = scaled["spec"]["triggers"]
    assert bool(found) == ("authenticationRef" in trigger)
    return trigger["metadata"], found


def test_keda_is_told_mechanism_and_tls_by_values_and_credentials_by_the_secret_of_kafka() -> None:
    """As KEDA's Kafka scaler reads them: ``sasl`` and ``tls`` in the trigger's metadata, the rest as parameters."""
    secret = "ratchet-kafka"
    told, found = keda({"ingest": {"keda": {"enabled": True}}})
    assert not {"sasl", "tls"} & told.keys() and not found
    told, found = keda({"ingest": {"keda": {"enabled": True, "sasl": "scram_sha512", "tls": "enable"}}})
    assert (told["sasl"], told["tls"]) == ("scram_sha512", "enable")
    assert found == {name: (secret, name) for name in ("username", "password", "ca")}
    told, found = keda({"ingest": {"keda": {"enabled": True, "tls": "mutual"}}})
    assert told["tls"] == "enable" and found == {name: (secret, name) for name in ("ca", "cert", "key")}


def test_keda_gets_its_token_where_ingest_does() -> None:
    oauth = {"token_url": "https://id.example/token", "client_id": "ratchet", "scope": "kafka offline"}
    values = {"settings": {"kafka": {"oauth": oauth}}, "ingest": {"keda": {"enabled": True, "sasl": "oauthbearer"}}}
    told, found = keda(values)
    assert told["sasl"] == "oauthbearer" and found["password"] == ("ratchet-kafka", "oauth-client-secret")
    objects = render({"kafka": {"existingSecret": {"name": "ratchet-kafka"}}}, values)
    data = named(objects, "ConfigMap", "kafka")["data"]
    plain = {name: data[key] for name, (holder, key) in found.items() if holder == "live-ratchet-kafka"}
    assert plain == {
        "username": "ratchet", "oauthTokenEndpointUri": "https://id.example/token", "scopes": "kafka,offline"
    }  # fmt: skip


# Network policies


def policies(objects: list[dict[str, Any]], component: str = "") -> list[Any]:
    """Those of all pods, or those that select one component."""
    labels = labels_of(objects)
    specs = [each["spec"] for each in of_kind(objects, "NetworkPolicy")]
    return [spec for spec in specs if not component or selects(spec["podSelector"], labels[component])]


def rules(objects: list[dict[str, Any]], direction: str, component: str = "") -> list[Any]:
    return [rule for spec in policies(objects, component) for rule in spec.get(direction, [])]


def outward(objects: list[dict[str, Any]], component: str) -> set[int]:
    found = rules(objects, "egress", component)
    assert all("ports" in rule or "podSelector" in rule["to"][0] for rule in found), "an opening without a port"
    return {port["port"] for rule in found for port in rule.get("ports", [])}


def test_every_pod_is_closed_but_for_what_is_named(everything: list[dict[str, Any]], labels: Labels) -> None:
    dns, ledger, kafka, redis, serve = 53, 5432, 9092, 6379, 8000
    store = {443, 80}  # and the credentials of the cloud, from its metadata
    for component in labels:
        assert {"policyTypes": ["Ingress", "Egress"]}.items() <= policies(everything, component)[0].items()
    expected = {
        "migration": {dns, ledger},
        "test": {dns, serve},
        "ingest": {dns, ledger, kafka, *store},
        "maintain": {dns, ledger, kafka, *store},
        "updater": {dns, ledger, *store, serve, 10001},
        "indexes": {dns, ledger, *store, 6333, 6334},
        "training-worker": {dns, *store, 6443},  # a policy of its head, too
        "console": {dns, ledger, kafka, *store, serve},
        "serving-worker": {dns, ledger, *store, redis},
    }
    assert {component: outward(everything, component) for component in expected} == expected
    without_port = [rule["from"] for rule in rules(everything, "ingress", "serving-head") if "ports" not in rule]
    let_in = [chosen(peer["podSelector"], labels) for peers in without_port for peer in peers]
    assert let_in == [{"serving-head", "serving-worker"}], "Ray's own ports"
    for component in ("ingest", "maintain", "updater"):
        assert [rule["ports"][0]["port"] for rule in rules(everything, "ingress", component)] == ["metrics"]


def test_serving_lets_in_the_parts_that_call_it() -> None:
    """With clients of another namespace only: the console, and the trainer, which reads request latencies."""
    values = {"networkPolicy": {"ingress": {"clients": [{"namespaceSelector": {"matchLabels": {"a": "b"}}}]}}}
    for off in ("", "console", "updater"):
        objects = render(values, {off: {"enabled": False}} if off else {})
        found = {
            name
            for rule in rules(objects, "ingress", "serving-head")
            if any(each["port"] == 8000 for each in rule.get("ports", []))
            for peer in rule["from"]
            if peer.get("podSelector") and "namespaceSelector" not in peer
            for name in chosen(peer["podSelector"], labels_of(objects))
        }
        assert found == {"console", "updater", "test"} - {off}


def test_kuberay_reaches_ray_however_it_was_installed(everything: list[dict[str, Any]]) -> None:
    """Labels of the operator's pods in helm-chart/kuberay-operator and in ray-operator/config/manager of KubeRay."""
    for name, part in product(("kuberay-operator", "kuberay"), ("serving", "training")):
        operator = {"app.kubernetes.io/name": name, "app.kubernetes.io/component": "kuberay-operator"}
        let_in = {
            port["port"]
            for rule in named(everything, "NetworkPolicy", part)["spec"]["ingress"]
            for peer in rule["from"]
            if peer.get("namespaceSelector") == {} and selects(peer["podSelector"], operator)
            for port in rule["ports"]
        }
        assert {8265, 52365} <= let_in, (name, part)


def test_cloud_identities_are_reached_by_the_users_of_the_object_store_alone() -> None:
    cidr, port = "169.254.170.23/32", 988
    objects = render({"networkPolicy": {"egress": {"cloudIdentity": [{"cidr": cidr, "port": port}]}}})
    opened = {"to": [{"ipBlock": {"cidr": cidr}}], "ports": [{"protocol": "TCP", "port": port}]}
    components = labels_of(objects).keys()
    found = {name for name in components if opened in rules(objects, "egress", name)}
    assert found == components - {"migration", "test"}
    closed = rules(render(), "egress")
    assert not [peer for rule in closed for peer in rule.get("to", []) if "ipBlock" in peer], "by default"


def test_the_example_for_services_outside_the_cluster_opens_their_addresses_and_no_others() -> None:
    values = yaml.safe_load((ROOT / "examples" / "kubernetes" / "external-services.yaml").read_text())
    objects = render(values)
    opened = {
        (peer["ipBlock"]["cidr"], port["port"])
        for rule in rules(objects, "egress", "ingest")
        for peer in rule.get("to", [])
        for port in rule["ports"]
        if "ipBlock" in peer
    }
    brokers = {(f"10.{number}.0.0/24", 9096) for number in (21, 22, 23)}
    assert opened == {("10.20.0.0/24", 5432), *brokers, ("10.24.0.0/24", 443), ("169.254.170.23/32", 80)}
    assert all(rule.get("to") for rule in rules(objects, "egress", "ingest")), "an opening to any address"


# Rules and dashboards


def rules_of(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    groups = of_kind(objects, "PrometheusRule")[0]["spec"]["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_the_copies_in_the_chart_are_not_stale() -> None:
    generator = runpy.run_path(str(ROOT / "helm" / "generate.py"))
    wanted, there = generator["generate"](), generator["existing"]()
    stale = [path for path, text in wanted.items() if path not in there or path.read_text() != text]
    assert [*stale, *(there - wanted.keys())] == [], "run `make chart`"


def test_the_rules_are_those_that_promtool_checks_each_of_one_namespace() -> None:
    files = sorted((ROOT / "ops" / "alerts").glob("*.yaml"))
    known = [rule for file in files for group in yaml.safe_load(file.read_text())["groups"] for rule in group["rules"]]
    assert known
    scope = "namespace='ml'"
    for rule, origin in zip(rules_of(render(RULES)), known, strict=True):
        assert (rule.get("alert"), rule.get("record")) == (origin.get("alert"), origin.get("record"))
        assert rule["labels"] == {**origin.get("labels", {}), "namespace": "ml"}
        metrics = re.findall(r"\bratchet[_:][a-z0-9_:]+", origin["expr"])
        assert len(re.findall(rf"\bratchet[_:][a-z0-9_:]+\{{{scope}", rule["expr"])) == len(metrics), rule["expr"]
        assert rule["expr"].replace(f"{{{scope}}}", "").replace(f"{scope}, ", "") == origin["expr"]
        queries = re.findall(r"\bratchet[_:][a-z0-9_:]+", json.dumps(origin.get("annotations")))
        assert json.dumps(rule.get("annotations")).count(scope) == len(queries)


def test_rays_autoscaler_reaches_the_api_server_also_where_policies_see_its_own_port() -> None:
    """Most network plugins look at a packet after the Service's address and port have been replaced."""
    autoscaled = {"serving": {"workers": {"replicas": 2, "maxReplicas": 4}}}
    for head in ("serving-head", "training-head"):
        assert {443, 6443} <= outward(render(EVERYTHING, autoscaled), head)
    to = [{"ipBlock": {"cidr": "10.0.0.1/32"}}]
    told = {"networkPolicy": {"egress": {"kubernetes": {"to": to, "ports": [16443]}}}}
    opened = {"to": to, "ports": [{"protocol": "TCP", "port": 16443}]}
    assert opened in rules(render(autoscaled, told), "egress", "serving-head")
