"""``ratchet metrics``: what Prometheus needs to scrape Ratchet and to raise alerts."""

from __future__ import annotations

import os
import signal
from typing import Annotated

import typer

from ops.cli import context as ctx
from ops.errors import ConfigError

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


@app.command()
def serve(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 9466,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
) -> None:
    """Export what the serving processes of this machine (this pod) have recorded, until SIGTERM.

    The server's own /metrics covers the machine of its ingress. On several machines this runs beside the replicas of
    each, and needs their PROMETHEUS_MULTIPROC_DIR.

    Example:  PROMETHEUS_MULTIPROC_DIR=/run/ratchet/metrics ratchet metrics serve --host 0.0.0.0
    """
    from ops.metrics.exposition import FOLDER, listen

    if FOLDER not in os.environ:
        raise ConfigError(f"{FOLDER} is not set.", "Set it to the folder that the serving processes write to.")
    signals = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # before the server's thread starts, which inherits the mask
    listen("serve", port, host)
    typer.echo(f"metrics of {os.environ[FOLDER]} on http://{host}:{port}/metrics")
    signal.sigwait(signals)
