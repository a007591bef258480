"""One server for all serving tests: starting Ray takes 20 s. Tests leave it running, whatever is live."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.serving.house import House


@pytest.fixture(scope="session")
def shared_house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    house = House.make(tmp_path_factory.mktemp("house"))
    house.add_samples(24, domain="cats", source="zoo", year=2023)
    house.add_samples(16, domain="maps", source="atlas", year=2024)
    try:
        yield house
    finally:
        house.stop()


@pytest.fixture
def house(shared_house: House) -> House:
    """The shared server, started again if a test before ended it."""
    if shared_house.process is None or shared_house.process.poll() is not None:
        shared_house.start()
    return shared_house
