"""``ratchet init``: a settings file and suites of one's own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from core.errors import ConfigError
from core.files import replace_file
from core.loading import FILE
from core.settings import Settings
from core.settings.serving import SHIPPED
from ops.cli import context as ctx
from ops.cli.first_steps.answers import EMBEDDED, Answers, ask, settings_of
from ops.cli.first_steps.settings_yaml import settings_yaml

REFERENCE_PICTURES = 2000
"""Copied for the reference pool; the recipe `default` takes 1,500 of them."""


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
    answers = ask(shared, home, Answers(model or "", weights, data, labels, broker or "", topic or ""), yes)
    settings, chosen = settings_of(shared, answers, home)

    from ops.cli.first_steps import checks

    choice = checks.choose_model(settings.home, answers.model, answers.weights, name)
    chosen["base.clip"] = choice.name
    if choice.name != SHIPPED:
        chosen.setdefault("base.vlm", "")  # the shipped VLM takes minutes to make ready, and is asked for with --set
    broker_line, console, suites_line = _broker(settings, answers, offline), Console(), ""
    if answers.data or answers.labels:
        from ops.cli.first_steps import labelled, report, suite_files
        from ops.cli.first_steps.power import suite_power

        most = settings.gate.max_items + REFERENCE_PICTURES
        sample = labelled.read_sample(answers.data, answers.labels, settings.ingest, most)
        plan = suite_files.plan_suites(sample, held_out, settings.gate.max_items, settings.home, suites, force)
        model_line = checks.register_model(settings.home, choice)
        written = suite_files.write_suites(plan, margin or settings.gate.margin)
        chosen |= {"gate.suites": [suites], "updater.reference": [plan.data] if plan.division.rest else []}
        report.tell_sample(console, sample, plan.division)
        report.tell_suites(console, settings, [suite_power(suite, settings.gate) for suite in written])
        suites_line = f", suites in {suites}"
    elif choice.name == SHIPPED:
        model_line = checks.register_model(settings.home, choice)
    else:
        raise ConfigError(
            "--data: a model of your own needs suites of your own, and there are no pictures to make them of.",
            "Give a folder of labelled pictures with --data, or a file that lists them with --labels.",
        )
    replace_file(file, settings_yaml(chosen).encode())
    console.print(Text(f"model    {model_line}\nbroker   {broker_line}\nwritten  {file}{suites_line}"))
    console.print(Text("next     ratchet up, then ratchet publish FOLDER with new pairs (docs/quickstart.md)"))


def _broker(settings: Settings, answers: Answers, offline: bool) -> str:
    from ops.cli.first_steps.checks import check_broker

    if answers.broker == EMBEDDED:
        return f"{settings.kafka.bootstrap}, which `ratchet up` starts"
    return f"{settings.kafka.bootstrap}, not asked" if offline else check_broker(settings)
