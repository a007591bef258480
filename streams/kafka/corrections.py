"""Accepted corrections become records of the stream, with the source ``feedback:CALLER``, or ``audit`` if their answer
was drawn at random, and from there samples like any others. One that is sent twice, because its process died before it
noted the first time, is a duplicate for ingest."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import Final

from core.errors import RecordError
from core.ledger import Ledger
from core.ledger.rows import AUDITOR
from core.settings import Settings
from ratchet_client.encoding import encode
from ratchet_client.producer import check_sample
from ratchet_client.records import make_sample
from streams.kafka.clients import deliver, producer_limits, record_sender
from streams.records.signatures import FEEDBACK, HEADER, sign

DOMAIN: Final = "feedback"
AT_ONCE: Final = 20


def publish_corrections(settings: Settings, ledger: Ledger, secret: Callable[[], bytes]) -> int:
    """Send some accepted corrections, and wait for the broker. Returns their number. ``secret``: of the sample store,
    to sign their sources. Raises BrokerError: the others are sent the next time."""
    rows = ledger.corrections("accepted", AT_ONCE, images=True)
    if not rows:
        return 0
    limits, key = producer_limits(settings.ingest), secret()
    with closing(record_sender(settings.kafka)) as sender:
        for row in rows:
            label, text = row.detail.get("label", ""), row.detail.get("text", "")
            source = AUDITOR if row.caller == AUDITOR else f"{FEEDBACK}{row.caller}"
            fields = {"image": row.image, "text": text or label, "label": label, "domain": DOMAIN, "source": source}
            try:
                sample = make_sample(fields)
                check_sample(sample, limits)
            except RecordError as error:
                ledger.settle_correction(row.id, "dismissed", error.message)
                continue
            record = encode(sample)
            headers = [*record.headers, (HEADER, sign(key, sample.id, source))]
            place = deliver(sender, settings.kafka.topic, replace(record, headers=headers))
            ledger.settle_correction(row.id, "published", f"{place.topic}:{place.partition}:{place.offset}")
    return len(rows)
