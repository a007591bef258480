"""Garbage collection of adapters, their carry-over, gate reports and local caches.

:mod:`ops.collection.plan` says what may still be needed and by what, and what follows for each file;
:mod:`ops.collection.collector` deletes; :mod:`core.ledger.collection` remembers it.
"""

from ops.collection.collector import Collector
from ops.collection.plan import CollectionPlan, Item

__all__ = ["CollectionPlan", "Collector", "Item"]
