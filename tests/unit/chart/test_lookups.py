"""What the chart asks the cluster before it changes anything."""

from __future__ import annotations

from typing import Any

import pytest
from helm_python import HelmError

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
