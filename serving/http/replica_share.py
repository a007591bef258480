"""What one of several ingress processes may take of what all requests share."""

from __future__ import annotations

from core.settings.serving import Serve

SHARED = ("queue", "operator_queue", "decode_pixels", "image_fetches", "vlm_queue", "cache_bytes")


def share_of(settings: Serve) -> Serve:
    """The bounds of one ingress process: what all requests share, divided by ``ingress_replicas``; those of one request
    as they are. Processes beyond that number, started by load, bring a share of their own.

    >>> share_of(Serve(ingress_replicas=2, queue=256)).queue
    128
    """
    replicas = settings.ingress_replicas
    shares = {name: -(-getattr(settings, name) // replicas) for name in SHARED}
    # What is alone must always find room.
    bodies = max(settings.max_body_bytes, settings.body_budget_bytes // replicas)
    return settings.model_copy(update={**shares, "body_budget_bytes": bodies})
