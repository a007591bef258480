"""Random audits: a share of the answers of ``/v1/classify`` goes to the review of corrections, whatever callers report,
so that the share of wrong ones among them is that of all answers. A thread of its own writes them later, so no answer
waits for the ledger. Only answers to clients are offered: probes and shadow traffic do not pass through the routes."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence
from hashlib import sha256
from typing import Final

from core import metrics
from core.digests import digest12, digest_bytes
from core.errors import FeedbackRefused
from core.ledger import Ledger
from core.ledger.rows import AUDITOR, FeedbackRow
from core.metrics.serving import AuditOutcome
from core.request_context import detached
from serving.http.answer_receipts import AnswerReceipts
from serving.http.errors import ApiError
from serving.http.image_loader import from_data_uri
from serving.own_threads import OwnThreads

log = logging.getLogger("ratchet.http")
MAX_IMAGE_BYTES: Final = 1 << 20
"""Of an image in the ledger."""
RANDOM: Final = random.SystemRandom()
"""No caller can tell which of its answers will be drawn."""
PENDING: Final = 8
"""Audits that are not in the ledger yet, with their images; others are dropped."""


class AnswerAudits:
    """Use from one event loop. ``share``: of the answers, from 0 to 1."""

    def __init__(self, ledger: Ledger, answers: AnswerReceipts, share: float) -> None:
        self.share = share
        self.pending: set[asyncio.Task[None]] = set()
        self._ledger = ledger
        self._answers = answers
        self._threads = OwnThreads("audits")

    def offer(self, receipt: str, images: Sequence[str | bytes], labels: Sequence[str | None]) -> None:
        """Draw whether an answer is audited, and which of its images: a data URI, a URL or bytes. Never waits."""
        if RANDOM.random() >= self.share:
            return
        place = RANDOM.randrange(len(images))
        image = images[place]
        try:
            data = from_data_uri(image, "image", MAX_IMAGE_BYTES) if isinstance(image, str) else image
        except ApiError as error:
            metrics.feedback.audited("too_large" if error.code == "image_too_large" else "url")
            return
        if len(data) > MAX_IMAGE_BYTES:
            metrics.feedback.audited("too_large")
        elif len(self.pending) >= PENDING:
            metrics.feedback.audited("dropped")
        else:
            written = self._write(receipt, data, labels[place])
            task = asyncio.get_running_loop().create_task(written, context=detached())
            self.pending.add(task)
            task.add_done_callback(self.pending.discard)

    async def _write(self, receipt: str, image: bytes, label: str | None) -> None:
        answer = self._answers.read(receipt)
        row = FeedbackRow(
            id=digest_bytes(answer.key.encode(), AUDITOR.encode()), caller=AUDITOR, release=answer.release,
            route=answer.route, input=answer.input, answered_at=answer.at, verdict="audit",
            detail={"answered": label, "image_digest": digest12(sha256(image).hexdigest())}, state="waiting",
            image=image,
        )  # fmt: skip
        try:
            _, new = await self._threads.run(self._ledger.record_feedback, row)
            outcome: AuditOutcome = "recorded" if new else "repeated"
        except FeedbackRefused as error:
            outcome = "full" if error.too_many else "repeated"
        except Exception as error:
            outcome = "failed"
            log.warning("an audited answer was not recorded: %s: %s", type(error).__name__, error)
        metrics.feedback.audited(outcome)
