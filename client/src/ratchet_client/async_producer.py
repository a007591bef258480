"""The producer for programs that run in an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

from ratchet_client.broker import CONNECT_SECONDS
from ratchet_client.encoding import Encoding
from ratchet_client.producer import DELIVERY_SECONDS, Delivery, Producer, Report
from ratchet_client.records import DEFAULT_LIMITS, TOPIC, Limits, Sample

T = TypeVar("T")
_THREADS = 4
"""Images are decoded on these, and sends wait on them while too many records are in flight: not on the loop's own."""


class AsyncProducer:
    """Sends samples to the topic that ingest reads; options and errors are those of :class:`Producer`.

    >>> async with AsyncProducer("kafka-1:9092") as producer:
    ...     sent = await producer.send(image=data, text="a red boat")  # checked, and on its way
    ...     print(await sent)  # Delivery(topic, partition, offset): the broker has it

    Connects on entering the block. Leaving it waits for all acknowledgements; with no ``on_delivery`` it raises
    BrokerError when a record was not delivered.
    """

    def __init__(
        self,
        bootstrap: str,
        topic: str = TOPIC,
        *,
        options: Mapping[str, Any] | None = None,
        limits: Limits = DEFAULT_LIMITS,
        encoding: Encoding = "raw",
        on_delivery: Report | None = None,
        connect_seconds: float = CONNECT_SECONDS,
        delivery_seconds: float = DELIVERY_SECONDS,
    ) -> None:
        self._connect = partial(
            Producer, bootstrap, topic, options=options, limits=limits, encoding=encoding, on_delivery=on_delivery,
            connect_seconds=connect_seconds, delivery_seconds=delivery_seconds,
        )  # fmt: skip
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="ratchet-producer")
        self._producer: Producer | None = None

    async def __aenter__(self) -> AsyncProducer:
        self._producer = await self._run(self._connect)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                await self.flush()
        finally:
            await self.close()

    async def send(
        self, sample: Sample | None = None, /, *, replaces: str = "", **fields: Any
    ) -> asyncio.Future[Delivery]:
        """Queue one sample, or the fields of one; what is returned holds the delivery, or a BrokerError.

        Args:
            sample: what to send; or its fields by name.
            replaces: the id of a sample that this one corrects, as in :meth:`ratchet_client.Producer.send`.

        Raises:
            RecordError: it is not acceptable.
        """
        sent: Future[Delivery] = await self._run(partial(self._connected.send, sample, replaces=replaces, **fields))
        delivery = asyncio.wrap_future(sent)
        delivery.add_done_callback(_retrieve)
        return delivery

    async def flush(self, timeout: float | None = None) -> None:
        """Wait for the acknowledgement of all that was sent. Raises BrokerError like leaving the block does."""
        await self._run(partial(self._connected.flush, timeout))

    async def close(self) -> None:
        """Let the connection go without waiting for long."""
        producer, self._producer = self._producer, None
        if producer is not None:
            await self._run(producer.close)
        self._threads.shutdown(wait=False)

    @property
    def _connected(self) -> Producer:
        if self._producer is None:
            raise RuntimeError("an AsyncProducer is used in its `async with` block")
        return self._producer

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def _retrieve(delivery: asyncio.Future[Delivery]) -> None:
    """asyncio would warn of errors that no one asked for; leaving the block raises them."""
    if not delivery.cancelled():
        delivery.exception()
