"""The broker of these tests."""

from __future__ import annotations

from tests.support.broker import broker

__all__ = ["broker"]
