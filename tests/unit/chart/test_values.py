from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from helm_python import HelmError

from tests.support.chart import CHART, EVERYTHING, NEEDED, PROFILES, ROOT, chart, merged, profile
from tests.support.kubernetes_api import cluster_with, render_on

WRONG: list[tuple[str, Any, list[str]]] = [
    ("a name that does not exist", {"serving": {"worker": {"replicas": 2}}}, ["/serving", "worker"]),
    ("no ledger", {"ledger": {"existingSecret": {"name": ""}}}, ["/ledger/existingSecret/name"]),
    ("a secret as a value", {"ledger": {"url": "postgresql://me:secret@db/x"}}, ["/ledger", "url"]),
    ("a secret among the settings", {"settings": {"ledger_url": "postgresql://x"}}, ["/settings", "ledger_url"]),
    ("the split's key as a value", {"settings": {"ingest": {"split_key": "k"}}}, ["/settings/ingest", "split_key"]),
    ("a setting that does not exist", {"settings": {"serve": {"prt": 1}}}, ["/settings/serve", "prt"]),
    ("a setting out of range", {"settings": {"gate": {"alpha": 0.7}}}, ["/settings/gate/alpha", "0.5"]),
    ("a port that the chart sets", {"settings": {"serve": {"port": 9000}}}, ["/settings/serve", "port"]),
    ("a local folder as a store", {"objectStore": {"lake": "/var/lake"}}, ["/objectStore/lake", "s3|gs|az"]),
    ("a broker without a port", {"kafka": {"bootstrap": "kafka"}}, ["/kafka/bootstrap"]),
    ("two trainers", {"updater": {"replicas": 2}}, ["/updater", "replicas"]),
    ("two that maintain", {"maintain": {"replicas": 2}}, ["/maintain", "replicas"]),
    ("a claim that pods of ingest would share", {"ingest": {"storage": {"existingClaim": "x"}}}, ["/ingest/storage"]),
    (
        "too many replicas on a node",
        {"serving": {"actors": {"vlm": {"maxPerNode": 101}}}},
        ["/serving/actors/vlm/maxPerNode"],
    ),
    ("no worker", {"serving": {"workers": {"replicas": 0}}}, ["/serving/workers/replicas", "minimum"]),
    (
        "a worker without room for the replicas",
        {
            "settings": {"base": {"vlm": ""}, "serve": {"ingress_replicas": 2}},
            "serving": {"workers": {"replicas": 1, "resources": {"requests": {"cpu": "200m"}}}},
        },
        ["serving.workers has no room", "1.2 CPUs", "1 worker(s) have 1 each"],
    ),
    ("text for a number", {"ingest": {"replicas": "two"}}, ["/ingest/replicas", "integer"]),
    ("an image that is not built", {"image": {"flavour": "rocm"}}, ["/image/flavour", "cpu", "gpu"]),
    ("a container without a bound", {"console": {"resources": {"limits": None}}}, ["/console/resources", "limits"]),
    ("a quantity with a wrong unit", {"updater": {"sharedMemory": "1GB"}}, ["/updater/sharedMemory"]),
    ("fault tolerance without Redis", {"serving": {"gcsFaultTolerance": {"enabled": True}}}, ["redisAddress"]),
    ("a volume without a claim", {"bases": {"source": "volume"}}, ["/bases/existingClaim"]),
    ("an ingress without a host", {"ingress": {"enabled": True}}, ["/ingress/host"]),
    (
        "an ingress for anybody",
        {"networkPolicy": {"ingress": {"controller": []}}},
        ["/networkPolicy/ingress/controller"],
    ),
    ("CAs in two places", {"caBundle": {"configMap": "a", "secret": "b"}}, ["/caBundle/secret"]),
    ("a variable without a name", {"extraEnv": [{"value": "x"}]}, ["/extraEnv/0", "name"]),
    ("a variable that KubeRay refuses", {"extraEnv": [{"name": "REDIS_PASSWORD", "value": "x"}]}, ["/extraEnv/0/name"]),
    ("an open peer", {"networkPolicy": {"ingress": {"clients": [{}]}}}, ["/networkPolicy/ingress/clients/0"]),
]


@pytest.mark.parametrize(("wrong", "names"), [(wrong, names) for _, wrong, names in WRONG], ids=[w[0] for w in WRONG])
def test_a_wrong_value_is_refused_by_name(wrong: Any, names: list[str]) -> None:
    with pytest.raises(HelmError) as caught:
        chart().render(merged(NEEDED, wrong), name="live")
    for name in names:
        assert name in str(caught.value)


@pytest.mark.parametrize("missing", NEEDED)
def test_what_every_installation_has_to_say_is_asked_for(missing: str) -> None:
    with pytest.raises(HelmError, match=f"/{missing}"):
        chart().render({name: value for name, value in NEEDED.items() if name != missing}, name="live")


