"""A cluster that has KubeRay, and the chart as release ``ratchet`` in the namespace ``ml``.

It is set up on this machine (:mod:`tests.outside.kubernetes.cluster`), or is the one of ``KUBECONFIG`` if
``OUTSIDE_VALUES`` names the values of its release; that one needs a pod ``client`` with Python, which may call the
model server, and a user ann who may install. The tests change and reinstall the release.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.outside.kubernetes.cluster import Cluster, found_cluster, new_cluster
from tests.support.downloads import NotHere


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    values = os.environ.get("OUTSIDE_VALUES", "")
    try:
        if values:
            yield found_cluster(Path(values))
        else:
            with new_cluster() as made:
                yield made
    except NotHere as error:
        pytest.skip(f"Kubernetes was left out: {error}")
