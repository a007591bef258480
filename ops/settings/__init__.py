"""All settings, typed and in one place. :mod:`ops.loading` reads them, and knows where each value came from."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr, field_validator

from ops.addresses import is_loopback, local_url
from ops.allow_rules import HostRule, NetworkRule, UriRule
from ops.head_settings import MAX_HEADS, LearnedHead
from ops.identity_settings import OAuth, Oidc
from ops.section import Section, http_url

MIB = 1024 * 1024
Draw = Literal["uniform", "newest"]
"""How an update draws from what is pending."""


class BaseModels(Section):
    """Which frozen checkpoints are served."""

    clip: str = Field("shipped", description="Name of a registered CLIP base (`ratchet base list`).")
    vlm: str = Field("shipped-vlm", description="Name of a registered VLM base; empty: no VLM is served.")


class Kafka(Section):
    """The broker and the topics."""

    bootstrap: str = Field("127.0.0.1:19092", description="host:port of one or more brokers, comma separated.")
    topic: str = Field("ratchet.samples", description="Topic that producers write to.")
    quarantine_topic: str = Field("ratchet.quarantine", description="Topic for records that were refused.")
    events_topic: str = Field("ratchet.events", description="Topic that tells of releases and more; empty is off.")
    events_source: str = Field(
        "urn:ratchet", min_length=1, max_length=200, description="CloudEvents `source`: names this installation."
    )
    group: str = Field("ratchet-ingest", description="Consumer group of ingest.")
    partitions: int = Field(2, ge=1, le=1024, description="Partitions when Ratchet creates the topic.")
    isolation_level: Literal["read_committed", "read_uncommitted"] = Field(
        "read_committed", description="Whether records of transactions that were aborted are left out."
    )
    batch_bytes: int = Field(16 * MIB, ge=1024, description="Most bytes of records in one commit.")
    batch_records: int = Field(512, ge=1, le=100_000, description="Most records in one commit.")
    batch_seconds: float = Field(2.0, gt=0, description="Longest wait before a smaller batch is committed.")
    client: dict[str, str] = Field(default_factory=dict, description="Extra kafka-python options (SASL, TLS).")
    oauth: OAuth = Field(default_factory=OAuth)
    schema_registry: str = Field("", description="URL of a Confluent-compatible schema registry; empty: none.")
    schema_deadline_seconds: float = Field(
        600.0,
        ge=0,
        description="A record whose schema the registry fails at for so long is refused; 0: it is waited for.",
    )
    schema_registry_auth: SecretStr | None = Field(None, description="user:password for the schema registry.")

    _url = field_validator("schema_registry")(http_url)

    @field_validator("schema_registry_auth")
    @classmethod
    def _user_and_password(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and ":" not in value.get_secret_value():
            raise ValueError("give user:password")
        return value


class Ingest(Section):
    """What a record must be to get into the sample store."""

    max_image_bytes: int = Field(8 * MIB, ge=1024, description="Largest encoded image.")
    max_pixels: int = Field(40_000_000, ge=1, description="Largest decoded image, in pixels.")
    min_side: int = Field(8, ge=1, description="Shortest side of an image, in pixels.")
    max_text_chars: int = Field(2000, ge=1, description="Longest text, question or answer.")
    fresh_eval_share: float = Field(0.15, ge=0, lt=1, description="Share kept out of training for the gate.")
    near_duplicate_distance: int = Field(
        0,
        ge=-1,
        le=16,
        description="Perceptual hash bits in which near duplicates may differ; -1: none are looked for.",
    )
    split_key: SecretStr | None = Field(
        None, description="Key of the split into train and fresh_eval; made with the store if unset."
    )
    processes: int = Field(0, ge=0, le=256, description="Processes that validate records; 0: one for each core.")
    allowed_uris: list[UriRule] = Field(default_factory=list, description="Prefixes of image URIs that are fetched.")
    allowed_networks: list[NetworkRule] = Field(
        default_factory=list, description="Networks that URIs may lead to although they are not public."
    )
    uri_concurrency: int = Field(32, ge=1, le=1024, description="Images fetched at once by image_uri; more wait.")
    uri_seconds: float = Field(30.0, gt=0, le=3600, description="Longest time to fetch one image, all tries included.")
    uri_retries: int = Field(3, ge=0, le=10, description="Further tries after failures that may pass.")
    metrics_port: int = Field(9464, ge=0, le=65535, description="Prometheus port of ingest; 0 is off.")


class Maintain(Section):
    """What keeps the sample store compact, deletes what is to be deleted, and publishes events: `ratchet maintain`."""

    seconds: float = Field(30.0, gt=0, le=86_400, description="How often maintenance looks for something to do.")
    metrics_port: int = Field(9466, ge=0, le=65535, description="Prometheus port of maintenance; 0 is off.")
    keep_seconds: float = Field(
        3600.0, ge=0, description="How long versions of the sample store are kept that no update is pinned to."
    )
    keep_events_days: float = Field(
        7.0, ge=0, description="How long the ledger keeps events that were published; 0: no limit."
    )


class Retention(Section):
    """How long samples are kept. Without limits they are kept until somebody deletes them."""

    max_age_days: float = Field(0, ge=0, description="Samples older than this are removed; 0: no limit.")
    max_bytes: int = Field(0, ge=0, description="The oldest samples over this many bytes are removed; 0: no limit.")
    keep_samples: int = Field(
        50_000, ge=0, description="Of the samples over a limit so many stay, balanced over concepts, to be replayed."
    )


class Collection(Section):
    """What is deleted of adapters, their carry-over, gate reports and caches: `ratchet gc`, and maintenance."""

    hours: float = Field(24.0, ge=0, description="How often maintenance collects garbage; 0: only `ratchet gc` does.")
    keep_releases: int = Field(
        20, ge=2, le=10_000, description="Newest releases of each base whose adapters stay, whatever their age."
    )
    keep_days: float = Field(
        90.0,
        ge=1,
        description="Adapters stay for so long after their last use; caches on this machine too. Counted back from the "
        "newest entry of the ledger.",
    )
    keep_report_days: float = Field(
        365.0, ge=0, description="Gate reports of candidates that were never released stay for so long; 0: no limit."
    )
    keep_adapters: list[str] = Field(default_factory=list, description="Names of adapters that always stay.")


class Serve(Section):
    """The HTTP server and its engines."""

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=1, le=65535, description="HTTP port.")
    engine: Literal["auto", "torch", "onnx"] = Field(
        "auto",
        description="What runs the CLIP; auto: torch, or ONNX Runtime where installed and measured to be faster.",
    )
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Of the CLIP's matrix products; auto: half where it measures faster and stays within noise."
    )
    encoder_replicas: int = Field(1, ge=1, le=256, description="Encoder processes.")
    encoder_max_replicas: int = Field(
        0, ge=0, le=4096, description="As many of them at most, by load; 0: always encoder_replicas."
    )
    encoder_threads: int = Field(0, ge=0, le=256, description="CPU threads of each encoder; 0: they share the cores.")
    ingress_replicas: int = Field(
        1, ge=1, le=64, description="Processes that answer HTTP. With two, one that ends is not missed."
    )
    ingress_max_replicas: int = Field(
        0, ge=0, le=256, description="As many of them at most, by load; 0: always ingress_replicas."
    )
    controller_replicas: int = Field(
        1, ge=1, le=8, description="Release controllers. One leads by a lease; with two, one that ends is not missed."
    )
    max_batch: int = Field(16, ge=1, le=1024, description="Most images (or 4x texts) in one forward pass.")
    batch_wait_seconds: float = Field(
        0.005, ge=0, le=1, description="Longest wait for a batch to fill; a request alone does not wait."
    )
    queue: int = Field(256, ge=1, description="Requests that may wait; more are answered 429.")
    deadline_seconds: float = Field(30.0, gt=0, description="A request older than this is answered 504.")
    max_images: int = Field(32, ge=1, le=1024, description="Images in one request.")
    max_texts: int = Field(256, ge=1, le=8192, description="Texts in one request.")
    max_body_bytes: int = Field(16 * MIB, ge=1024, description="Largest request body.")
    max_text_chars: int = Field(2000, ge=1, description="Longest text.")
    max_image_bytes: int = Field(8 * MIB, ge=1024, description="Largest encoded image.")
    max_pixels: int = Field(40_000_000, ge=1, description="Largest decoded image, in pixels.")
    max_request_pixels: int = Field(80_000_000, ge=1, description="Pixels of all images of one request together.")
    decode_pixels: int = Field(
        160_000_000, ge=1, description="Pixels that wait to be decoded, over all requests; more are answered 429."
    )
    body_budget_bytes: int = Field(
        256 * MIB, ge=1024, description="Bytes of request bodies in memory, over all requests; more are answered 503."
    )
    cache_bytes: int = Field(
        64 * MIB, ge=0, description="Memory for vectors of texts and images that were sent before; 0: none are kept."
    )
    caller_share: float = Field(
        0.75, gt=0, le=1, description="Share of the slots, bytes and pixels that one key or address may hold."
    )
    operator_queue: int = Field(16, ge=1, description="Operator calls at once; they have slots of their own.")
    connections: int = Field(4096, ge=16, le=100_000, description="Open connections of HAProxy; more wait.")
    connections_per_address: int = Field(512, ge=1, description="Open connections of one address; more are closed.")
    header_seconds: float = Field(
        10.0, gt=0, description="Longest wait of HAProxy for the headers and the first 16 KB of a request."
    )
    idle_seconds: float = Field(60.0, gt=0, description="An open connection without a request is closed after this.")
    body_seconds: float = Field(30.0, gt=0, description="Longest time for a whole body; then the answer is 408.")
    body_bytes_per_second: int = Field(
        16_384, ge=1, description="Slowest rate of a body, on average and after its first 5 s; below it is 408."
    )
    probes_per_second: int = Field(50, ge=1, description="Most calls of /health from one address; more are 429.")
    allowed_hosts: list[str] = Field(
        default_factory=list,
        description="Further names in the Host header; on loopback others are refused (DNS rebinding).",
    )
    trusted_proxies: list[NetworkRule] = Field(
        default_factory=list, description="Networks of proxies whose X-Forwarded-For is believed."
    )
    image_hosts: list[HostRule] = Field(
        default_factory=list, description="Hosts that images are fetched from by URL; empty: none are fetched."
    )
    image_networks: list[NetworkRule] = Field(
        default_factory=list, description="Networks that image URLs may lead to although they are not public."
    )
    image_seconds: float = Field(5.0, gt=0, description="Longest time to fetch one image, redirects included.")
    image_fetches: int = Field(16, ge=1, le=1024, description="Images fetched at once; more wait.")
    rollback_window: int = Field(2, ge=2, le=16, description="Releases kept resident, the live one included.")
    vlm_engine: Literal["auto", "vllm", "transformers"] = Field(
        "auto", description="What runs the VLM; auto takes vLLM where it is installed."
    )
    vlm_replicas: int = Field(1, ge=1, le=64, description="VLM processes.")
    vlm_max_replicas: int = Field(
        0, ge=0, le=4096, description="As many of them at most, by load; 0: always vlm_replicas."
    )
    vlm_threads: int = Field(1, ge=1, le=256, description="CPU threads of each VLM engine.")
    vlm_context: int = Field(256, ge=32, le=131_072, description="Most tokens of a request, answer and image included.")
    vlm_max_tokens: int = Field(128, ge=1, le=32_768, description="Longest answer, in tokens.")
    vlm_batch: int = Field(16, ge=1, le=1024, description="Requests that the VLM answers side by side.")
    vlm_queue: int = Field(128, ge=1, description="VLM requests that may wait or run; more are answered 429.")
    vlm_max_rank: Literal[8, 16, 32, 64, 128, 256] = Field(16, description="Largest LoRA rank that the VLM serves.")
    vlm_gpus: int = Field(
        1, ge=1, le=64, description="GPUs that one VLM replica is divided over (tensor parallel); none on a CPU."
    )
    vlm_quantization: str = Field("", description="How vLLM quantizes the VLM's weights, e.g. fp8; empty: not at all.")
    vlm_arguments: dict[str, bool | int | float | str] = Field(
        default_factory=dict, description="Further engine arguments of vLLM, by their names in AsyncEngineArgs."
    )
    vlm_memory_gib: float = Field(1.0, gt=0, description="Memory of vLLM's key-value cache on a CPU.")
    ray_metrics_port: int = Field(0, ge=0, le=65535, description="Prometheus port of Ray's own metrics; 0 is off.")
    operator_key: SecretStr | None = Field(None, description="Bearer key of operators; made at first use if unset.")

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback(self.host)

    @property
    def url(self) -> str:
        """URL under which a process of the same machine reaches the server."""
        return local_url(self.host, self.port)


class AccessRules(Section):
    """Who needs a key, and how often one may call."""

    require_keys: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Whether /v1 needs a key with the scope infer or search; auto: unless serve.host is loopback.",
    )
    metrics: Literal["auto", "open", "key"] = Field(
        "auto", description="Whether /metrics needs a key of any scope; auto: unless serve.host is loopback."
    )
    requests_per_minute: int = Field(0, ge=0, description="Limit of each key that has none of its own; 0 is none.")
    anonymous_per_minute: int = Field(
        600, ge=0, description="Limit of each address that calls without a key from elsewhere; 0 is none."
    )


class Updater(Section):
    """When and how updates are trained."""

    recipe: str = Field("default", description="Recipe of CLIP updates: a name or a YAML path.")
    vlm_recipe: str = Field("vlm-default", description="Recipe of VLM updates: a name or a YAML path.")
    min_new_samples: int = Field(256, ge=1, description="New train samples that trigger an update.")
    max_wait_seconds: float = Field(
        3600.0, gt=0, description="Trigger with fewer samples or fresh items after this long."
    )
    wait_for_items: bool = Field(
        True,
        description="Wait for the fresh items that show gate.detect; off: an update is judged once, by what there is.",
    )
    draw: Draw = Field(
        "uniform",
        description="Which pending samples an update visits where it cannot visit all: drawn by chance, or the newest.",
    )
    work_gib: float = Field(
        16.0, gt=0, description="Disk that one update may take in home/updates for what it computes once per sample."
    )
    poll_seconds: float = Field(5.0, gt=0, description="How often the triggers are checked.")
    reference: list[Path] = Field(
        default_factory=list, description="Folder datasets of the reference pool; unset: the shipped base's own."
    )
    seed: int = Field(0, ge=0, description="Seed of training.")
    threads: int = Field(2, ge=1, le=256, description="CPU threads of the trainer, of each of its workers.")
    workers: int = Field(
        1,
        ge=1,
        le=64,
        description="Processes that take the steps of an update together, by Ray Train. 1: the updater itself.",
    )
    workers_on_gpus: Literal["auto", "always", "never"] = Field(
        "auto", description="Whether each of them has a GPU; auto: where the updater itself sees one."
    )
    ray_address: str = Field(
        "",
        description="Ray cluster for more workers than one, which sees home as this machine does, e.g. ray://head:10001;"
        " empty: this machine.",
    )
    nice: int = Field(
        19, ge=0, le=19, description="Niceness of the trainer process; serving's models have 4, the rest of serving 0."
    )
    idle: bool = Field(False, description="Linux: the trainer runs only where no other process wants to (SCHED_IDLE).")
    duty_cycle: float = Field(1.0, gt=0, le=1, description="Share of time the trainer may compute.")
    max_latency_ratio: float = Field(
        1.25, ge=1, description="The trainer gives way while a route takes this multiple of what it did before."
    )
    least_duty_cycle: float = Field(0.25, gt=0, le=1, description="Share of time it keeps when it gives way.")
    checkpoint_steps: int = Field(10, ge=1, description="Steps between checkpoints.")
    heads: list[LearnedHead] = Field(
        default_factory=list,
        max_length=MAX_HEADS,
        description="Classifiers that each update of the CLIP learns from labelled samples; see docs/heads.md.",
    )
    metrics_port: int = Field(9465, ge=0, le=65535, description="Prometheus port of the updater; 0 is off.")


class Budget(Section):
    """Compute for learning, in memory-adjusted GFLOPs (FLOPs per step x peak memory / that of full fine-tuning)."""

    gflops_per_day: float = Field(200_000.0, gt=0, description="Refill of the token bucket a day, and its size.")
    gflops_per_update: float = Field(6_000.0, gt=0, description="Most that one update may spend.")
    seconds_per_update: float = Field(900.0, gt=0, description="Wall-clock bound of one update's training.")


class Gate(Section):
    """What a candidate has to prove."""

    suites: list[Path] = Field(default_factory=list, description="Suite YAML files or folders of them.")
    alpha: float = Field(
        0.05,
        gt=0,
        lt=0.5,
        description="Chance of a false accept: of each candidate that loses a margin, and of any without a gain before "
        "the next release.",
    )
    detect: float = Field(
        0.03, gt=0, lt=1, description="Gain that the gate is to see: updates wait for the fresh items that show it."
    )
    power: float = Field(0.8, ge=0.5, lt=1, description="Chance with which the gate sees a true gain of gate.detect.")
    margin: float = Field(0.05, gt=0, lt=1, description="Loss that a retention suite must exclude (0.05 = 5 points).")
    min_items: int = Field(
        50, ge=2, description="Fewer independent items (captions, images) than this are inconclusive."
    )
    max_items: int = Field(
        2000, ge=50, le=50_000, description="Most items of a suite that names no limit, of a fresh domain as well."
    )


class Catalog(Section):
    """How the catalog embeds, and how it is searched."""

    index_rows: int = Field(50_000, ge=256, description="An image space of fewer rows is searched without an index.")
    min_recall: float = Field(
        0.9, gt=0, lt=1, description="An index that finds less of the true ten nearest rows is not used."
    )
    cache_gib: float = Field(
        2.0, gt=0, description="Memory for the indexes of all image spaces; vectors are coded so that it suffices."
    )
    most_wait_seconds: float = Field(
        600.0, ge=0,
        description="A release waits no longer for its catalog, where its verdict allows searches before.",
    )  # fmt: skip
    background_calls: int = Field(
        16, ge=1, le=1024, description="Pieces of 32 images that are embedded at once, over all encoders, at most."
    )


class Watch(Section):
    """How the catalog and the incoming data are watched."""

    seconds: float = Field(30.0, gt=0, description="How often they are measured, where something has changed.")
    drift_window: int = Field(128, ge=8, le=100_000, description="Newest samples that are looked at for drift.")
    drift_reference: int = Field(512, ge=8, le=100_000, description="Samples before them: what they are compared to.")


class Console(Section):
    """The web page for operators and visitors."""

    host: str = Field("127.0.0.1", description="Address to listen on; on loopback visitors may look without a key.")
    port: int = Field(8001, ge=1, le=65535, description="HTTP port.")
    session_hours: float = Field(12.0, gt=0, le=24 * 30, description="A sign-in ends after this long.")
    public: bool = Field(
        False,
        description="Read-only without a key, for a team's screen: no sign-in, no forms, nothing of people or samples.",
    )
    public_samples: bool = Field(
        False, description="In public mode also show pictures and texts of samples that a verdict names."
    )
    public_requests_per_minute: int = Field(
        300, ge=1, le=1_000_000, description="Requests a minute that one address may make in public mode."
    )
    oidc: Oidc = Field(default_factory=Oidc)

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine can reach the console."""
        return is_loopback(self.host)

    @property
    def url(self) -> str:
        """URL under which a browser of the same machine reaches the console."""
        return local_url(self.host, self.port)


