"""Send pictures with captions, from Python: `python producer.py sample.csv`, with the columns file and text.

The broker is that of ratchet.yaml in this folder, or of RATCHET_KAFKA__BOOTSTRAP.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from ops.errors import BrokerError, RecordError
from ops.loading import load_settings
from streams import Delivery, Producer


def report(outcome: Delivery | BrokerError) -> None:
    """Called for each record, on another thread, when the broker has it, or does not take it."""
    if isinstance(outcome, BrokerError):
        print(f"not delivered: {outcome}", file=sys.stderr)
    else:
        print(f"{outcome.topic}:{outcome.partition}:{outcome.offset} {outcome.sample_id[:12]}")


sample = Path(sys.argv[1])
with Producer(load_settings().kafka, on_delivery=report) as producer, sample.open(newline="") as rows:
    for row in csv.DictReader(rows):
        try:
            producer.send(image=(sample.parent / row["file"]).read_bytes(), text=row["text"], domain="examples")
        except RecordError as error:  # what ingest would refuse is refused here, by the same rules
            print(f"{row['file']}: {error}", file=sys.stderr)
