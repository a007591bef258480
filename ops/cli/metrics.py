"""``ratchet metrics``: what Prometheus needs to scrape Ratchet and to raise alerts."""

from __future__ import annotations

from typing import Annotated

import typer

from ops.cli import context as ctx

app = typer.Typer(help="Configuration for Prometheus: what to scrape, and the alerts.", no_args_is_help=True)


@app.command()
def prometheus(
    context: typer.Context,
    alertmanager: Annotated[
        list[str] | None, typer.Option(help="host:port of an Alertmanager that alerts are sent to; repeatable.")
    ] = None,
    rules: Annotated[
        list[str] | None, typer.Option(help="Rule file to load; by default those that Ratchet ships; repeatable.")
    ] = None,
) -> None:
    """Print a prometheus.yml for the present settings: every part's port, and the alerting rules.

    Example:  ratchet metrics prometheus --alertmanager 127.0.0.1:9093 > prometheus.yml
    """
    from ops.alerts import as_yaml, prometheus_config

    settings = ctx.of(context).settings
    for name, port in (("ingest", settings.ingest.metrics_port), ("updater", settings.updater.metrics_port)):
        if port == 0:
            typer.echo(f"{name}.metrics_port is 0: nothing scrapes the {name}, and its absence is alerted.", err=True)
    typer.echo(as_yaml(prometheus_config(settings, alertmanagers=alertmanager, rules=rules)), nl=False)


@app.command()
def rules(
    runbooks: Annotated[
        str, typer.Option(help="URL of the folder with the runbook pages, e.g. that of docs/runbooks in your repository.")
    ] = "",
) -> None:
    """Print all alerting and recording rules as one file for Prometheus.

    Example:  ratchet metrics rules --runbooks https://git.example.com/ratchet/docs/runbooks > ratchet-rules.yml
    """
    from ops.alerts import as_yaml, rule_groups

    typer.echo(as_yaml({"groups": rule_groups(runbooks)}), nl=False)
