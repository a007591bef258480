"""Settings of serving: base models, HTTP server, access, catalog, console, and rollout of releases."""

from __future__ import annotations

import re
from typing import Final, Literal

from pydantic import Field, SecretStr, field_validator

from core.addresses import HostRule, NetworkRule, is_loopback, local_url
from core.settings.identity import Oidc
from core.settings.section import MIB, Section

SHIPPED: Final = "shipped"
SHIPPED_VLM: Final = "shipped-vlm"
"""The bases that Ratchet makes itself."""
ORIGIN: Final = re.compile(r"https?://(\[[0-9a-f:]+\]|[^/?#@\s\[\]:]+)(:\d+)?")
TAKEN_NAME: Final = re.compile("base|(clip|vlm)([@-].*)?")
"""What requests may name already, and names of adapters."""


class BaseModels(Section):
    """The frozen checkpoints that are served."""

    clip: str = Field(SHIPPED, description="Name of a registered CLIP base (`ratchet base list`).")
    vlm: str = Field(SHIPPED_VLM, description="Name of a registered VLM base; empty: serve no VLM.")


class Listener(Section):
    """An address to listen on."""

    host: str
    port: int

    @property
    def on_loopback(self) -> bool:
        return is_loopback(self.host)

    @property
    def url(self) -> str:
        return local_url(self.host, self.port)


