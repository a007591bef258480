"""The S3 server of the tests: moto's, or the one of RATCHET_TEST_S3 (``minio``)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import boto3
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem

from tests.support.downloads import started
from tests.support.environment import of_s3, variables
from tests.support.minio import MinIO


class Moto:
    """Supports bucket policies, but no users."""

    @contextmanager
    def without(self, *actions: str) -> Iterator[None]:
        """Inside, this process may do everything in its buckets but these actions."""
        client = boto3.client("s3")
        names = [each["Name"] for each in client.list_buckets()["Buckets"]]
        for name in names:
            rule: dict[str, Any] = {"Effect": "Deny", "Principal": "*", "Action": list(actions)}
            rule["Resource"] = [f"arn:aws:s3:::{name}", f"arn:aws:s3:::{name}/*"]
            client.put_bucket_policy(Bucket=name, Policy=json.dumps({"Version": "2012-10-17", "Statement": [rule]}))
        try:
            yield
        finally:
            for name in names:
                client.delete_bucket_policy(Bucket=name)


@contextmanager
def s3_server() -> Iterator[Moto | MinIO]:
    """An S3 server with its address and keys in this process's environment."""
    if os.environ.get("RATCHET_TEST_S3") == "minio":
        with started("MinIO", MinIO) as minio:
            yield minio
    else:
        running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        running.start()
        host, port = running.get_host_and_port()
        with variables(of_s3(f"http://{host}:{port}", "key", "moto-secret")):
            yield Moto()
        running.stop()
    S3FileSystem.clear_instance_cache()
