"""Settings of incoming and stored data: broker, ingest, maintenance, retention, garbage collection."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from typing import Final

from pydantic import Field, SecretStr, field_validator

from core.addresses import NetworkRule, UriRule
from core.settings.identity import OAuth
from core.settings.section import Section, http_url
from ratchet_client.records import DEFAULT_LIMITS, TOPIC

OWNED_OPTIONS: Final[Mapping[str, str]] = {
    "acks": "a record counts as sent when all replicas have it",
    "allow_auto_create_topics": "a topic that is lost must not come back empty, with other settings",
    "auto_offset_reset": "the sample store knows where to go on",
    "bootstrap_servers": "set `kafka.bootstrap`",
    "check_crcs": "damaged records go to quarantine",
    "enable_auto_commit": "offsets are committed after what they stand for is stored",
    "enable_idempotence": "a retry must not send a record twice",
    "fetch_max_bytes": "it follows from the bytes of one commit",
    "group_id": "set `kafka.group`",
    "isolation_level": "records of aborted transactions do not count",
    "key_deserializer": "records are decoded by ingest",
    "key_serializer": "records are encoded by Ratchet",
    "max_partition_fetch_bytes": "it follows from the bytes of one commit",
    "transaction_timeout_ms": "older senders are fenced off in a known time",
    "transactional_id": "each partition has its own, which fences older senders",
    "value_deserializer": "records are decoded by ingest",
    "value_serializer": "records are encoded by Ratchet",
}
"""Options of kafka-python that `kafka.client` cannot set, because exactly-once delivery depends on them or because they
have their own setting; each with its reason."""


class BoundTopic(Section):
    """A topic whose records are of one source, whatever their headers say: the broker's ACLs tell who writes to it."""

    name: str = Field(min_length=1, max_length=249, description="Name of the topic.")
    source: str = Field(min_length=1, max_length=256, description="Source of its samples.")


