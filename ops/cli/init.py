"""``ratchet init``: checks your model, broker and data, and only then writes a settings file and suites."""

from __future__ import annotations

import math
import os
from contextlib import closing
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from core.errors import BaseModelError, BrokerError, ConfigError
from core.files import replace_file
from core.log_format import STARS
from ops.cli import context as ctx
from ops.cli.config import settings_yaml, yaml_value
from ops.cli.terminal import on_terminal, printable, show_rows

if TYPE_CHECKING:
    from core.settings import Settings
    from ops.cli.init_suites import LabelledSample, SuitePlan, SuitePower

REFERENCE_PICTURES = 2000
"""Copied for the reference pool; the recipe `default` uses 1,500 of them."""
EMBEDDED = "embedded"
"""Means the broker that `ratchet up` starts."""
BROKER_SECONDS = 5.0
EXAMPLES = 3
FIRST_SAMPLES = 2000
"""About as many as a suite needs: a fifth is never trained on."""


@dataclass(frozen=True)
class InitAnswers:
    model: str
    weights: Path | None
    data: Path | None
    labels: Path | None
    broker: str
    topic: str


@dataclass(frozen=True)
class ModelChoice:
    model: str
    """A registered base, a folder, or an open_clip architecture."""
    weights: Path | None
    name: str
    """Name that it is, or will be, registered under."""
    registered: bool


def init(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Option(
            help="A registered base, a folder in open_clip's format, or an open_clip architecture (ViT-B-16)."
        ),
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="Safetensors file of an architecture.")] = None,
    name: Annotated[str | None, typer.Option(help="Name to register the model under; by default its own.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of pictures that the model must not get worse at; subfolders are classes."),
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="CSV or JSON Lines file with the columns file, and label or caption.")
    ] = None,
    from_stream: Annotated[
        int,
        typer.Option(
            min=0, help="Instead of --data: the first so many stored samples. If there is a settings file, it stays."
        ),
    ] = 0,
    held_out: Annotated[
        float, typer.Option(min=0.05, max=1.0, help="Share of the pictures for the suites; the rest: reference pool.")
    ] = 0.6,
    margin: Annotated[
        float | None,
        typer.Option(
            min=0.001, max=0.5, help="Loss that an update must exclude; the setting gate.margin if not given."
        ),
    ] = None,
    broker: Annotated[
        str | None, typer.Option(help="host:port of Kafka brokers, comma separated; 'embedded': the one of `up`.")
    ] = None,
    topic: Annotated[str | None, typer.Option(help="Topic with the new pairs.")] = None,
    home: Annotated[
        Path | None, typer.Option(help="Folder of everything that Ratchet keeps; .ratchet if not given.")
    ] = None,
    suites: Annotated[Path, typer.Option(help="Folder for the suites.")] = Path("suites"),
    offline: Annotated[bool, typer.Option("--offline", help="Do not ask the broker whether it is there.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing; what is not given is the default.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the settings file, the suites and their data.")
    ] = False,
) -> None:
    """Check a model, a broker and data of your own; write ratchet.yaml and suites, and say what these can show.

    On a terminal it asks for what is not given. Each --set goes into the file: ratchet --set serve.port=9000 init ...

    Examples:  ratchet init    |    ratchet init --model ViT-B-16 --weights b16.safetensors --data pictures/

    ratchet init --model my-clip/ --labels sample.csv --broker kafka-1:9092 --topic shop.pairs --yes
    """
    from core.loading import FILE
    from core.settings.serving import SHIPPED

    shared = ctx.of(context)
    file = shared.file or Path(os.environ.get("RATCHET_CONFIG", FILE))
    if from_stream and (data or labels):
        raise ConfigError("--from-stream: the pictures come from --data or --labels already.", "Leave one out.")
    if from_stream and file.exists():
        settings = shared.settings
        wanted = _write_suites(settings, _plan(settings, None, None, from_stream, held_out, suites, force), margin)
        missing = {each: value for each, value in wanted.items() if value != attrgetter(each)(settings)}
        typer.echo(f"written  suites in {suites}")
        for each, value in missing.items():
            typer.echo(f"next     set {each} in {file} to {yaml_value(value)}")
        return
    if file.exists() and not force:
        raise ConfigError(f"{file} exists already.", "Replace it with --force, or write another: ratchet -c FILE init.")
    answers = _ask(shared, home, InitAnswers(model or "", weights, data, labels, broker or "", topic or ""), yes)
    settings, chosen = _settings(shared, answers, home)
    choice = _choose_model(settings.home, answers.model, answers.weights, name)
    chosen["base.clip"] = choice.name
    if choice.name != SHIPPED:
        chosen.setdefault("base.vlm", "")  # the shipped VLM takes minutes to prepare: only with --set
    broker_line, suites_line = _broker(settings, answers, offline), ""
    plan = None
    if answers.data or answers.labels or from_stream:
        plan = _plan(settings, answers.data, answers.labels, from_stream, held_out, suites, force)
    model_line = _register_model(settings.home, choice)
    if plan is not None:
        chosen |= _write_suites(settings, plan, margin)
        suites_line = f", suites in {suites}"
    elif choice.name != SHIPPED:
        from ops.cli.init_suites import STREAM

        chosen |= {"gate.suites": [suites], "updater.reference": [settings.home / "data" / STREAM]}
        make = f"ratchet init --from-stream {FIRST_SAMPLES}"
        suites_line = f"\nsuites   none: nothing is trained until `{make}` makes them of stored samples"
    replace_file(file, settings_yaml(chosen).encode())
    typer.echo(f"model    {model_line}\nbroker   {broker_line}\nwritten  {file}{suites_line}")
    typer.echo("next     ratchet up, then ratchet publish FOLDER with new pairs (docs/quickstart.md)")


