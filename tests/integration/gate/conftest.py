"""Fixtures of the gate's tests."""

from tests.support.sealing import nothing_sealed as nothing_sealed
from tests.support.sealing import sealed as sealed
