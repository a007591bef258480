"""The broker of these tests, and what their processes import."""

from __future__ import annotations

from tests.support.broker import broker
from tests.support.forked import import_ahead

import_ahead("tests.support.mortal_ingest", "tests.support.stopping_ingest", "tests.support.mortal_publisher")
__all__ = ["broker"]