class Kafka(Section):
    """The broker and the topics."""

    bootstrap: str = Field("127.0.0.1:19092", description="host:port of one or more brokers, comma separated.")
    topic: str = Field(TOPIC, description="Topic that producers write to.")
    topics: list[BoundTopic] = Field(
        default_factory=list,
        max_length=64,
        description="Further topics, each bound to one source. `ratchet ingest --topic NAME` reads one of them.",
    )
    quarantine_topic: str = Field("ratchet.quarantine", description="Topic for quarantined records.")
    events_topic: str = Field("ratchet.events", description="Topic for events, such as releases; empty: off.")
    events_source: str = Field(
        "urn:ratchet", min_length=1, max_length=200, description="CloudEvents `source` of this installation."
    )
    group: str = Field("ratchet-ingest", description="Consumer group of ingest.")
    partitions: int = Field(2, ge=1, le=1024, description="Partitions of the topic, if Ratchet creates it.")
    batch_records: int = Field(512, ge=1, le=100_000, description="Maximum records per commit.")
    batch_seconds: float = Field(2.0, gt=0, description="Maximum time before a smaller batch is committed.")
    client: dict[str, str] = Field(default_factory=dict, description="Extra kafka-python options (SASL, TLS).")
    oauth: OAuth = Field(default_factory=OAuth)
    schema_registry: str = Field("", description="URL of a Confluent-compatible schema registry; empty: none.")
    schema_registry_auth: SecretStr | None = Field(None, description="user:password for the schema registry.")

    _url = field_validator("schema_registry")(http_url)

    def reading(self, topic: str) -> Kafka:
        """These settings for an ingest process that reads another topic. Raises KeyError if it is not bound."""
        if topic == self.topic:
            return self
        if topic not in self.bound:
            raise KeyError(topic)
        return self.model_copy(update={"topic": topic, "group": f"{self.group}.{topic}"})

    @property
    def bound(self) -> dict[str, str]:
        """Sources by topic."""
        return {each.name: each.source for each in self.topics}

    @field_validator("topics")
    @classmethod
    def _distinct(cls, value: list[BoundTopic]) -> list[BoundTopic]:
        for what, names in (("name", [each.name for each in value]), ("source", [each.source for each in value])):
            if len(names) != len(set(names)):
                raise ValueError(f"each topic needs a {what} of its own")
        return value

    @field_validator("client")
    @classmethod
    def _only_free_options(cls, value: dict[str, str]) -> dict[str, str]:
        if owned := sorted(value.keys() & OWNED_OPTIONS.keys()):
            reasons = "; ".join(f"{name}: {OWNED_OPTIONS[name]}" for name in owned)
            raise ValueError(f"Ratchet owns some of these options ({reasons})")
        return value

    @field_validator("schema_registry_auth")
    @classmethod
    def _user_and_password(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and ":" not in value.get_secret_value():
            raise ValueError("give user:password")
        return value


class Ingest(Section):
    """Requirements for records, and the ingest process."""

    max_image_bytes: int = Field(
        DEFAULT_LIMITS.max_image_bytes, ge=1024, description="Maximum size of an encoded image."
    )
    max_pixels: int = Field(DEFAULT_LIMITS.max_pixels, ge=1, description="Maximum size of an image, in pixels.")
    min_side: int = Field(DEFAULT_LIMITS.min_side, ge=1, description="Minimum side of an image, in pixels.")
    fresh_eval_share: float = Field(
        0.2, ge=0, lt=1, description="Share of samples that are held out of training, for the gate."
    )
    near_duplicate_distance: int = Field(
        -1,
        ge=-1,
        le=16,
        description="Maximum differing bits in the perceptual hashes of near duplicates; -1: do not detect them.",
    )
    split_key: SecretStr | None = Field(
        None, description="Secret of the split into train and fresh_eval; default: generated with the store."
    )
    processes: int = Field(0, ge=0, le=256, description="Validation processes; 0: one per core.")
    allowed_uris: list[UriRule] = Field(default_factory=list, description="Prefixes of image URIs that may be fetched.")
    allowed_networks: list[NetworkRule] = Field(
        default_factory=list, description="Private networks that URIs may resolve to."
    )
    metrics_port: int = Field(9464, ge=0, le=65535, description="Prometheus port of ingest; 0: off.")

    @property
    def own_split_key(self) -> bytes | None:
        """Key of 32 bytes from ``split_key``; None if the store's generated one is used."""
        return None if self.split_key is None else sha256(self.split_key.get_secret_value().encode()).digest()


class Maintain(Section):
    """Maintenance of the sample store: compaction, deletions and events (`ratchet maintain`)."""

    seconds: float = Field(30.0, gt=0, le=86_400, description="Interval between maintenance runs.")
    metrics_port: int = Field(9466, ge=0, le=65535, description="Prometheus port of maintenance; 0: off.")
    keep_seconds: float = Field(
        3600.0, ge=0, description="Lifetime of sample store versions, except those that an update is pinned to."
    )


class Retention(Section):
    """Retention of samples and quarantined records. Without limits they are kept until they are deleted."""

    max_age_days: float = Field(0, ge=0, description="Maximum age of samples and quarantined records; 0: no limit.")
    max_bytes: int = Field(
        0, ge=0, description="Maximum size of samples and quarantined records, the oldest go first; 0: no limit."
    )
    keep_samples: int = Field(
        50_000, ge=0, description="Samples over a limit that are kept for replay, balanced over concepts."
    )


class Collection(Section):
    """Garbage collection of adapters, carry-overs, gate reports and caches: `ratchet admin gc`, and maintenance."""

    hours: float = Field(
        24.0, ge=0, description="Interval of automatic garbage collection; 0: only by `ratchet admin gc`."
    )
    keep_releases: int = Field(
        20, ge=2, le=10_000, description="Newest releases of each base whose adapters are kept regardless of age."
    )
    keep_days: float = Field(
        90.0,
        ge=1,
        description="Adapters and local caches are kept for this long after their last use, counted back "
        "from the newest entry of the ledger.",
    )
    keep_adapters: list[str] = Field(default_factory=list, description="Adapters to keep forever.")
