"""Backup of a running installation, and its restore elsewhere.

A backup has the ledger, the artifacts and the lake, in this order: what the ledger names is stored before the ledger
names it, so all of it is there to be copied afterwards, and the collector (:mod:`ops.collection`) is kept from
deleting it by its lease. The sample store is younger than the ledger, never older; it holds how far the topic was read,
so ingest goes on after a restore where it was.
"""

from ops.recovery.backup import Report, back_up
from ops.recovery.restoration import restore

__all__ = ["Report", "back_up", "restore"]
