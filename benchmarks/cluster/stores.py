"""The state of an installation: PostgreSQL, an S3 server and Kafka, reachable from pods."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.cluster.network import HOST, NETWORK
from benchmarks.serving.object_store import BUCKET, URL, ObjectStore
from core.addresses import free_port
from core.settings import Settings
from streams.kafka.broker import EmbeddedBroker
from tests.support.postgres import postgres_server

S3_HOST: Final = "object-store"
POSTGRES_HOST: Final = "postgres"
PARTITIONS: Final = 2


@dataclass(frozen=True)
class Stores:
    """Addresses of the stores."""

    ledger: str
    s3: Mapping[str, str]
    kafka: str
    operator_key: str

    @property
    def secrets(self) -> Mapping[str, Mapping[str, str]]:
        return {
            "ratchet-ledger": {"url": self.ledger.replace(str(HOST), POSTGRES_HOST)},
            "ratchet-operator": {"key": self.operator_key},
            "ratchet-s3": {
                "access-key-id": self.s3["AWS_ACCESS_KEY_ID"],
                "secret-access-key": self.s3["AWS_SECRET_ACCESS_KEY"],
            },
        }

    @property
    def values(self) -> dict[str, Any]:
        return {
            "image": {"repository": "localhost/ratchet"},
            "ledger": {"existingSecret": {"name": "ratchet-ledger"}},
            "operatorKey": {"existingSecret": {"name": "ratchet-operator"}},
            "objectStore": {
                "artifacts": URL, "lake": f"s3://{BUCKET}/lake",
                "endpoint": self.s3["AWS_ENDPOINT_URL"].replace(str(HOST), S3_HOST),
                "existingSecret": {"name": "ratchet-s3"},
            },
            "kafka": {"bootstrap": self.kafka},
            "settings": {
                "kafka": {"partitions": PARTITIONS},
                "ingest": {"fresh_eval_share": 0.0},
                "serve": {"cache_bytes": 0},  # the load repeats a few inputs
                "rollout": {"guard_seconds": 0.0},  # which would roll random adapters back
            },
        }  # fmt: skip

    def settings(self, settings: Settings) -> Settings:
        kafka = settings.kafka.model_copy(update={"bootstrap": self.kafka, "partitions": PARTITIONS})
        return settings.model_copy(
            update={
                "ledger_url": self.ledger, "artifacts_url": URL, "lake_url": f"s3://{BUCKET}/lake",
                "kafka": kafka,
            }
        )  # fmt: skip


def start_stores(folder: Path, stack: ExitStack) -> Stores:
    """Start all of them; they end with ``stack``. Raises RatchetError."""
    objects = stack.enter_context(ObjectStore(folder / "s3.log", str(HOST)))
    database = stack.enter_context(postgres_server(str(HOST), str(NETWORK)))
    broker = stack.enter_context(EmbeddedBroker(f"{HOST}:{free_port()}", folder / "kafka.log"))
    return Stores(database.url, objects.environment(relayed=False), broker.address, secrets.token_urlsafe(24))
