"""``ratchet metrics``: scrape targets, Prometheus configuration, rules, and an exporter of one machine's replicas."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from core.errors import ConfigError
from core.progress import progress_log
from ops.cli import context as ctx

if TYPE_CHECKING:
    from core.settings import Settings
    from ops.alerts import Target

app = typer.Typer(no_args_is_help=True, help="Where Prometheus finds the metrics, and the alerts on them.")


def targets_of(settings: Settings, host: str) -> list[Target]:
    """The scrape targets on one machine: Ratchet's processes, and Ray if enabled."""
    ports = {
        "serve": settings.serve.port,
        "ingest": settings.ingest.metrics_port,
        "maintain": settings.maintain.metrics_port,
        "update": settings.updater.metrics_port,
        "ray": settings.serve.ray_metrics_port,
    }
    return [{"targets": [f"{host}:{port}"], "labels": {"process": name}} for name, port in ports.items() if port]


@app.command()
def targets(
    context: typer.Context,
    host: Annotated[str, typer.Option(help="How Prometheus reaches this machine.")] = "127.0.0.1",
) -> None:
    """Print the scrape targets as JSON, for `file_sd_configs` of Prometheus.

    Example:  ratchet metrics targets > /etc/prometheus/ratchet.json
    """
    print(json.dumps(targets_of(ctx.of(context).settings, host), indent=1))


@app.command()
def prometheus(
    context: typer.Context,
    host: Annotated[str, typer.Option(help="How Prometheus reaches this machine.")] = "127.0.0.1",
    alertmanager: Annotated[
        list[str] | None, typer.Option(help="host:port of an Alertmanager that alerts are sent to; repeatable.")
    ] = None,
    rules: Annotated[
        list[str] | None, typer.Option(help="Rule file to load; by default those that Ratchet ships; repeatable.")
    ] = None,
) -> None:
    """Print a prometheus.yml for the present settings: the scrape targets, and the alerting rules.

    Example:  ratchet metrics prometheus --alertmanager 127.0.0.1:9093 > prometheus.yml
    """
    from ops.alerts import as_yaml, prometheus_config

    settings = ctx.of(context).settings
    for name in ("ingest", "maintain", "updater"):
        if getattr(settings, name).metrics_port == 0:
            typer.echo(f"{name}.metrics_port is 0: nothing is scraped of it, and its absence is alerted.", err=True)
    config = prometheus_config(targets_of(settings, host), alertmanagers=alertmanager, rules=rules)
    typer.echo(as_yaml(config), nl=False)


@app.command()
def rules(
    runbooks: Annotated[
        str,
        typer.Option(help="URL of the folder with the runbook pages, e.g. that of docs/runbooks in your repository."),
    ] = "",
) -> None:
    """Print all alerting and recording rules as one file for Prometheus.

    Example:  ratchet metrics rules --runbooks https://git.example.com/ratchet/docs/runbooks > ratchet-rules.yml
    """
    from ops.alerts import as_yaml, rule_groups

    typer.echo(as_yaml({"groups": rule_groups(runbooks)}), nl=False)


@app.command()
def serve(
    folder: Annotated[Path, typer.Argument(help="Folder that the replicas write into.", exists=True, file_okay=False)],
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 9467,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
) -> None:
    """Export what the replicas of this machine write into their PROMETHEUS_MULTIPROC_DIR, until SIGTERM.

    For machines of a cluster that have replicas and no ingress: `/metrics` shows those of the ingress's machine only.
    It has to see the replicas' processes, to leave out the gauges of those that were killed.

    Example:  ratchet metrics serve /var/run/ratchet-metrics --host 0.0.0.0
    """
    from core import metrics

    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        raise ConfigError(
            "PROMETHEUS_MULTIPROC_DIR is set: this process would write into the folder that it reads.",
            "Unset it here; the folder is the argument.",
        )
    done = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: done.set())
    metrics.listen("serve", port, host, folder)
    progress_log.info(f"metrics of the replicas on http://{host}:{port}/metrics")
    done.wait()
