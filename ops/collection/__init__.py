"""Garbage collection of adapters, their carry-over, gate reports and local caches.

:mod:`ops.collection.keep` says which adapters may still be needed and by what, :mod:`ops.collection.plan` what follows
for each file, and :mod:`ops.collection.collector` deletes. :mod:`core.ledger.collection` remembers it.
"""

from ops.collection.collector import Collector
from ops.collection.plan import Item, Plan, make_plan

__all__ = ["Collector", "Item", "Plan", "make_plan"]