def paths(values: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, value in values.items():
        if isinstance(value, dict) or name == [*values][-1]:
            yield (*above, name)
        if isinstance(value, dict):
            yield from paths(value, (*above, name))


def test_values_that_an_older_chart_did_not_have_are_missed_by_name() -> None:
    """`helm upgrade --reuse-values` keeps the defaults of the old chart, without new values of this one."""
    silent = set()
    for path in paths(yaml.safe_load((CHART / "values.yaml").read_text())):
        without: Any = None  # Helm removes what is null
        for name in reversed(path):
            without = {name: without}
        try:
            chart().render(merged(NEEDED, without), name="live")
        except HelmError as error:
            if f"missing property '{path[-1]}'" in str(error):
                continue
        silent.add(path[-1])
    assert silent <= {"maxPerNode", "grafana_dashboard"}  # may be left out


def test_the_example_of_the_deployers_page_is_a_valid_one_and_refusals_read_as_it_says() -> None:
    page = (ROOT / "docs" / "deployer.md").read_text()
    example = yaml.safe_load(page.partition("```yaml\n")[2].partition("```")[0])
    assert example.keys() >= NEEDED.keys()
    for name in PROFILES:
        assert chart().render(merged(profile(name), example), name="ratchet")
    with pytest.raises(HelmError) as caught:
        chart().render(merged(example, {"serving": {"workers": {"replicas": 0}}}), name="ratchet")
    shown = page.partition("names itself (`")[2].partition("`")[0]
    assert shown in str(caught.value)


@pytest.mark.parametrize("name", PROFILES)
def test_profiles_set_nothing_that_an_installation_has_to_say(name: str) -> None:
    assert profile(name).keys().isdisjoint(NEEDED)


# What the chart asks the cluster before it changes anything


def ray(kind: str, name: str, **metadata: Any) -> dict[str, Any]:
    return {"apiVersion": "ray.io/v1", "kind": kind, "metadata": {"name": name, "namespace": "ml", **metadata}}


@pytest.mark.parametrize(("kind", "name"), [("RayService", "live-ratchet"), ("RayCluster", "live-ratchet-training")])
def test_what_is_still_being_deleted_is_not_taken_over(kind: str, name: str) -> None:
    """Helm would adopt it and say "deployed"; a minute later it is gone."""
    training = {"updater": {"workers": {"enabled": True}, "storage": {"existingClaim": "updates"}}}
    dying = ray(kind, name, deletionTimestamp="2026-11-30T08:00:00Z")
    with cluster_with([dying]) as config, pytest.raises(HelmError) as caught:
        render_on(config, training)
    wait = f"kubectl -n ml wait --for=delete {kind.lower()}/{name} --timeout=10m"
    assert f"{kind} {name} of an earlier installation is still being deleted" in str(caught.value)
    assert wait in str(caught.value)


def test_a_running_rayservice_is_upgraded() -> None:
    with cluster_with([ray("RayService", "live-ratchet")]) as config:
        assert "kind: RayService" in render_on(config, is_upgrade=True)["ratchet/templates/rayservice.yaml"]


NAMESPACE = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default", "namespace": "ml"}}


def secret(name: str, *keys: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1", "kind": "Secret", "metadata": {"name": name, "namespace": "ml"},
        "data": dict.fromkeys(keys, "eA=="),
    }  # fmt: skip


SECRETS = {
    "ledger": secret("ratchet-ledger", "url"),
    "operatorKey": secret("ratchet-operator", "key"),
    "objectStore": secret("ratchet-s3", "access-key-id", "secret-access-key"),
    "kafka": secret("ratchet-kafka", "client"),
    "ingest.splitKey": secret("ratchet-split", "key"),
    "console.oidc": secret("ratchet-oidc", "client_secret"),
    "serving.gcsFaultTolerance": secret("redis", "password", "user"),
}
"""Objects that the values of EVERYTHING name."""


@pytest.mark.parametrize("value", SECRETS)
def test_an_install_does_not_wait_for_a_secret_that_is_not_there(value: str) -> None:
    """The migration's pod would wait silently for ten minutes."""
    missing = SECRETS[value]
    name, key = missing["metadata"]["name"], next(iter(missing["data"]))
    others = [NAMESPACE, *(each for each in SECRETS.values() if each is not missing)]
    with cluster_with(others) as config, pytest.raises(HelmError) as caught:
        render_on(config, EVERYTHING)
    assert f"namespace ml has no Secret {name}, which {value}.existingSecret names" in str(caught.value)
    with cluster_with([*others, secret(name, "other")]) as config, pytest.raises(HelmError) as caught:
        render_on(config, EVERYTHING)
    assert f"Secret {name}, which {value}.existingSecret names, has no key {key}" in str(caught.value)


def test_an_install_goes_on_where_all_secrets_are_there_or_nothing_can_be_asked() -> None:
    for objects in ([NAMESPACE, *SECRETS.values()], []):
        with cluster_with(objects) as config:
            assert render_on(config, EVERYTHING)


def test_the_secrets_of_parts_that_are_off_are_not_asked_for() -> None:
    off = {"ingest": {"enabled": False}, "console": {"enabled": False}}
    needed = [secret for value, secret in SECRETS.items() if value not in ("ingest.splitKey", "console.oidc")]
    with cluster_with([NAMESPACE, *needed]) as config:
        assert render_on(config, EVERYTHING, off)
