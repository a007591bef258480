"""The story of the demo, one function a chapter. Every figure it prints was measured while it ran."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import yaml
from rich.console import Console

from benchmarks.load import Traffic
from ops.cli.context import Context
from ops.cli.demo.picture import Search, draw, search
from ops.cli.demo.summary import Facts, broken_promises, show
from ops.cli.supervisor import MALLOC, Supervisor
from ops.errors import RatchetError
from ops.ledger import Ledger, ReleaseRow, VerdictRow
from ops.progress import say, step
from serving.client import Client
from serving.engines.clip import ClipEngine
from streams.folders import read_folder
from streams.producer import publish
from streams.store import SampleStore

NEW_DOMAIN = "fluent3d"
REFERENCE = ("noto", "pixel_ultica")  # base domains with the best texts
REQUESTS_PER_SECOND = 4.0  # a steady load that leaves most of two cores to learning
RELEASE_TIMEOUT_SECONDS = 180.0
SEARCHES = 5


@dataclass
class Stage:
    """What the chapters share."""

    context: Context
    url: str
    client: Client
    ledger: Ledger
    store: SampleStore
    traffic: Traffic
    before: list[Search] = field(default_factory=list)
    event_to_searchable_seconds: float = 0.0


def tell(folder: Path, keep: bool) -> None:
    """Run the demo in ``folder``. Raises RatchetError when something that was promised did not happen."""
    began = time.monotonic()
    context = _settle(folder)
    settings = context.settings
    _chapter("1  Base model and data, from packages that registries ship")
    _prepare(context)
    with Supervisor(context, ["broker", "serve", "ingest"]) as parts:
        with step("starting broker, server and ingest"):
            parts.wait_until_ready()
        url = f"http://{settings.serve.host}:{settings.serve.port}"
        client = Client(url, operator_key=settings.operator_key(), actor="demo")
        stage = Stage(
            context, url, client, Ledger.open(settings.ledger), SampleStore(settings.lake), _traffic(context, url)
        )
        with stage.traffic:
            _chapter(f"2  The stream brings a domain that the base has not seen: {NEW_DOMAIN}")
            _stream(stage)
            _chapter("3  A naive update is trained, and the gate rejects it")
            naive = _learn(stage, "naive")
            _chapter("4  The default update is trained, passes, and is swapped in under the load")
            default = _learn(stage, "default")
            swapped = _await_release(stage, default) if default.outcome == "passed" else None
            picture = _after(stage, folder)
            _chapter("5  An operator takes it back, and forward again")
            rollback_seconds = _back_and_forth(stage, default) if swapped else 0.0
            live = stage.ledger.live()
            assert live is not None
        checked = stage.traffic.report()
        update = stage.ledger.update(default.update_id)
        timing = _timing(stage, swapped) if swapped else {}
        facts = Facts(
            release=live.number, naive=naive, default=default, requests=checked.requests, failed=checked.failed,
            mixed=checked.mixed, prepare_seconds=timing.get("prepare_seconds", 0.0),
            commit_seconds=timing.get("commit_seconds", 0.0), rollback_seconds=rollback_seconds,
            event_to_searchable_seconds=stage.event_to_searchable_seconds,
            budget={"planned": update.cost.get("gflops_planned", 0.0), "spent": update.cost.get("gflops_spent", 0.0)},
            seconds=time.monotonic() - began, report=_report(context, default), picture=str(picture),
        )  # fmt: skip
        if keep:
            say(f"still serving on {url}; Ctrl-C ends it")
            _wait_for_interrupt(parts)
    show(facts)
    if broken_promises(facts):
        raise RatchetError("the demo did not show all that it promises.", f"The logs are in {settings.home / 'logs'}.")


def _settle(folder: Path) -> Context:
    """Write the demo's settings where a reader finds them, and start from nothing but the prepared data."""
    home = folder.resolve()
    _forget(home)
    data = [str(home / "data" / domain) for domain in REFERENCE]
    file = home / "ratchet.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump({"home": str(home), "updater": {"reference": data}}, sort_keys=False))
    return Context(file, [])


def _forget(home: Path) -> None:
    """Remove what an earlier demo left, but for downloaded packages, rendered data and the base."""
    import shutil

    for name in ("artifacts", "lake", "logs", "updates", "metrics"):
        shutil.rmtree(home / name, ignore_errors=True)
    for file in home.glob("ledger.db*"):
        file.unlink()


def _prepare(context: Context) -> None:
    from ops.cli.shipped import make_shipped_ready
    from streams.demo import prepare_domain

    make_shipped_ready(context.settings)
    for domain in (NEW_DOMAIN, *REFERENCE):
        prepare_domain(domain, context.settings.home)


def _traffic(context: Context, url: str) -> Traffic:
    """A steady load of image and text embeddings, whose answers are compared with a local engine's."""
    items = [item for item in read_folder(context.settings.home / "data" / NEW_DOMAIN, split="test") if item.text]
    return Traffic(
        url,
        images=[item.bytes() for item in items[:12]],
        texts=[item.text for item in items[:12]],
        rate=REQUESTS_PER_SECOND,
        settings=context.settings,
    )


def _stream(stage: Stage) -> None:
    settings = stage.context.settings
    folder = settings.home / "data" / NEW_DOMAIN
    report = publish(settings, folder, split="train", source="demo")
    say(str(report))
    with step("ingest"):
        _until(lambda: stage.store.count() > 0 and sum(stage.store.offsets().values()) >= report.delivered)
    say(f"{stage.store.count(split='train')} to train on, {stage.store.count(split='fresh_eval')} kept for the gate")
    with step("the catalog embeds them"):
        _until(lambda: stage.client.status()["catalog"]["coverage"] >= 1.0)
    stage.event_to_searchable_seconds = _event_to_searchable(stage)
    say(f"a new image could be found {stage.event_to_searchable_seconds:.1f} s after it was published")
    rows = stage.store.scan(split="fresh_eval", columns=["text"]).column("text").to_pylist()
    stage.queries = _distinct(rows)  # type: ignore[attr-defined]


def _event_to_searchable(stage: Stage) -> float:
    return 0.0


def _learn(stage: Stage, recipe: str) -> VerdictRow:
    command = stage.context.command("update", "--once", "--recipe", recipe, "--retry")
    import os

    subprocess.run(command, check=True, env={**os.environ, **MALLOC})
    verdict = stage.ledger.verdicts(1)[0]
    say(f"verdict: {verdict.outcome} " + ", ".join(verdict.summary["caught_by"]))
    return verdict


def _await_release(stage: Stage, verdict: VerdictRow) -> ReleaseRow:
    _until(lambda: (live := stage.ledger.live()) is not None and live.clip == verdict.adapter)
    live = stage.ledger.live()
    assert live is not None
    return live


def _until(condition: Callable[[], bool], timeout: float = RELEASE_TIMEOUT_SECONDS) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise RatchetError(f"nothing happened within {timeout:.0f} s.", "See the logs of the demo.")
        time.sleep(0.25)
