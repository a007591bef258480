"""Metrics: :mod:`core.metrics.declared` defines them, the functions here record them, and
:mod:`core.metrics.exposition` exports them to Prometheus.

>>> from core import metrics
>>> metrics.gate.decided("clip", "passed", seconds=41.0)
"""

from core.metrics.declared import names
from core.metrics.exposition import NAME_PREFIXES, Process, exposition, listen
from core.metrics.learning import gate, update
from core.metrics.serving import build, catalog, drift, encoder, feedback, http, operator, release, rollout, vlm
from core.metrics.stream import dependency, events, ingest, maintain

__all__ = [
    "NAME_PREFIXES", "Process", "build", "catalog", "dependency", "drift", "encoder", "events", "exposition",
    "feedback", "gate", "http", "ingest", "listen", "maintain", "names", "operator", "release", "rollout", "update",
    "vlm",
]  # fmt: skip
