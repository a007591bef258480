"""Garbage collection of adapters, carry-over, gate reports and local caches. :mod:`ops.collection.plan` decides what is
still needed, :mod:`ops.collection.collector` deletes, and :mod:`core.ledger.collection` records it."""

from ops.collection.collector import Collector
from ops.collection.plan import CollectionPlan, Item

__all__ = ["CollectionPlan", "Collector", "Item"]
