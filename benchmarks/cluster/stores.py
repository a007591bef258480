"""The state that an installation is given: PostgreSQL, an S3 server and Kafka, where pods can reach them."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import boto3
import httpx

from benchmarks.cluster.network import HOST, NETWORK
from ops.addresses import free_port
from ops.errors import RatchetError
from ops.settings import Settings
from ops.testing.postgres import postgres_server
from ops.waiting import wait_until
from streams.broker import EmbeddedBroker

BUCKET: Final = "models"
START_SECONDS: Final = 60.0
S3_HOST: Final = "object-store"
POSTGRES_HOST: Final = "postgres"
PARTITIONS: Final = 2


@dataclass(frozen=True)
class Stores:
    """Where they are."""

    ledger: str
    s3: str
    kafka: str
    operator_key: str

    @property
    def secrets(self) -> Mapping[str, Mapping[str, str]]:
        """As docs/deployer.md has them made."""
        return {
            "ratchet-ledger": {"url": self.ledger.replace(str(HOST), POSTGRES_HOST)},
            "ratchet-operator": {"key": self.operator_key},
            "ratchet-s3": {"access-key-id": "key", "secret-access-key": "secret"},
        }

    @property
    def values(self) -> dict[str, Any]:
        """What an installation has to say, and what a load of random adapters needs."""
        return {
            "ledger": {"existingSecret": {"name": "ratchet-ledger"}},
            "operatorKey": {"existingSecret": {"name": "ratchet-operator"}},
            "objectStore": {
                "artifacts": f"s3://{BUCKET}/ratchet", "lake": f"s3://{BUCKET}/lake",
                "endpoint": self.s3.replace(str(HOST), S3_HOST), "existingSecret": {"name": "ratchet-s3"},
            },
            "kafka": {"bootstrap": self.kafka},
            "settings": {
                "kafka": {"partitions": PARTITIONS},
                "ingest": {"fresh_eval_share": 0.0},
                "serve": {"cache_bytes": 0},  # the load repeats a few inputs
                "rollout": {"guard_seconds": 0.0},  # which would take random adapters back
            },
        }  # fmt: skip

    def settings(self, settings: Settings) -> Settings:
        """The installation, as this process reaches it."""
        kafka = settings.kafka.model_copy(update={"bootstrap": self.kafka, "partitions": PARTITIONS})
        return settings.model_copy(
            update={
                "ledger_url": self.ledger, "artifacts_url": f"s3://{BUCKET}/ratchet", "lake_url": f"s3://{BUCKET}/lake",
                "kafka": kafka,
            }
        )  # fmt: skip


def start_stores(folder: Path, stack: ExitStack) -> Stores:
    """Start all of them; they end with ``stack``. Raises RatchetError."""
    port = free_port()
    s3 = f"http://{HOST}:{port}"
    with (folder / "s3.log").open("w") as log:
        command = [str(Path(sys.executable).with_name("moto_server")), "-H", str(HOST), "-p", str(port)]
        server = stack.enter_context(subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL))
    stack.callback(server.kill)
    os.environ.update(
        AWS_ENDPOINT_URL=s3, AWS_ALLOW_HTTP="true", AWS_REGION="us-east-1", AWS_DEFAULT_REGION="us-east-1",
        AWS_ACCESS_KEY_ID="key", AWS_SECRET_ACCESS_KEY="secret",  # noqa: S106
    )  # fmt: skip
    database = stack.enter_context(postgres_server(str(HOST), str(NETWORK)))
    broker = stack.enter_context(EmbeddedBroker(f"{HOST}:{free_port()}", folder / "kafka.log"))
    if not wait_until(lambda: _answers(s3), START_SECONDS, alive=lambda: server.poll() is None):
        raise RatchetError("the S3 server does not start.", f"See {folder / 's3.log'}.")
    boto3.client("s3").create_bucket(Bucket=BUCKET)
    return Stores(database.url, s3, broker.address, secrets.token_urlsafe(24))


def _answers(url: str) -> bool:
    try:
        return bool(httpx.get(url, timeout=5, trust_env=False).status_code)
    except httpx.HTTPError:
        return False
