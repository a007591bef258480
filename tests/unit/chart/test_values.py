from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from helm_python import HelmError

from tests.support.chart import EVERYTHING, NEEDED, PROFILES, ROOT, chart, merged, profile, render
from tests.support.kubernetes_api import cluster_with, render_on

WRONG: list[tuple[Any, list[str]]] = [
    ({"ledger": {"url": "postgresql://me:secret@db/x"}}, ["/ledger", "url"]),
    ({"settings": {"ingest": {"split_key": "k"}}}, ["/settings/ingest", "split_key"]),
    ({"settings": {"gate": {"alpha": 0.7}}}, ["/settings/gate/alpha", "0.5"]),
    ({"settings": {"serve": {"port": 9000}}}, ["/settings/serve", "port"]),
    ({"objectStore": {"lake": "/var/lake"}}, ["/objectStore/lake", "s3|gs|az"]),
    ({"updater": {"replicas": 2}}, ["/updater", "replicas"]),
    ({"maintain": {"replicas": 2}}, ["/maintain", "replicas"]),
    ({"ingest": {"storage": {"existingClaim": "x"}}}, ["/ingest/storage"]),  # its pods would share the index
    ({"serving": {"workers": {"replicas": 0}}}, ["/serving/workers/replicas", "minimum"]),
    ({"networkPolicy": {"ingress": {"controller": []}}}, ["/networkPolicy/ingress/controller"]),  # anybody
    ({"networkPolicy": {"ingress": {"clients": [{}]}}}, ["/networkPolicy/ingress/clients/0"]),
    ({"extraEnv": [{"name": "REDIS_PASSWORD", "value": "x"}]}, ["/extraEnv/0/name"]),  # KubeRay refuses it
]


@pytest.mark.parametrize(("wrong", "names"), WRONG, ids=[json.dumps(wrong)[:60] for wrong, _ in WRONG])
def test_a_wrong_value_is_refused_by_name(wrong: Any, names: list[str]) -> None:
    with pytest.raises(HelmError) as caught:
        chart().render(merged(NEEDED, wrong), name="live")
    for name in names:
        assert name in str(caught.value)


def test_workers_have_room_for_the_replicas_by_their_number_or_their_cpus() -> None:
    small = {"replicas": 1, "resources": {"requests": {"cpu": "200m"}}}
    settings = {"base": {"vlm": ""}, "serve": {"ingress_replicas": 2}}
    with pytest.raises(HelmError, match=r"serving\.workers has no room.*1\.2 CPUs.*1 worker\(s\) have 1 each"):
        render({"settings": settings, "serving": {"workers": small}})
    for workers in (
        {"replicas": 2},
        {"replicas": 1, "maxReplicas": 2},
        {"replicas": 1, "resources": {"limits": {"cpu": "1100m"}}},
        {"replicas": 1, "resources": {"requests": {"cpu": 2}}},
    ):
        assert render({"settings": settings, "serving": {"workers": merged(small, workers)}}), workers


@pytest.mark.parametrize("name", ["ratchet", "team/ratchet", ""])
def test_an_image_without_a_registry_is_refused_since_it_would_come_from_docker_hub(name: str) -> None:
    with pytest.raises(HelmError, match=rf'image\.repository is "{name}", which names no registry.*docker\.io/OWNER'):
        render({"image": {"repository": name}})
    for named in ("docker.io/team/ratchet", "localhost/ratchet", "registry:5000/ratchet"):
        assert render({"image": {"repository": named}})


def test_a_store_whose_client_the_image_lacks_is_refused_by_the_name_of_the_package() -> None:
    with pytest.raises(HelmError, match=r"objectStore\.lake: az:// needs the package adlfs, which .* do not have"):
        render({"objectStore": {"lake": "az://container/lake"}})


def test_keda_needs_the_credentials_that_it_is_told_to_use() -> None:
    def asked(keda: Any, **kafka: Any) -> str:
        with pytest.raises(HelmError) as caught:
            render({"ingest": {"keda": {"enabled": True, **keda}}, **kafka})
        return str(caught.value)

    assert "need kafka.existingSecret.name" in asked({"tls": "enable"})
    secret_named = {"kafka": {"existingSecret": {"name": "ratchet-kafka"}}}
    assert "settings.kafka.oauth.token_url and .client_id" in asked({"sasl": "oauthbearer"}, **secret_named)


@pytest.mark.parametrize("missing", NEEDED)
def test_what_every_installation_has_to_say_is_asked_for(missing: str) -> None:
    with pytest.raises(HelmError, match=f"/{missing}|{missing}.repository"):
        chart().render({name: value for name, value in NEEDED.items() if name != missing}, name="live")


def test_the_example_of_the_install_page_is_a_valid_one_and_refusals_read_as_it_says() -> None:
    page = (ROOT / "docs" / "deployer" / "install.md").read_text()
    example = yaml.safe_load(page.partition("```yaml\n")[2].partition("```")[0])
    assert example.keys() >= NEEDED.keys()
    for name in PROFILES:
        said = {key for key, value in profile(name).items() if value.keys() & NEEDED.get(key, {}).keys()}
        assert not said, "an installation has to say it"
        assert chart().render(merged(profile(name), example), name="ratchet")
    with pytest.raises(HelmError) as caught:
        chart().render(merged(example, {"serving": {"workers": {"replicas": 0}}}), name="ratchet")
    shown = page.partition("names the value (`")[2].partition("`")[0]
    assert shown in str(caught.value)


# What the chart asks the cluster before it changes anything


def test_what_is_still_being_deleted_is_not_taken_over_and_what_runs_is_upgraded() -> None:
    """Helm would adopt it and say "deployed"; a minute later it is gone."""
    training = {"updater": {"workers": {"enabled": True}, "storage": {"existingClaim": "updates"}}}
    for kind, name in (("RayService", "live-ratchet"), ("RayCluster", "live-ratchet-training")):
        running = {"apiVersion": "ray.io/v1", "kind": kind, "metadata": {"name": name, "namespace": "ml"}}
        dying = merged(running, {"metadata": {"deletionTimestamp": "2026-11-30T08:00:00Z"}})
        with cluster_with([dying]) as config, pytest.raises(HelmError) as caught:
            render_on(config, training)
        assert f"{kind} {name} of an earlier installation is still being deleted" in str(caught.value)
        assert f"kubectl -n ml wait --for=delete {kind.lower()}/{name} --timeout=10m" in str(caught.value)
        with cluster_with([running]) as config:
            assert render_on(config, training, is_upgrade=True)


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


def test_an_install_goes_on_where_all_needed_secrets_are_there_or_nothing_can_be_asked() -> None:
    off = {"ingest": {"enabled": False}, "console": {"enabled": False}}
    needed = [secret for value, secret in SECRETS.items() if value not in ("ingest.splitKey", "console.oidc")]
    for objects, values in (([NAMESPACE, *SECRETS.values()], {}), ([], {}), ([NAMESPACE, *needed], off)):
        with cluster_with(objects) as config:
            assert render_on(config, EVERYTHING, values)