class Rollout(Section):
    """How an update goes live, and what the guard watches. Bounds are on what a release may do to its incumbent."""

    mode: Literal["direct", "canary", "shadow"] = Field(
        "direct", description="How updates go live: at once, for a share of the requests first, or only compared first."
    )
    share: float = Field(0.1, gt=0, lt=1, description="Share of requests that a canary answers.")
    observe_seconds: float = Field(600.0, ge=0, description="A canary or shadow of an update is promoted after this.")
    min_comparisons: int = Field(100, ge=1, description="Inputs that both sides must have answered before that.")
    guard_seconds: float = Field(600.0, ge=0, description="How long a plain release is watched; 0: not at all.")
    compare_share: float = Field(
        0.1, ge=0, le=1, description="Share of watched requests whose input the other side answers too, unseen."
    )
    hold_after_rollback: bool = Field(
        True, description="After an operator's rollback updates wait until an operator resumes them."
    )
    max_error_ratio: float = Field(2.0, ge=1, description="Failed requests, as a multiple of the incumbent's share.")
    max_latency_ratio: float = Field(2.0, ge=1, description="Time for the same input, as a multiple.")
    min_agreement: float = Field(0.7, ge=0, lt=1, description="Share of inputs on which both CLIPs must agree.")
    min_vlm_agreement: float = Field(
        0.2, ge=0, lt=1, description="The same of VLMs: an update may change most answers about what it learned."
    )


