from __future__ import annotations

import asyncio

import pytest

from core.errors import AdapterError
from serving.engines.vlm.adapters import Residents


class Shelf:
    """Residents whose values are their names, with a record of what was made and dropped."""

    def __init__(self, most: int = 2) -> None:
        self.residents: Residents[str] = Residents(most)
        self.made: list[str] = []
        self.dropped: list[str] = []

    async def add(self, name: str) -> None:
        async def make() -> str:
            await asyncio.sleep(0)
            self.made.append(name)
            return name

        await self.residents.add(name, make)

    async def remove(self, name: str) -> None:
        async def drop(value: str) -> None:
            self.dropped.append(value)

        await self.residents.remove(name, drop)


async def test_twice_is_once_even_at_the_same_time() -> None:
    shelf = Shelf()
    await asyncio.gather(shelf.add("a"), shelf.add("a"))
    assert shelf.made == ["a"]
    await shelf.remove("unknown")
    await asyncio.gather(shelf.remove("a"), shelf.remove("a"))
    assert shelf.dropped == ["a"]


async def test_what_is_leaving_takes_no_request_and_goes_with_its_last_one() -> None:
    shelf = Shelf()
    await shelf.add("a")
    with shelf.residents.using("a"), shelf.residents.using("a") as value:
        assert value == "a"
        leaving = asyncio.create_task(shelf.remove("a"))
        await asyncio.sleep(0)
        assert shelf.residents.names() == frozenset()
        with pytest.raises(AdapterError, match="not resident"), shelf.residents.using("a"):
            pass
        assert shelf.dropped == []
    await leaving
    assert shelf.dropped == ["a"]


async def test_what_is_added_again_while_it_leaves_stays() -> None:
    shelf = Shelf()
    await shelf.add("a")
    with shelf.residents.using("a"):
        leaving = asyncio.create_task(shelf.remove("a"))
        await asyncio.sleep(0)
        await shelf.add("a")
        await leaving
    assert shelf.residents.names() == {"a"}
    assert (shelf.made, shelf.dropped) == (["a"], [])


async def test_one_that_still_leaves_takes_its_room() -> None:
    shelf = Shelf(most=2)
    await shelf.add("a")
    await shelf.add("b")
    with shelf.residents.using("a"):
        leaving = asyncio.create_task(shelf.remove("a"))
        await asyncio.sleep(0)
        with pytest.raises(AdapterError, match="no room for c: a, b"):
            await shelf.add("c")
    await leaving
    await shelf.add("c")
    assert shelf.residents.names() == {"b", "c"}


async def test_one_that_cannot_be_made_leaves_nothing() -> None:
    shelf = Shelf(most=1)

    async def make() -> str:
        raise AdapterError("no")

    with pytest.raises(AdapterError, match="no"):
        await shelf.residents.add("a", make)
    await shelf.add("b")
    assert shelf.residents.names() == {"b"}
