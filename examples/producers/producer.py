"""Send pictures with captions: `pip install ./client`, then `python producer.py sample.csv` (columns: file and text).

The broker is that of RATCHET_KAFKA__BOOTSTRAP, or the embedded one of `ratchet up` on this machine.
"""

from __future__ import annotations

import csv
import os
import sys
from pathlib import Path

from ratchet_client import BrokerError, Delivery, Producer, RecordError

BROKER = os.environ.get("RATCHET_KAFKA__BOOTSTRAP", "127.0.0.1:19092")
TOPIC = os.environ.get("RATCHET_KAFKA__TOPIC", "ratchet.samples")


def report(outcome: Delivery | BrokerError) -> None:
    """Called for each record, on another thread, when the broker has it, or does not take it."""
    if isinstance(outcome, BrokerError):
        print(f"not delivered: {outcome}", file=sys.stderr)
    else:
        print(f"{outcome.topic}:{outcome.partition}:{outcome.offset} {outcome.sample_id[:12]}")


sample = Path(sys.argv[1])
with Producer(BROKER, TOPIC, on_delivery=report) as producer, sample.open(newline="") as rows:
    for row in csv.DictReader(rows):
        try:
            producer.send(image=(sample.parent / row["file"]).read_bytes(), text=row["text"], domain="examples")
        except RecordError as error:  # what ingest would refuse is refused here, by the same rules
            print(f"{row['file']}: {error}", file=sys.stderr)
