"""Metrics: what exists is in :mod:`core.metrics.declared`, the verbs that record it are here, and how Prometheus gets
it is in :mod:`core.metrics.exposition`.

>>> from core import metrics
>>> metrics.gate.decided("clip", "passed", seconds=41.0)
"""

from core.metrics.declared import names
from core.metrics.exposition import NAME_PREFIXES, Process, exposition, listen
from core.metrics.learning import gate, update
from core.metrics.serving import build, catalog, drift, encoder, http, operator, release, rollout, vlm
from core.metrics.stream import dependency, events, ingest, maintain

__all__ = [
    "NAME_PREFIXES", "Process", "build", "catalog", "dependency", "drift", "encoder", "events", "exposition", "gate",
    "http", "ingest", "listen", "maintain", "names", "operator", "release", "rollout", "update", "vlm",
]  # fmt: skip
