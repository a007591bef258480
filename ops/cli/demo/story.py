"""The story of the demo, one function a chapter. Every figure it prints was measured while it ran."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from rich.console import Console

from benchmarks.load import Traffic
from ops.cli.context import Context
from ops.cli.demo.picture import Change, choose, draw, search
from ops.cli.demo.summary import Facts, broken_promises, show
from ops.cli.shipped import make_ready
from ops.cli.supervisor import Supervisor
from ops.errors import RatchetError
from ops.ledger import Ledger, VerdictRow
from ops.progress import say, step, track
from ops.settings import Settings
from serving.client import Client
from streams.demo import prepare_domain
from streams.folders import FolderItem, read_folder
from streams.producer import Producer, publish
from streams.store import SampleStore

NEW_DOMAIN = "fluent3d"
REQUESTS_PER_SECOND = 4.0  # steady, and most of two cores is left to learning
PATIENCE_SECONDS = 240.0
BETTER, WORSE = 4, 2  # searches in the picture: those that gained most, and those that lost most
PROBES = 12  # images, and as many texts, that the load asks about


@dataclass
class Stage:
    """What the chapters share."""

    context: Context
    client: Client
    ledger: Ledger
    store: SampleStore
    queries: list[str] = field(default_factory=list)
    event_to_searchable_seconds: float = 0.0

    @property
    def settings(self) -> Settings:
        """The demo's settings."""
        return self.context.settings


def tell(folder: Path, keep: bool) -> None:
    """Run the demo in ``folder``. Raises RatchetError when something that was promised did not happen."""
    began = time.monotonic()
    context = _settle(folder)
    settings = context.settings
    _chapter(f"1  A base model and data that package registries ship, in {settings.home}")
    make_ready(settings)
    prepare_domain(NEW_DOMAIN, settings.home)
    with Supervisor(context, ["broker", "serve", "ingest"]) as parts:
        with step("starting broker, server and ingest"):
            parts.wait_until_ready()
        url = f"http://{settings.serve.host}:{settings.serve.port}"
        client = Client(url, operator_key=settings.operator_key(), actor="demo")
        stage = Stage(context, client, Ledger.open(settings.ledger), SampleStore(settings.lake))
        probes = _probes(settings)
        with Traffic(
            url,
            images=[item.bytes() for item in probes],
            texts=[item.text for item in probes],
            settings=settings,
            rate=REQUESTS_PER_SECOND,
        ) as traffic:
            _chapter(f"2  The stream brings a domain that the base has not seen: {NEW_DOMAIN}")
            _stream(stage)
            _chapter("3  A naive update is trained, and the gate judges it")
            naive = _learn(stage, "naive")
            _chapter("4  The default update is trained, judged, and swapped in under the load")
            default = _learn(stage, "default")
            swap = _await_release(stage, default)
            picture = _compare_searches(stage)
            _chapter("5  An operator takes it back, and forward again")
            rollback_seconds = _back_and_forth(stage, default)
        with step("comparing every answer with the release it was stamped with"):
            checked = traffic.report()
        cost = stage.ledger.update(default.update_id).cost
        facts = Facts(
            release=client.live(), naive=naive, default=default,
            requests=checked.requests, failed=checked.failed, mixed=checked.mixed,
            prepare_seconds=swap["prepare_seconds"], commit_seconds=swap["commit_seconds"],
            rollback_seconds=rollback_seconds, event_to_searchable_seconds=stage.event_to_searchable_seconds,
            budget={"planned": cost["gflops_planned"], "spent": cost["gflops_spent"]},
            seconds=time.monotonic() - began, picture=str(picture),
            report=str(Path(settings.artifacts) / default.report_key / "report.html"),
        )  # fmt: skip
        if keep:
            say(f"still serving on {url}; Ctrl-C ends it")
            _stay(parts)
    show(facts)
    if broken_promises(facts):
        raise RatchetError("the demo did not show all that it promises.", f"The logs are in {settings.home / 'logs'}.")


def _settle(folder: Path) -> Context:
    """Forget an earlier demo, but for its downloads and its base, and write the settings where a reader finds them."""
    home = folder.resolve()
    for name in ("artifacts", "lake", "logs", "updates", "cache"):
        shutil.rmtree(home / name, ignore_errors=True)
    for file in home.glob("ledger.db*"):
        file.unlink()
    home.mkdir(parents=True, exist_ok=True)
    file = home / "ratchet.yaml"
    file.write_text(yaml.safe_dump({"home": str(home)}))
    return Context(file, [])


def _probes(settings: Settings) -> list[FolderItem]:
    """What the load asks about: held-out items of the new domain, whose vectors an update moves."""
    items = [item for item in read_folder(settings.home / "data" / NEW_DOMAIN, split="test") if item.text]
    return items[:PROBES]