class Logs(Section):
    """What the processes log, on standard error."""

    format: Literal["auto", "json", "text"] = Field(
        "auto", description="One JSON object a line, or text; auto: text at a terminal, JSON elsewhere."
    )
    level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="The least level of Ratchet's own records; libraries log warnings and worse."
    )


class Traces(Section):
    """Spans of requests to the model server, for OpenTelemetry."""

    endpoint: str = Field(
        "", description="OTLP/HTTP URL of a collector, e.g. http://collector:4318/v1/traces; empty: no traces."
    )
    share: float = Field(
        0.01, ge=0, le=1, description="Share of requests that are traced, of those whose client has not decided it."
    )

    _url = field_validator("endpoint")(http_url)


class Settings(Section):
    """Everything. ``origins`` maps each dotted name to the place its value came from."""

    home: Path = Field(Path(".ratchet"), description="Folder of the embedded defaults.")
    ledger_url: str | None = Field(None, description="SQLAlchemy URL; SQLite in home when unset.")
    artifacts_url: str | None = Field(
        None, description="fsspec URL of adapters and reports; a folder in home when unset."
    )
    lake_url: str | None = Field(None, description="Folder or object store URL of the Lance datasets.")
    server_url: str | None = Field(
        None,
        pattern=r"^https?://[^/\s]+",
        description="URL at which console, updater and command line call the model server; by default its own.",
    )  # fmt: skip
    metrics_host: str = Field(
        "127.0.0.1", description="Address of the metrics ports of ingest, maintenance and the updater."
    )
    base: BaseModels = Field(default_factory=BaseModels)
    kafka: Kafka = Field(default_factory=Kafka)
    ingest: Ingest = Field(default_factory=Ingest)
    maintain: Maintain = Field(default_factory=Maintain)
    retention: Retention = Field(default_factory=Retention)
    gc: Collection = Field(default_factory=Collection)
    serve: Serve = Field(default_factory=Serve)
    access: AccessRules = Field(default_factory=AccessRules)
    updater: Updater = Field(default_factory=Updater)
    budget: Budget = Field(default_factory=Budget)
    gate: Gate = Field(default_factory=Gate)
    catalog: Catalog = Field(default_factory=Catalog)
    watch: Watch = Field(default_factory=Watch)
    console: Console = Field(default_factory=Console)
    rollout: Rollout = Field(default_factory=Rollout)
    logs: Logs = Field(default_factory=Logs)
    traces: Traces = Field(default_factory=Traces)
    origins: dict[str, str] = Field(default_factory=dict, exclude=True, repr=False)

    @property
    def server(self) -> str:
        """URL under which other processes than serving's own call the model server."""
        return self.server_url or self.serve.url

    @property
    def ledger(self) -> str:
        """SQLAlchemy URL of the ledger."""
        return self.ledger_url or f"sqlite:///{(self.home / 'ledger.db').resolve()}"

    @property
    def artifacts(self) -> str:
        """fsspec URL of the artifacts."""
        return self.artifacts_url or str((self.home / "artifacts").resolve())

    @property
    def lake(self) -> str:
        """URL under which the Lance datasets lie."""
        return self.lake_url or str((self.home / "lake").resolve())

    @property
    def has_operator_key(self) -> bool:
        """Whether there is a key of operators already, in the settings or in the home."""
        return self.serve.operator_key is not None or (self.home / "operator.key").exists()

    def operator_key(self) -> SecretStr:
        """The operators' key; on first use one is made and kept, owner-readable, in ``home/operator.key``."""
        if self.serve.operator_key is not None:
            return self.serve.operator_key
        path = self.home / "operator.key"
        if not path.exists():
            self.home.mkdir(parents=True, exist_ok=True)
            staging = path.with_name(f".operator.{os.getpid()}.{secrets.token_hex(4)}")
            descriptor = os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(secrets.token_urlsafe(32))
            try:
                os.link(staging, path)  # the first of two processes wins; both then read the same key
            except FileExistsError:
                path.stat()
            finally:
                staging.unlink()
        return SecretStr(path.read_text().strip())
