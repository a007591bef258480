"""Settings of serving: base models, HTTP server, access, catalog, console, and rollout of releases."""

from __future__ import annotations

from typing import Final, Literal

from pydantic import Field, SecretStr

from core.addresses import HostRule, NetworkRule, is_loopback, local_url
from core.settings.identity import Oidc
from core.settings.section import MIB, Section

SHIPPED: Final = "shipped"
SHIPPED_VLM: Final = "shipped-vlm"
"""The bases that Ratchet makes itself."""


class BaseModels(Section):
    """The frozen checkpoints that are served."""

    clip: str = Field(SHIPPED, description="Name of a registered CLIP base (`ratchet base list`).")
    vlm: str = Field(SHIPPED_VLM, description="Name of a registered VLM base; empty: no VLM is served.")


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
        1,
        ge=1,
        le=64,
        description="Processes that answer HTTP. From two on one that ends is not missed, nor is a release "
        "controller: there are two of them as well.",
    )
    ingress_max_replicas: int = Field(
        0, ge=0, le=256, description="As many of them at most, by load; 0: always ingress_replicas."
    )
    max_batch: int = Field(16, ge=1, le=1024, description="Most images (or 4x texts) in one forward pass.")
    queue: int = Field(256, ge=1, description="Requests that may wait; more are answered 429.")
    deadline_seconds: float = Field(30.0, gt=0, description="A request older than this is answered 504.")
    max_image_bytes: int = Field(
        8 * MIB, ge=1024, description="Largest encoded image. A body has twice as many bytes at most."
    )
    max_pixels: int = Field(
        40_000_000, ge=1, description="Largest decoded image, in pixels. Four times as many may wait to be decoded."
    )
    cache_bytes: int = Field(
        64 * MIB, ge=0, description="Memory for vectors of texts and images that were sent before; 0: none are kept."
    )
    caller_share: float = Field(
        0.75, gt=0, le=1, description="Share of the slots, bytes and pixels that one key or address may hold."
    )
    idle_seconds: float = Field(60.0, gt=0, description="An open connection without a request is closed after this.")
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
    vlm_max_rank: Literal[8, 16, 32, 64, 128, 256] = Field(16, description="Largest LoRA rank that the VLM serves.")
    vlm_gpus: int = Field(
        1, ge=1, le=64, description="GPUs that one VLM replica is divided over (tensor parallel); none on a CPU."
    )
    vlm_arguments: dict[str, bool | int | float | str] = Field(
        default_factory=dict, description="Further engine arguments of vLLM, by their names in AsyncEngineArgs."
    )
    vlm_memory_gib: float = Field(1.0, gt=0, description="Memory of vLLM's key-value cache on a CPU.")
    ray_metrics_port: int = Field(0, ge=0, le=65535, description="Prometheus port of Ray's own metrics; 0 is off.")
    operator_key: SecretStr | None = Field(None, description="Bearer key of operators; made at first use if unset.")

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
        "auto",
        description="Whether /v1 needs a key with the scope infer or search; auto: not on this machine, on loopback.",
    )
    metrics: Literal["auto", "open", "key"] = Field(
        "auto", description="Whether /metrics needs a key of any scope; auto: not on loopback where /v1 needs none."
    )
    requests_per_minute: int = Field(0, ge=0, description="Limit of each key that has none of its own; 0 is none.")
    anonymous_per_minute: int = Field(
        600, ge=0, description="Limit of each address that calls without a key from elsewhere; 0 is none."
    )


class Catalog(Section):
    """Embedding and search of the catalog."""

    min_recall: float = Field(
        0.9, gt=0, lt=1, description="An index that finds less of the true ten nearest rows is not used."
    )
    cache_gib: float = Field(
        2.0, gt=0, description="Memory for the indexes of all image spaces; vectors are coded so that it suffices."
    )


class Console(Listener):
    """The web page for operators and visitors."""

    host: str = Field("127.0.0.1", description="Address to listen on; on loopback visitors may look without a key.")
    port: int = Field(8001, ge=1, le=65535, description="HTTP port.")
    path_prefix: str = Field(
        "", pattern=r"^(/[A-Za-z0-9._~-]+)*$", description="Path under which a proxy serves the console, as /ratchet."
    )
    session_hours: float = Field(12.0, gt=0, le=24 * 30, description="A sign-in ends after this long.")
    public: bool = Field(
        False,
        description="Read-only without a key, for a team's screen: no sign-in, no forms, nothing of people or samples.",
    )
    public_samples: bool = Field(
        False, description="In public mode also show pictures and texts of samples that a verdict names."
    )
    oidc: Oidc = Field(default_factory=Oidc)


class Rollout(Section):
    """Rollout of updates, and the guard's limits on a release compared with its incumbent."""

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
    min_agreement: float = Field(0.7, ge=0, lt=1, description="Share of inputs on which both CLIPs must agree.")
    min_vlm_agreement: float = Field(
        0.2, ge=0, lt=1, description="The same of VLMs: an update may change most answers about what it learned."
    )
