"""Commands that run a part: ``up``, ``demo``, ``serve``, ``maintain``, ``update`` and others; ``ingest`` is beside."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

from core.errors import RatchetError
from core.progress import say, step
from core.stop_signals import Stopped, stop_on_signals
from ops.cli import context as ctx


def up(
    context: typer.Context,
    without: Annotated[
        list[str] | None, typer.Option(help="Leave a part out: broker, serve, ingest, maintain, update, console.")
    ] = None,
) -> None:
    """Start everything on this machine and show what it is doing; Ctrl-C stops it in order.

    Examples:  ratchet up    |    ratchet up --without update    |    ratchet --set serve.port=9000 up
    """
    from ops.cli.shipped import make_ready
    from ops.cli.status import screen
    from ops.cli.supervisor import Supervisor
    from ops.cli.tune import is_tuned

    shared = ctx.of(context)
    names = [name for name in Supervisor.ORDER if name not in (without or [])]
    stop_on_signals()
    try:
        make_ready(shared.settings)
        with Supervisor(shared, names) as parts:
            progress = None
            with step("starting " + ", ".join(part.name for part in parts.parts)):
                if "serve" in names:
                    progress = parts.wait_until_ready("clip")
            settings = shared.settings
            say(f"serving on {settings.serve.url} (docs at /docs)")
            if not is_tuned(settings):
                say("`ratchet doctor --tune` finds the fastest engine for this machine, in a minute or two")
            if "console" in names:
                say(f"console on {settings.console.url}")
            console = Console()
            if not console.is_terminal:
                while True:
                    parts.tend()
                    if progress is not None and progress.look():
                        progress = None
                    time.sleep(1)
            with Live(console=console, auto_refresh=False, screen=True) as live:
                while True:
                    parts.tend()
                    live.update(screen(settings, parts), refresh=True)
                    time.sleep(1)
    except Stopped:
        say("stopped")


def serve(context: typer.Context) -> None:
    """Serve over HTTP with Ray Serve, until SIGTERM.

    Example:  ratchet --set serve.encoder_replicas=4 serve
    """
    from serving.app import serve_app

    serve_app(ctx.of(context).settings)


def maintain(
    context: typer.Context,
    once: Annotated[bool, typer.Option("--once", help="Do what is to be done now, then end.")] = False,
) -> None:
    """Keep the sample store compact, delete what is to be deleted, collect garbage (`ratchet gc`), and publish events,
    until SIGTERM.

    Of several processes one works, and the others wait to take over.

    Examples:  ratchet maintain    |    ratchet maintain --once
    """
    from streams.store.maintenance import run_maintain

    settings = ctx.of(context).settings

    def collect() -> None:
        from ops.cli.gc import collect_garbage

        collect_garbage(settings)

    run_maintain(settings, once=once, collect=collect)


def console(context: typer.Context) -> None:
    """Serve the console, a web page for operators and visitors, until SIGTERM.

    Example:  ratchet --set console.port=9001 console
    """
    from ops.console.app import run_console

    run_console(ctx.of(context).settings)


def broker(context: typer.Context) -> None:
    """Run the embedded Kafka-compatible broker (memory only: for one machine and for tests), until SIGTERM.

    Example:  ratchet --set kafka.bootstrap=127.0.0.1:9092 broker
    """
    from streams.kafka.broker import run_broker

    run_broker(ctx.of(context).settings)


def demo(
    context: typer.Context,
    folder: Annotated[Path, typer.Option(help="Where the demo keeps everything.")] = Path(".ratchet/demo"),
    keep: Annotated[bool, typer.Option("--keep", help="Leave it running at the end, until Ctrl-C.")] = False,
    with_vlm: Annotated[
        bool, typer.Option("--with-vlm", help="Tell the story of the vision-language model as well: minutes more.")
    ] = False,
) -> None:
    """Show the whole loop in eight minutes: stream, learn, reject, pass, swap under load, roll back.

    Examples:  ratchet demo    |    ratchet demo --with-vlm
    """
    from ops.cli.demo.story import tell

    stop_on_signals()
    try:
        tell(folder, keep=keep, with_vlm=with_vlm)
    except Stopped:
        raise RatchetError("the demo was stopped.", "Start it again with `ratchet demo`.") from None