def _ask(shared: ctx.Context, home: Path | None, given: InitAnswers, yes: bool) -> InitAnswers:
    from core.settings.serving import SHIPPED

    defaults = _load(shared, {} if home is None else {"home": home})
    by_flag = {each for each, origin in defaults.origins.items() if origin == "flag"}
    asking = on_terminal() and not yes
    if not (asking or yes or given.model or "base.clip" in by_flag):
        raise ConfigError(
            "--model is not given, and there is no terminal to ask on.", "Give it, or --yes for defaults."
        )

    def answer(value: str, question: str, default: str) -> str:
        return value or (typer.prompt(question, default=default).strip() if asking else default)

    def path(value: Path | None, question: str) -> Path | None:
        if value is not None or not asking:
            return value
        text = typer.prompt(question, default="", show_default=False).strip()
        return Path(text).expanduser() if text else None

    model = answer(given.model, "Model: a registered base, a folder, or an open_clip architecture", defaults.base.clip)
    weights, data, labels = given.weights, given.data, given.labels
    if asking and not (Path(model).is_dir() or model == SHIPPED or model in _bases(defaults.home)):
        weights = path(weights, "Its weights, a safetensors file")
    if labels is None:
        data = path(data, "Folder of pictures that the model must not get worse at (none: empty)")
        if data is not None:
            labels = path(labels, "File with their labels or captions (subfolders are the classes: empty)")
    bootstrap = defaults.kafka.bootstrap if "kafka.bootstrap" in by_flag else EMBEDDED
    broker = answer(given.broker, "Kafka brokers, host:port; embedded: one for this machine", bootstrap)
    topic = answer(given.topic, "Topic with new pairs", defaults.kafka.topic)
    return InitAnswers(model, weights, data, labels, broker, topic)


def _settings(shared: ctx.Context, answers: InitAnswers, home: Path | None) -> tuple[Settings, dict[str, Any]]:
    """The resulting settings, and the chosen ones by name."""
    from core.loading import describe

    named: dict[str, Any] = {"kafka.topic": answers.topic}
    if answers.broker != EMBEDDED:
        named["kafka.bootstrap"] = answers.broker
    if home is not None:
        named["home"] = home
    settings = _load(shared, named)
    flags = [flag.partition("=")[0].strip() for flag in shared.flags]
    shown = {row: str(value) for row, value, _, _ in describe(settings)}
    for flag in flags:
        if STARS in shown[flag]:
            variable = f"RATCHET_{flag.upper().replace('.', '__')}"
            raise ConfigError(f"--set {flag} is a secret, and is not written to a file.", f"Set {variable} instead.")
    return settings, {each: attrgetter(each)(settings) for each in [*flags, *named]}


def _load(shared: ctx.Context, named: dict[str, Any]) -> Settings:
    """Loads no settings file: an existing one will be replaced."""
    from core.loading import load_settings

    return load_settings(Path(os.devnull), {**shared.overrides, **named})


def _bases(home: Path) -> list[str]:
    from serving.engines.clip_base import list_bases

    return list_bases(home, "clip")


def _choose_model(home: Path, model: str, weights: Path | None, name: str | None) -> ModelChoice:
    """Resolve ``--model`` without writing anything. Raises ConfigError when it is not on this disk."""
    from core.settings.serving import SHIPPED
    from ops.cli.init_suites import slug

    if model in _bases(home) or model == SHIPPED:
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
        return ModelChoice(f"local-dir:{folder}", weights, name or slug(folder.resolve().name), registered=False)
    if folder.is_file() or folder.suffix == ".safetensors":
        raise ConfigError(
            f"--model: {model} is a file with weights.", f"Give its architecture: --model ViT-B-16 --weights {model}."
        )
    _check_architecture(home, model, weights)
    return ModelChoice(model, weights, name or slug(model), registered=False)


