"""What the chart asks the cluster before it changes anything."""

from __future__ import annotations

from typing import Any

import pytest
from helm_python import HelmError

from tests.support.chart import EVERYTHING
from tests.support.kubernetes_api import cluster_with, render_on


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
"""Every namespace has this one."""


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
"""What the values of EVERYTHING name."""


@pytest.mark.parametrize("value", SECRETS)
def test_an_install_does_not_wait_for_a_secret_that_is_not_there(value: str) -> None:
    """The migration's pod would, for ten minutes and without a word."""
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
