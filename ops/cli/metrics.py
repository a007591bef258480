"""``ratchet metrics``: where Prometheus finds them, what it raises alerts on, and a port for those of one machine."""

from __future__ import annotations

import json
import signal
import threading
from typing import Annotated, TypedDict

import typer

from ops import metrics
from ops.cli import context as ctx
from ops.errors import ConfigError
from ops.progress import say
from ops.settings import Settings

app = typer.Typer(no_args_is_help=True, help="What Prometheus scrapes, and the alerts.")


class Target(TypedDict):
    """One entry of a file that Prometheus reads with ``file_sd_configs``."""

    targets: list[str]
    labels: dict[str, str]


def targets_of(settings: Settings, host: str) -> list[Target]:
    """What is to be scraped of a Ratchet on one machine: its own processes, and Ray where that is switched on."""
    ports = {
        "serve": settings.serve.port,
        "ingest": settings.ingest.metrics_port,
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
def serve(
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 9466,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
) -> None:
    """Export what the serving processes of this machine wrote into PROMETHEUS_MULTIPROC_DIR, until SIGTERM.

    For machines of a cluster that have replicas and no ingress: `/metrics` shows those of the ingress's machine only.
    """
    if not metrics.shares_a_folder():
        raise ConfigError(
            "PROMETHEUS_MULTIPROC_DIR is not set, or is no folder.",
            "Set it to the folder that the replicas of this machine write their metrics into.",
        )
    done = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: done.set())
    metrics.listen("serve", port, host)
    say(f"metrics of the replicas on http://{host}:{port}/metrics")
    done.wait()


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
        str,
        typer.Option(help="URL of the folder with the runbook pages, e.g. that of docs/runbooks in your repository."),
    ] = "",
) -> None:
    """Print all alerting and recording rules as one file for Prometheus.

    Example:  ratchet metrics rules --runbooks https://git.example.com/ratchet/docs/runbooks > ratchet-rules.yml
    """
    from ops.alerts import as_yaml, rule_groups

    typer.echo(as_yaml({"groups": rule_groups(runbooks)}), nl=False)
