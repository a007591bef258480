"""Backup of a running installation, and its restore elsewhere. Ledger, artifacts and lake are copied in this order:
everything is stored before the ledger names it, so it can be copied afterwards, and the backup holds the lease of the
collector (:mod:`ops.collection`) so that nothing is deleted. The copied sample store is never older than the ledger; it
records how far the topic was read, so ingest continues from there after a restore."""

from ops.recovery.backup import Report, back_up
from ops.recovery.restoration import restore

__all__ = ["Report", "back_up", "restore"]
