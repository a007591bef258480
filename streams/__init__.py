"""From a producer to the sample store: records, Kafka, quality checks and one atomic commit per batch.

>>> from streams import Producer
>>> with Producer(settings.kafka) as producer:
...     producer.send(image=Path("cat.jpg").read_bytes(), text="a cat on a wall").result(timeout=30)
"""

from __future__ import annotations

from streams.producer import Delivery, Producer
from streams.records import Sample

__all__ = ["Delivery", "Producer", "Sample"]
