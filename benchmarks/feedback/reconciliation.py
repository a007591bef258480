"""Accounts for reports: each acknowledged one is in the ledger, and each published correction is one sample."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks.feedback.callers import Question
from core.ledger import Ledger
from core.ledger.rows import AUDITOR, FeedbackRow
from ratchet_client.records import make_sample
from streams.kafka.corrections import DOMAIN
from streams.records.signatures import AUDIT, FEEDBACK
from streams.store.sample_store import SampleStore

ALL: Final = 10**6


@dataclass(frozen=True)
class Accounts:
    acknowledged: int
    stored: int
    """Of these, in the ledger."""
    published: int
    """Different samples of the corrections and audits that were sent."""
    samples: int
    """Of these, in the store."""
    lost: int
    double: int
    unacknowledged: int
    """Reports in the ledger whose acknowledgement no caller got."""


def sample_id(row: FeedbackRow, images: Mapping[str, bytes]) -> str:
    """ID of the sample that a published correction became. ``images``: by digest."""
    label, image = row.detail["label"], images[row.detail["image_digest"]]
    source = AUDIT if row.caller == AUDITOR else f"{FEEDBACK}{row.caller}"
    return make_sample({"image": image, "text": label, "label": label, "domain": DOMAIN, "source": source}).id


def published(ledger: Ledger, questions: Sequence[Question], callers: Collection[str] = ()) -> set[str]:
    """IDs of the samples that all corrections became, or those of some callers that are wrong."""
    images = {question.digest: question.image for question in questions}
    truths = {question.digest: question.truth for question in questions}
    rows = [row for row in ledger.feedback(ALL) if row.state == "published"]
    if callers:
        wrong = (row for row in rows if row.detail["label"] != truths[row.detail["image_digest"]])
        rows = [row for row in wrong if row.caller in callers]
    return {sample_id(row, images) for row in rows}


def stored(store: SampleStore) -> Counter[str]:
    """Samples of corrections and audits by ID."""
    rows = store.select(f"kind = 'sample' AND domain = '{DOMAIN}'", ["id"])
    return Counter(row["id"] for row in rows)


def reconcile(
    ledger: Ledger, store: SampleStore, questions: Sequence[Question], acknowledged: Collection[str]
) -> Accounts:
    rows = {row.id for row in ledger.feedback(ALL) if row.caller != AUDITOR}
    sent, there = published(ledger, questions), stored(store)
    missing = set(acknowledged) - rows
    return Accounts(
        acknowledged=len(acknowledged), stored=len(acknowledged) - len(missing), published=len(sent),
        samples=len(sent & there.keys()), lost=len(missing) + len(sent - there.keys()),
        double=sum(count - 1 for count in there.values()), unacknowledged=len(rows - set(acknowledged)),
    )  # fmt: skip