def _check_architecture(home: Path, model: str, weights: Path | None) -> None:
    import open_clip

    config = open_clip.get_model_config(model.replace("/", "-"))
    if config is None:
        known = ", ".join(_bases(home)) or "none"
        raise ConfigError(
            f"--model: {model!r} is not a registered base ({known}), a folder, or an architecture of open_clip.",
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


def _register_model(home: Path, choice: ModelChoice) -> str:
    """Load the model, registering it if necessary; returns a line about it. Raises ConfigError."""
    from core.settings.serving import SHIPPED
    from serving.engines.clip_base import load_base
    from updater.bases.register import add_base

    if choice.name == SHIPPED and SHIPPED not in _bases(home):
        return "the shipped base, which `ratchet up` builds"
    try:
        if choice.registered:
            base = load_base(home, choice.name)
            base.build_model()
        else:
            base = add_base(home, choice.name, choice.model, choice.weights)
    except BaseModelError as error:
        option = "--weights" if choice.weights else "--model"
        raise ConfigError(f"{option}: {error.message}", error.fix) from error
    return f"{base.name} ({base.digest[:12]}): {base.dim} dimensions, images of {base.preprocess.size} px"


def _broker(settings: Settings, answers: InitAnswers, offline: bool) -> str:
    """Ask the broker for the topic; returns a line about it. Raises ConfigError."""
    from streams.kafka.clients import Admin

    kafka = settings.kafka
    if answers.broker == EMBEDDED:
        return f"{kafka.bootstrap}, which `ratchet up` starts"
    if offline:
        return f"{kafka.bootstrap}, not asked"
    try:
        with closing(Admin(kafka, connect_seconds=BROKER_SECONDS)) as admin:
            exists = admin.topic_id(kafka.topic) is not None
    except BrokerError as error:
        fix = "Correct it, or write the settings without asking it: --offline."
        raise ConfigError(f"--broker: {error.message}", fix) from error
    return f"{kafka.bootstrap} answers; topic {kafka.topic} " + ("is there" if exists else "will be made by ingest")


def _plan(
    settings: Settings,
    data: Path | None,
    labels: Path | None,
    from_stream: int,
    held_out: float,
    suites: Path,
    replace: bool,
) -> tuple[LabelledSample, SuitePlan]:
    from ops.cli.init_suites import plan_suites, read_sample, read_stream
    from streams.store.sample_store import SampleStore

    most = settings.gate.max_items + REFERENCE_PICTURES
    if from_stream:
        sample = read_stream(SampleStore(settings.lake), min(from_stream, most), settings.ingest)
    else:
        sample = read_sample(data, labels, settings.ingest, most)
    return sample, plan_suites(sample, held_out, settings.gate.max_items, settings.home, suites, replace)


def _write_suites(
    settings: Settings, planned: tuple[LabelledSample, SuitePlan], margin: float | None
) -> dict[str, Any]:
    """Write suites and reference pool, print what they can show, and return the settings that they need."""
    from ops.cli.init_suites import mean_excluded, suite_power, write_suites

    sample, plan = planned
    powers = [suite_power(suite, settings.gate) for suite in write_suites(plan, margin or settings.gate.margin)]
    wanted: dict[str, Any] = {"gate.suites": [plan.suites], "updater.reference": [plan.data] if plan.rest else []}
    if (excluded := mean_excluded(powers, settings.gate)) > settings.gate.mean_margin:
        wanted["gate.mean_margin"] = math.ceil(200 * excluded) / 200
    _tell(settings, sample, plan, powers, wanted.get("gate.mean_margin", settings.gate.mean_margin))
    return wanted


def _tell(
    settings: Settings, sample: LabelledSample, plan: SuitePlan, powers: list[SuitePower], mean_margin: float
) -> None:
    """Print how pictures are used, and which loss and gain the suites can detect."""
    from ops.cli.init_suites import JUDGED, fresh_needed
    from updater.gate.statistics import POWER

    gate, console = settings.gate, Console()
    held_out, rest = len(plan.held_out), len(plan.rest)
    typer.echo(f"data     {sample.listed:,} pictures: {held_out:,} held out for suites, {rest:,} are a reference pool")
    if sample.unusable:
        first = "".join(f"\n         {printable(why)}" for why in sample.unusable[:EXAMPLES])
        typer.echo(f"         {len(sample.unusable):,} cannot be used:{first}")
    rows = (
        {"suite": each.suite.name, "items": each.items, "independent": each.units,
         "excludes a loss of": f"{100 * each.excludes:.1f} points", "margin": f"{100 * each.margin:.1f}",
         "enough": each.enough}
        for each in powers
    )  # fmt: skip
    show_rows(rows, "Suites")
    typer.echo(f"         with a chance of {POWER:.0%}, where an update changes nothing; a larger loss shows")
    for each in powers:
        if each.advice:
            console.print(Text(f"         {each.suite.name}: {each.advice}", style="yellow"))
    typer.echo(f"mean     a mean loss of {100 * mean_margin:g} points over them is excluded (gate.mean_margin)")
    needed, share = fresh_needed(gate), settings.ingest.fresh_eval_share
    pairs = f", about {needed / share / JUDGED:,.0f} new pairs ({share:.0%} are never trained on)" if share else ""
    typer.echo(f"gain     one of {100 * gate.detect:g} points (gate.detect) shows with {needed:,} fresh items{pairs}")
