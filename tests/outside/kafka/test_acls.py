"""A user with only the rights that docs/deployer/kafka.md names: they are enough, and each is needed."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaAdminClient
from kafka.admin import (
    ACL,
    ACLFilter,
    ACLOperation,
    ACLPermissionType,
    ACLResourcePatternType,
    ResourcePattern,
    ResourcePatternFilter,
    ResourceType,
)

from core.dependencies import current
from core.errors import BrokerError
from core.settings import Settings
from streams.kafka.clients import Admin, check_rights, event_rights, ingest_rights
from streams.store.sample_store import SampleStore
from tests.support.apache_kafka import ApacheKafka
from tests.support.downloads import started
from tests.support.kafka import good, make_topics, produce, quarantined_places, reading, wait_for

pytestmark = pytest.mark.kafka
PAGE = Path(__file__).parents[3] / "docs" / "deployer" / "kafka.md"
EVERYTHING = ResourcePatternFilter(ResourceType.ANY, None, ACLResourcePatternType.ANY)
USER, PASSWORD = "ratchet", "pass-word"
KINDS = {"topic": ResourceType.TOPIC, "group": ResourceType.GROUP, "transactional-id": ResourceType.TRANSACTIONAL_ID}


@pytest.fixture(scope="module")
def kafka() -> Iterator[ApacheKafka]:
    with started("Apache Kafka", lambda: ApacheKafka({USER: PASSWORD})) as running:
        yield running


def documented() -> list[list[ACL]]:
    found = []
    for line in re.findall(r"^acls (--operation .*)$", PAGE.read_text(), re.M):
        words = shlex.split(line)
        pairs = list(zip(words[::2], words[1::2], strict=True))
        kind, name = next((KINDS[flag[2:]], value) for flag, value in pairs if flag[2:] in KINDS)
        how = dict(pairs).get("--resource-pattern-type", "literal")
        pattern = ResourcePattern(kind, name, ACLResourcePatternType[how.upper()])
        found.append([_acl(value, pattern) for flag, value in pairs if flag == "--operation"])
    return found


def _acl(operation: str, pattern: ResourcePattern) -> ACL:
    return ACL(f"User:{USER}", "*", ACLOperation[operation.upper()], ACLPermissionType.ALLOW, pattern)


@pytest.fixture
def settings(kafka: ApacheKafka, tmp_path: Path) -> Iterator[Settings]:
    client = {"security_protocol": "SASL_PLAINTEXT", "sasl_mechanism": "PLAIN", "sasl_plain_username": USER,
              "sasl_plain_password": PASSWORD}  # fmt: skip
    own = {"bootstrap": kafka.sasl_address, "batch_seconds": 0.2, "client": client}
    made = Settings.model_validate({"home": tmp_path, "kafka": own, "ingest": {"processes": 1}})
    make_topics(at(kafka, made))
    yield made
    with_admin(kafka, "delete_acls", [ACLFilter(None, None, ACLOperation.ANY, ACLPermissionType.ANY, EVERYTHING)])


def at(kafka: ApacheKafka, settings: Settings) -> Settings:
    own = settings.kafka.model_copy(update={"bootstrap": kafka.address, "client": {}})
    return settings.model_copy(update={"kafka": own})


def with_admin(kafka: ApacheKafka, call: str, acls: Iterable[Any]) -> None:
    client = KafkaAdminClient(bootstrap_servers=kafka.address)
    try:
        getattr(client, call)(list(acls))
    finally:
        client.close()


def missing(settings: Settings) -> str:
    """Missing rights of this user according to doctor; empty if they are enough."""
    admin = Admin(settings.kafka, 30.0)
    try:
        check_rights(admin, [*ingest_rights(settings.kafka), *event_rights(settings.kafka)])
    except BrokerError as error:
        assert error.state == "refused"
        return error.message
    finally:
        admin.close()
    return ""


def test_the_documented_rights_are_enough_to_read_store_and_refuse(kafka: ApacheKafka, settings: Settings) -> None:
    with_admin(kafka, "create_acls", chain(*documented()))
    wait_for(lambda: not missing(settings), "the rights")
    everybody = at(kafka, settings)
    produce(everybody.kafka, [good(0), (b"no picture", []), good(1)])
    with reading(settings) as ingest:
        wait_for(lambda: ingest.status.samples == 2 and ingest.status.quarantined == 1, "three records")
    assert SampleStore(settings.lake).count() == 2
    assert len(quarantined_places(everybody.kafka, 1)) == 1


@pytest.mark.parametrize("left_out", range(len(documented())))
def test_only_a_resource_without_its_rights_is_named(kafka: ApacheKafka, settings: Settings, left_out: int) -> None:
    lines = documented()
    gone = lines.pop(left_out)[0].resource_pattern
    with_admin(kafka, "create_acls", chain(*lines))
    wait_for(lambda: missing(settings).count(" on ") == 1, "all rights but one")
    kind = gone.resource_type.name.lower().replace("_", " ")
    assert f" on {kind} {gone.resource_name}" in missing(settings)


def test_writing_to_the_quarantine_topic_is_named_apart_from_reading(kafka: ApacheKafka, settings: Settings) -> None:
    gone = (ACLOperation.WRITE, settings.kafka.quarantine_topic)
    acls = [each for each in chain(*documented()) if (each.operation, each.resource_pattern.resource_name) != gone]
    with_admin(kafka, "create_acls", acls)
    told = f"does not allow Write on topic {settings.kafka.quarantine_topic}."
    wait_for(lambda: told in missing(settings), told)


def test_ingest_without_rights_says_which_and_goes_on_when_it_gets_them(kafka: ApacheKafka, settings: Settings) -> None:
    produce(at(kafka, settings).kafka, [good(7)])
    with reading(settings) as ingest:
        wait_for(lambda: (noted := current().get("broker")) is not None and noted.state == "refused", "the refusal")
        assert f"topic {settings.kafka.topic}" in current()["broker"].detail
        with_admin(kafka, "create_acls", chain(*documented()))
        wait_for(lambda: ingest.status.samples + ingest.status.duplicates >= 1, "the record")