def _stream(stage: Stage) -> None:
    report = publish(stage.settings, stage.settings.home / "data" / NEW_DOMAIN, split="train", source="demo")
    say(str(report))
    with step("ingest"):
        _until(lambda: sum(stage.store.offsets().values()) >= report.delivered, "ingest did not finish")
    say(f"{stage.store.count(split='train')} to train on, {stage.store.count(split='fresh_eval')} kept for the gate")
    with step("embedding them for search"):
        _until(lambda: stage.client.status()["catalog"]["coverage"] >= 1.0, "the catalog was not complete")
    stage.event_to_searchable_seconds = _event_to_searchable(stage)
    say(f"one more image could be found {stage.event_to_searchable_seconds:.1f} s after it was published")
    fresh = stage.store.scan(split="fresh_eval", columns=["text"]).column("text").to_pylist()
    stage.queries = sorted({str(text) for text in fresh if text})


def _event_to_searchable(stage: Stage) -> float:
    """Publish one image of a domain of its own, and ask until a search for that domain finds it."""
    item = next(iter(read_folder(stage.settings.home / "data" / NEW_DOMAIN, split="test")))
    with Producer(stage.settings.kafka) as producer:
        began = time.monotonic()
        producer.send(image=item.bytes(), text=item.text, domain="late_arrival", source="demo")
    _until(lambda: bool(stage.client.search(text=item.text, domain=["late_arrival"])), "it was never found", pause=0.05)
    return time.monotonic() - began


def _learn(stage: Stage, recipe: str) -> VerdictRow:
    subprocess.run(stage.context.command("update", "--once", "--recipe", recipe, "--retry"), check=True)
    verdict = stage.ledger.verdicts(1)[0]
    why = f", caught by {', '.join(verdict.summary['caught_by'])}" if verdict.summary["caught_by"] else ""
    say(f"the gate says: [bold]{verdict.outcome}[/bold]{why}")
    return verdict


def _await_release(stage: Stage, verdict: VerdictRow) -> dict[str, float]:
    """Wait until the adapter is live everywhere; returns the times that the controller measured."""
    if verdict.outcome != "passed":
        report = Path(stage.settings.artifacts) / verdict.report_key / "report.html"
        raise RatchetError(f"the default update was {verdict.outcome}.", f"See {report}.")
    with step("preparing and committing the release"):
        _until(lambda: stage.client.releases(1)["data"][0]["clip"] == verdict.adapter, "it was not released")
        _until(lambda: _served(stage) is not None, "not every replica acknowledged it")
    return _served(stage) or {}


def _compare_searches(stage: Stage) -> Path:
    """Search for every held-out caption under both resident releases, and draw the largest changes."""
    live = stage.client.live()
    changes = []
    for query in track(stage.queries, "searching before and after"):
        before, after = (search(stage.client, query, f"clip@{number}") for number in (live - 1, live))
        changes.append(Change(before, after))
    better = sum(change.gain > 1 for change in changes)
    worse = sum(change.gain < 1 for change in changes)
    tops = [
        sum(side.rank == 1 for side in sides) for sides in zip(*((c.before, c.after) for c in changes), strict=True)
    ]
    title = (
        f"{len(changes)} searches for held-out captions among {stage.store.count()} images: {better} better, "
        f"{worse} worse; right image first {tops[0]} -> {tops[1]} times. "
        f"Shown: the {BETTER} largest gains and the {WORSE} largest losses."
    )
    say(title)
    return draw(stage.client, choose(changes, BETTER, WORSE), title, stage.settings.home / "searches.png")


def _served(stage: Stage) -> dict[str, float] | None:
    """What the controller recorded when every replica had acknowledged the live release."""
    subject = f"release {stage.client.live()}"
    rows = (row for row in stage.ledger.audit_rows() if row.subject == subject and row.action == "released")
    return next((row.detail for row in rows), None)


def _back_and_forth(stage: Stage, default: VerdictRow) -> float:
    """Roll back, search, roll forward; returns the seconds until every replica served the older release."""
    began = time.monotonic()
    back = stage.client.rollback("the demo wants to see the old model")
    seconds = time.monotonic() - began
    if not search(stage.client, stage.queries[0], f"clip@{back['number']}").hits:
        raise RatchetError(
            "after the rollback, a search found nothing.", "The catalog of the older release is incomplete."
        )
    say(f"release {back['number']} (the base again) was served everywhere after {seconds * 1000:.0f} ms")
    forward = stage.client.release(default.adapter, "the demo wants the better model back")
    say(f"release {forward['number']} ({default.adapter}) is live again")
    time.sleep(2)  # some answers under the last release
    return seconds


def _until(condition: Callable[[], bool], trouble: str, pause: float = 0.25) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise RatchetError(f"{trouble} within {PATIENCE_SECONDS:.0f} s.", "The logs of the demo say why.")
        time.sleep(pause)


def _stay(parts: Supervisor) -> None:
    try:
        while True:
            parts.tend()
            time.sleep(1)
    except KeyboardInterrupt:
        say("stopping")


def _chapter(title: str) -> None:
    Console(stderr=True).rule(f"[bold]{title}", align="left")
