"""Metrics: what exists is in :mod:`ops.metrics.declared`, the verbs that record it are here, and how Prometheus gets
it is in :mod:`ops.metrics.exposition`.

>>> from ops import metrics
>>> metrics.gate.decided("clip", "passed", seconds=41.0)
"""

from ops.metrics.declared import names
from ops.metrics.exposition import NAME_PREFIXES, Process, exposition, listen
from ops.metrics.learning import gate, update
from ops.metrics.models import catalog, drift, encoder, vlm
from ops.metrics.rollout import rollout
from ops.metrics.serving import build, http, operator, release
from ops.metrics.stream import dependency, events, ingest, maintain

__all__ = [
    "NAME_PREFIXES", "Process", "build", "catalog", "dependency", "drift", "encoder", "events", "exposition", "gate",
    "http", "ingest", "listen", "maintain", "names", "operator", "release", "rollout", "update", "vlm",
]  # fmt: skip