class Serve(Listener):
    """The HTTP server and its engines."""

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=1, le=65535, description="HTTP port.")
    precision: Literal["auto", "float32", "bfloat16", "float16", "int8"] = Field(
        "auto",
        description="Precision of the CLIP's matrix products; auto: half, or on a CPU 8-bit integers, if that is "
        "faster and equal within noise.",
    )
    encoder_replicas: int = Field(1, ge=1, le=256, description="Encoder processes.")
    encoder_max_replicas: int = Field(
        0, ge=0, le=4096, description="Maximum replicas when autoscaling; 0: always encoder_replicas."
    )
    encoder_threads: int = Field(
        0, ge=0, le=256, description="CPU threads of each encoder; 0: divide the cores among them."
    )
    ingress_replicas: int = Field(
        1,
        ge=1,
        le=64,
        description="HTTP server processes. With two or more, one may fail; there are then two release "
        "controllers as well.",
    )
    ingress_max_replicas: int = Field(
        0, ge=0, le=256, description="Maximum processes when autoscaling; 0: always ingress_replicas."
    )
    max_batch: int = Field(
        16, ge=1, le=1024, description="Maximum images (or four times as many texts) in one forward pass."
    )
    queue: int = Field(256, ge=1, description="Maximum waiting requests; more get 429.")
    deadline_seconds: float = Field(30.0, gt=0, description="Time limit of a request; after it, 504.")
    max_image_bytes: int = Field(
        8 * MIB, ge=1024, description="Maximum size of an encoded image. The limit of a request body is twice this."
    )
    max_pixels: int = Field(
        40_000_000,
        ge=1,
        description="Maximum size of an image. The limit of all images that wait for decoding is four times this.",
    )
    cache_bytes: int = Field(64 * MIB, ge=0, description="Memory for cached vectors of texts and images; 0: no cache.")
    caller_share: float = Field(
        0.75, gt=0, le=1, description="Maximum share of the slots, bytes and pixels for one key or address."
    )
    idle_seconds: float = Field(60.0, gt=0, description="Idle connections are closed after this.")
    allowed_hosts: list[str] = Field(
        default_factory=list,
        description="Additional names accepted in the Host header of a server on loopback (DNS rebinding).",
    )
    trusted_proxies: list[NetworkRule] = Field(
        default_factory=list, description="Networks of proxies whose X-Forwarded-For is trusted."
    )
    cors_origins: list[str] = Field(
        default_factory=list,
        description="Origins of web pages whose scripts may call the API (CORS), e.g. https://app.example; * is any.",
    )
    aliases: dict[str, Literal["clip", "vlm"]] = Field(
        default_factory=dict,
        description="Further names of the models in requests, e.g. {text-embedding-3-small: clip}, for clients whose "
        "names cannot be changed.",
    )
    image_hosts: list[HostRule] = Field(
        default_factory=list, description="Hosts from which image URLs are fetched; empty: none."
    )
    image_networks: list[NetworkRule] = Field(
        default_factory=list, description="Private networks that image URLs may resolve to."
    )
    rollback_window: int = Field(2, ge=2, le=16, description="Number of releases in memory, including the live one.")
    vlm_engine: Literal["auto", "vllm", "transformers"] = Field(
        "auto", description="Engine of the VLM; auto: vLLM if it is installed, else transformers."
    )
    vlm_replicas: int = Field(1, ge=1, le=64, description="VLM processes.")
    vlm_max_replicas: int = Field(
        0, ge=0, le=4096, description="Maximum replicas when autoscaling; 0: always vlm_replicas."
    )
    vlm_threads: int = Field(1, ge=1, le=256, description="CPU threads of each VLM engine.")
    vlm_context: int = Field(
        256, ge=32, le=131_072, description="Maximum tokens of a request, including images and answer."
    )
    vlm_max_tokens: int = Field(128, ge=1, le=32_768, description="Maximum tokens of an answer.")
    vlm_batch: int = Field(16, ge=1, le=1024, description="Maximum requests that a VLM replica answers concurrently.")
    vlm_max_rank: Literal[8, 16, 32, 64, 128, 256] = Field(16, description="Maximum LoRA rank of VLM adapters.")
    vlm_gpus: int = Field(1, ge=1, le=64, description="GPUs per VLM replica (tensor parallel); ignored on a CPU.")
    vlm_arguments: dict[str, bool | int | float | str] = Field(
        default_factory=dict, description="Additional arguments for vLLM's AsyncEngineArgs."
    )
    vlm_memory_gib: float = Field(1.0, gt=0, description="Memory for vLLM's key-value cache on a CPU.")
    ray_metrics_port: int = Field(0, ge=0, le=65535, description="Prometheus port of Ray's own metrics; 0: off.")
    operator_key: SecretStr | None = Field(
        None, description="Bearer key of operators; default: generated on first use, in home/operator.key."
    )

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, value: list[str]) -> list[str]:
        if wrong := [each for each in value if each != "*" and not ORIGIN.fullmatch(each)]:
            raise ValueError(
                f"{wrong[0]!r} is no origin: give scheme, host and port without a path, e.g. https://app.example"
            )
        return value

    @field_validator("aliases")
    @classmethod
    def _are_free_names(cls, value: dict[str, str]) -> dict[str, str]:
        if taken := [name for name in value if TAKEN_NAME.fullmatch(name) or not 0 < len(name) <= 200]:
            raise ValueError(
                f"{taken[0]!r} cannot be an alias: it is empty, longer than 200 characters, or the name of a model, "
                "release or adapter. Choose another name"
            )
        return value

    @property
    def max_body_bytes(self) -> int:
        """Largest request body: base64 makes an image longer by a third."""
        return 2 * self.max_image_bytes

    @property
    def body_budget_bytes(self) -> int:
        """Request bodies in memory of one ingress process; 16 of the largest in all, and always one."""
        return max(self.max_body_bytes, 16 * self.max_body_bytes // self.ingress_replicas)

    @property
    def decode_pixels(self) -> int:
        """Pixels of images that wait to be decoded or answered in one ingress process; four of the largest in all."""
        return -(-4 * self.max_pixels // self.ingress_replicas)

    @property
    def vlm_queue(self) -> int:
        """Limit on waiting and running VLM requests; more get 429. Eight batches of some seconds each take as long as
        ``deadline_seconds`` lets a request wait."""
        return 8 * self.vlm_batch


class AccessRules(Section):
    """Required keys, and rate limits."""

    require_keys: Literal["auto", "always", "never"] = Field(
        "auto", description="Require a key with scope infer or search for /v1; auto: unless the server is on loopback."
    )
    metrics: Literal["auto", "open", "key"] = Field(
        "auto", description="Require a key of any scope for /metrics; auto: unless /v1 is open and on loopback."
    )
    requests_per_minute: int = Field(0, ge=0, description="Rate limit of keys without their own; 0: none.")
    anonymous_per_minute: int = Field(
        600, ge=0, description="Rate limit of each remote address without a key; 0: none."
    )


class Feedback(Section):
    """What becomes of answers after they were given."""

    accept: list[Literal["second_caller", "agreement"]] = Field(
        default_factory=list,
        description="Corrections that become samples without a review. second_caller: two callers say the same of the "
        "same image; agreement: all, of which screening holds those that trust.hold_below does not let pass.",
    )
    audit_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the answers of /v1/classify that go, with one of their images, to the review of "
        "corrections, whatever callers report; 0: none.",
    )


class Catalog(Section):
    """Embedding and search of the catalog."""

    min_recall: float = Field(
        0.9, gt=0, lt=1, description="Minimum recall@10 of a search index; below it, searches are exact."
    )
    cache_gib: float = Field(
        2.0, gt=0, description="Memory for the search indexes of all image spaces; vectors are compressed to fit."
    )


class Console(Listener):
    """The web page for operators and visitors."""

    host: str = Field("127.0.0.1", description="Address to listen on. On loopback, reading needs no key.")
    port: int = Field(8001, ge=1, le=65535, description="HTTP port.")
    path_prefix: str = Field(
        "", pattern=r"^(/[A-Za-z0-9._~-]+)*$", description="Path prefix behind a proxy, e.g. /ratchet."
    )
    session_hours: float = Field(12.0, gt=0, le=24 * 30, description="Lifetime of a sign-in.")
    public: bool = Field(
        False, description="Read-only without sign-in, e.g. for a team's screen: no forms, people or samples."
    )
    public_samples: bool = Field(False, description="Show pictures and texts of a verdict's samples in public mode.")
    oidc: Oidc = Field(default_factory=Oidc)


class Rollout(Section):
    """Rollout of updates, and the guard's limits on a release compared with its incumbent."""

    mode: Literal["direct", "canary", "shadow"] = Field(
        "direct", description="How updates go live: directly, after a canary, or after a shadow comparison."
    )
    share: float = Field(0.1, gt=0, lt=1, description="Share of requests for a canary.")
    observe_seconds: float = Field(600.0, ge=0, description="Duration of a canary or shadow before promotion.")
    min_comparisons: int = Field(100, ge=1, description="Minimum compared inputs before promotion.")
    guard_seconds: float = Field(600.0, ge=0, description="How long the guard watches a full release; 0: off.")
    compare_share: float = Field(
        0.1, ge=0, le=1, description="Share of watched requests that the other release answers as well, for comparison."
    )
    indexes: Literal["wait", "cross", "ignore"] = Field(
        "wait",
        description="What a release that changes the image space does until each index outside has it. cross: waits "
        "only where the gate has not shown that new queries find old vectors; ignore: never waits.",
    )
    hold_after_rollback: bool = Field(
        True, description="After an operator's rollback, hold updates until an operator resumes them."
    )
    min_agreement: float = Field(0.7, ge=0, lt=1, description="Minimum share of inputs on which both CLIPs agree.")
    min_vlm_agreement: float = Field(
        0.2, ge=0, lt=1, description="The same for VLMs, whose updates may change most answers about what they learned."
    )
