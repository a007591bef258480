"""``ratchet init``: a settings file and suites of one's own."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ops.cli import context as ctx
from ops.cli.cells import printable
from ops.cli.context import Context
from ops.cli.first_steps.settings_yaml import settings_yaml
from ops.errors import ConfigError
from ops.files import replace_file
from ops.loading import FILE, STARS, describe, load_settings
from ops.settings import Settings

if TYPE_CHECKING:
    from ops.cli.first_steps.labelled import LabelledSample
    from ops.cli.first_steps.power import SuitePower
    from ops.cli.first_steps.suite_files import Division

EMBEDDED = "embedded"
REFERENCE_PICTURES = 2000
"""Copied for the reference pool; the recipe `default` takes 1,500 of them."""
EXAMPLES = 3


@dataclass(frozen=True)
class Answers:
    """What was asked, or given as options."""

    model: str
    weights: Path | None
    data: Path | None
    labels: Path | None
    broker: str
    topic: str


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
    held_out: Annotated[
        float, typer.Option(min=0.05, max=1.0, help="Share of the pictures for the suites; the rest: reference pool.")
    ] = 0.5,
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
    shared = ctx.of(context)
    file = shared.file or Path(os.environ.get("RATCHET_CONFIG", FILE))
    if file.exists() and not force:
        raise ConfigError(f"{file} exists already.", "Replace it with --force, or write another: ratchet -c FILE init.")
    answers = _answers(shared, home, Answers(model or "", weights, data, labels, broker or "", topic or ""), yes)
    settings, chosen = _settings(shared, answers, home)

    from ops.cli.first_steps import checks

    choice = checks.choose_model(settings.home, answers.model, answers.weights, name)
    chosen["base.clip"] = choice.name
    if choice.name != checks.SHIPPED:
        chosen.setdefault("base.vlm", "")
    embedded = answers.broker == EMBEDDED
    said = f"{settings.kafka.bootstrap}, which `ratchet up` starts" if embedded else "not asked"
    if not (embedded or offline):
        said = checks.check_broker(settings)
    powers: list[SuitePower] = []
    console = Console()
    if answers.data or answers.labels:
        from ops.cli.first_steps.power import suite_power
        from ops.cli.first_steps.suite_files import plan_suites, write_suites

        sample = _sample(settings, answers)
        plan = plan_suites(sample, held_out, settings.gate.max_items, settings.home, suites, force)
        model_line = checks.register_model(settings.home, choice)
        written = write_suites(plan, margin or settings.gate.margin)
        powers = [suite_power(suite, settings.gate) for suite in written]
        chosen["gate.suites"] = [suites]
        if plan.division.rest:
            chosen["updater.reference"] = [plan.data]
        _tell_sample(console, sample, plan.division)
    elif choice.name == checks.SHIPPED:
        model_line = checks.register_model(settings.home, choice)
    else:
        raise ConfigError(
            "--data: a model of your own needs suites of your own, and there are no pictures to make them of.",
            "Give a folder of labelled pictures with --data, or a file that lists them with --labels.",
        )
    replace_file(file, settings_yaml(chosen).encode())
    console.print(Text(f"model    {model_line}\nbroker   {said}"))
    if powers:
        _tell_suites(console, settings, powers)
    console.print(Text(f"written  {file}" + (f", suites in {suites}" if powers else "")))
    console.print(Text("next     ratchet up, then ratchet publish FOLDER with new pairs (docs/quickstart.md)"))


def on_terminal() -> bool:
    """Whether somebody can be asked."""
    return sys.stdin.isatty()


def _answers(shared: Context, home: Path | None, given: Answers, yes: bool) -> Answers:
    """What was given, what is answered on a terminal, and defaults."""
    defaults = _load(shared, {} if home is None else {"home": home})
    by_flag = {each for each, origin in defaults.origins.items() if origin == "flag"}
    ask = on_terminal() and not yes
    if not (ask or yes or given.model or "base.clip" in by_flag):
        raise ConfigError(
            "--model is not given, and there is no terminal to ask on.", "Give it, or --yes for defaults."
        )

    def answer(value: str, question: str, default: str) -> str:
        return value or (typer.prompt(question, default=default).strip() if ask else default)

    def path(value: Path | None, question: str) -> Path | None:
        if value is not None or not ask:
            return value
        told = typer.prompt(question, default="", show_default=False).strip()
        return Path(told).expanduser() if told else None

    model = answer(given.model, "Model: a registered base, a folder, or an open_clip architecture", defaults.base.clip)
    weights, data, labels = given.weights, given.data, given.labels
    if ask and not (Path(model).is_dir() or _is_registered(defaults.home, model)):
        weights = path(weights, "Its weights, a safetensors file")
    if labels is None:
        data = path(data, "Folder of pictures that the model must not get worse at (none: empty)")
        if data is not None:
            labels = path(labels, "File with their labels or captions (subfolders are the classes: empty)")
    bootstrap = defaults.kafka.bootstrap if "kafka.bootstrap" in by_flag else EMBEDDED
    broker = answer(given.broker, "Kafka brokers, host:port; embedded: one for this machine", bootstrap)
    topic = answer(given.topic, "Topic with new pairs", defaults.kafka.topic)
    return Answers(model, weights, data, labels, broker, topic)


def _is_registered(home: Path, model: str) -> bool:
    from serving.engines.base import list_bases

    return model == "shipped" or model in list_bases(home, "clip")


def _settings(shared: Context, answers: Answers, home: Path | None) -> tuple[Settings, dict[str, Any]]:
    """The settings that will be in effect, and those of them that go into the file."""
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
    defaults = {row: value for row, value, _, _ in describe(Settings())}
    chosen = {each: _value(settings, each) for each in [*flags, *named]}
    return settings, {each: value for each, value in chosen.items() if value != defaults[each]}


def _load(shared: Context, named: dict[str, Any]) -> Settings:
    """Without a settings file: the one that is there is to be replaced."""
    return load_settings(Path(os.devnull), {**shared.overrides, **named})


def _value(settings: Settings, name: str) -> Any:
    value: Any = settings
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _sample(settings: Settings, answers: Answers) -> LabelledSample:
    from ops.cli.first_steps.labelled import read_sample

    most = settings.gate.max_items + REFERENCE_PICTURES
    return read_sample(answers.data, answers.labels, settings.ingest, most)


def _tell_sample(console: Console, sample: LabelledSample, division: Division) -> None:
    held_out, rest = len(division.held_out), len(division.rest)
    console.print(
        Text(f"data     {sample.listed:,} pictures: {held_out:,} held out for suites, {rest:,} are a reference pool")
    )
    if sample.unusable:
        first = "".join(f"\n         {printable(why)}" for why in sample.unusable[:EXAMPLES])
        console.print(Text(f"         {len(sample.unusable):,} cannot be used:{first}"))


def _tell_suites(console: Console, settings: Settings, powers: list[SuitePower]) -> None:
    from ops.cli.first_steps.power import fresh_needed

    gate = settings.gate
    table = Table("suite", "items", "independent", "excludes a loss of", "margin", "enough")
    for each in powers:
        shown = f"{100 * each.excludes:.1f} points", f"{100 * each.margin:.1f}", "yes" if each.enough else "no"
        table.add_row(each.suite.name, f"{each.items:,}", f"{each.units:,}", *shown)
    console.print(table)
    console.print(
        Text(f"         with a chance of {gate.power:.0%}, where an update changes nothing; a larger loss shows")
    )
    for each in powers:
        if each.advice:
            console.print(Text(f"         {each.suite.name}: {each.advice}", style="yellow"))
    needed, share = fresh_needed(gate), settings.ingest.fresh_eval_share
    pairs = f", about {needed / share:,.0f} new pairs ({share:.0%} of them are never trained on)" if share else ""
    console.print(
        Text(f"gain     one of {100 * gate.detect:g} points (gate.detect) shows with {needed:,} fresh items{pairs}")
    )
