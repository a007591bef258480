"""Send samples to a Ratchet installation, and call its server.

>>> with Producer("kafka-1:9092") as producer:
...     producer.send(image=Path("cat.jpg").read_bytes(), text="a cat on a wall").result(timeout=30)
>>> with Client("http://127.0.0.1:8000") as client:
...     client.search("a cat")[0]["text"]

:class:`AsyncProducer` and :class:`AsyncClient` do the same in an event loop. Errors are in
:mod:`ratchet_client.errors`. What a name needs (kafka-python and Pillow, httpx) is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False
"""Type checkers take it for true; to import :mod:`typing` for it would take longer than all else here."""
if TYPE_CHECKING:
    from ratchet_client.async_producer import AsyncProducer as AsyncProducer
    from ratchet_client.calls import data_uri as data_uri
    from ratchet_client.calls import last_answer as last_answer
    from ratchet_client.calls import last_spaces as last_spaces
    from ratchet_client.client import AsyncClient as AsyncClient
    from ratchet_client.client import Client as Client
    from ratchet_client.errors import BrokerError as BrokerError
    from ratchet_client.errors import ConfigError as ConfigError
    from ratchet_client.errors import Conflict as Conflict
    from ratchet_client.errors import Denied as Denied
    from ratchet_client.errors import Outage as Outage
    from ratchet_client.errors import Overloaded as Overloaded
    from ratchet_client.errors import RatchetError as RatchetError
    from ratchet_client.errors import RecordError as RecordError
    from ratchet_client.errors import ServerError as ServerError
    from ratchet_client.errors import TimedOut as TimedOut
    from ratchet_client.errors import Unreachable as Unreachable
    from ratchet_client.producer import Delivery as Delivery
    from ratchet_client.producer import Producer as Producer
    from ratchet_client.records import Limits as Limits
    from ratchet_client.records import Sample as Sample

_MODULES = {
    "AsyncClient": "client",
    "AsyncProducer": "async_producer",
    "BrokerError": "errors",
    "Client": "client",
    "ConfigError": "errors",
    "Conflict": "errors",
    "Delivery": "producer",
    "Denied": "errors",
    "Limits": "records",
    "Outage": "errors",
    "Overloaded": "errors",
    "Producer": "producer",
    "RatchetError": "errors",
    "RecordError": "errors",
    "Sample": "records",
    "ServerError": "errors",
    "TimedOut": "errors",
    "Unreachable": "errors",
    "data_uri": "calls",
    "last_answer": "calls",
    "last_spaces": "calls",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
