"""What `ratchet init` looks at before it writes anything: the model, from the disk alone, and the broker."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from core.errors import BaseModelError, BrokerError, ConfigError
from core.settings import Settings
from core.settings.serving import SHIPPED

BROKER_SECONDS = 5.0


@dataclass(frozen=True)
class ModelChoice:
    """Which model becomes the base."""

    model: str
    """A registered base, a folder, or an architecture of open_clip."""
    weights: Path | None
    name: str
    """What it is, or will be, registered as."""
    registered: bool


def choose_model(home: Path, model: str, weights: Path | None, name: str | None) -> ModelChoice:
    """Find out what ``--model`` names; nothing is written.

    Raises:
        ConfigError: it names nothing that can be loaded from this disk.
    """
    from serving.engines.clip_base import list_bases

    if model in list_bases(home, "clip") or model == SHIPPED:
        if weights is not None:
            raise ConfigError(f"--weights: {model!r} is registered with its weights.", "Leave --weights out.")
        return ModelChoice(model, None, model, registered=model != SHIPPED)
    if model.startswith("hf-hub:"):
        raise ConfigError(
            f"--model: {model} comes from a hub, and this reads from the disk alone.",
            f"Fetch it once with `ratchet base add NAME --model {model}`, then give --model NAME.",
        )
    if weights is not None and not weights.is_file():
        raise ConfigError(f"--weights: there is no file {weights}.", "Name the model's safetensors file.")
    folder = Path(model.removeprefix("local-dir:"))
    if folder.is_dir():
        return ModelChoice(f"local-dir:{folder}", weights, name or _name(folder.resolve().name), registered=False)
    if folder.is_file() or folder.suffix == ".safetensors":
        raise ConfigError(
            f"--model: {model} is a file with weights.", f"Give its architecture: --model ViT-B-16 --weights {model}."
        )
    _check_architecture(home, model, weights)
    return ModelChoice(model, weights, name or _name(model), registered=False)


def register_model(home: Path, choice: ModelChoice) -> str:
    """Load the model, registering it where it is not; returns a line about it. The shipped one is built by `up`.

    Raises:
        ConfigError: it cannot be loaded.
    """
    from serving.engines.clip_base import list_bases, load_base

    if choice.name == SHIPPED and SHIPPED not in list_bases(home, "clip"):
        return "the shipped base, which `ratchet up` builds"
    try:
        if choice.registered:
            base = load_base(home, choice.name)
            base.build_model()
        else:
            from updater.bases.register import add_base

            base = add_base(home, choice.name, choice.model, choice.weights)
    except BaseModelError as error:
        option = "--weights" if choice.weights else "--model"
        raise ConfigError(f"{option}: {error.message}", error.fix) from error
    return f"{base.name} ({base.digest[:12]}): {base.dim} dimensions, images of {base.preprocess.size} px"


def check_broker(settings: Settings) -> str:
    """Ask the broker for the topic; returns a line about it.

    Raises:
        ConfigError: the broker does not answer within :data:`BROKER_SECONDS`, or refuses.
    """
    from streams.kafka.clients import Admin

    kafka = settings.kafka
    admin = Admin(kafka, connect_seconds=BROKER_SECONDS)
    try:
        exists = admin.topic_id(kafka.topic) is not None
    except BrokerError as error:
        raise ConfigError(
            f"--broker: {error.message}", "Correct it, or write the settings without asking it: --offline."
        ) from error
    finally:
        admin.close()
    return f"{kafka.bootstrap} answers; topic {kafka.topic} " + ("is there" if exists else "will be made by ingest")


def _check_architecture(home: Path, model: str, weights: Path | None) -> None:
    import open_clip

    config = open_clip.get_model_config(model.replace("/", "-"))
    if config is None:
        from serving.engines.clip_base import list_bases

        known = ", ".join(list_bases(home, "clip")) or "none"
        raise ConfigError(
            f"--model: {model!r} is no registered base ({known}), no folder, and no architecture of open_clip.",
            "`python -c 'import open_clip; print(open_clip.list_models())'` lists the architectures.",
        )
    if weights is None:
        raise ConfigError(
            f"--weights: {model} is an architecture without weights.", "Name its safetensors file with --weights."
        )
    vocabulary = config["text_cfg"].get("hf_tokenizer_name") or config["text_cfg"].get("hf_model_name")
    if vocabulary:
        raise ConfigError(
            f"--model: the tokenizer of {model} ({vocabulary}) comes from a hub, and this reads from the disk alone.",
            "Give a folder with open_clip_config.json, the weights and the tokenizer's files.",
        )


def _name(model: str) -> str:
    slug = "".join(char if char.isascii() and (char.isalnum() or char in "._-") else "-" for char in model.lower())
    return slug.strip("._-")[:64] or "base"
