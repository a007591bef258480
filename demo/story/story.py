"""The story of the demo. All figures it prints are measured while it runs."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import yaml

from core.addresses import listens
from core.errors import RatchetError
from core.ledger import Ledger
from core.progress import progress_log, step
from core.settings import Settings
from core.settings.serving import SHIPPED_VLM
from core.stop_signals import Stopped, undisturbed
from demo.data import QUESTIONS, DemoData, Preparation
from demo.first_start import clip_data, make_clip, make_vlm, vlm_data
from demo.load.probes import Question
from demo.load.traffic import Report, Traffic
from demo.story import captions, questions
from demo.story.page import Story, write_page
from demo.story.screen import Screen, StoryProgress, plan_chapters
from demo.story.stage import Stage
from demo.story.summary import Facts, Lesson, broken_promises, show
from ops.cli.context import Context
from ops.cli.supervisor import Supervisor
from ratchet_client import Client
from serving.engines.vlm import vllm_start
from streams.publish.folders import FolderItem, read_folder
from streams.store.sample_store import SampleStore
from updater.gate.suites import load_suites

REQUESTS_PER_SECOND = 4.0  # steady; leaves most of two cores to learning
PROBES = 12  # number of images, of texts, and of questions in the load
GFLOPS_PER_UPDATE = 2_300.0
"""About 117 of 200 steps of the default CLIP update: most of what 1,300 pictures teach, in 60% of the time."""
PARTS = ["console", "broker", "serve", "ingest"]
PORTS = 20
"""Ports tried for each of server, console and broker, from the usual one on."""


def tell(folder: Path, keep: bool, with_vlm: bool = False) -> None:
    """Run the demo in ``folder``. Raises RatchetError when it did not show what it promises."""
    story = StoryProgress(plan_chapters(captions.DOMAIN, questions.DOMAIN if with_vlm else ""))
    context = _settle(folder, with_vlm)
    settings = context.settings
    with Screen(story, {"console": settings.console.url, "API": f"{settings.serve.url}/docs"}) as screen:
        facts = _tell(context, screen, keep)
    show(facts)
    if broken_promises(facts):
        raise RatchetError("the demo did not show all that it promises.", f"The logs are in {settings.home / 'logs'}.")


def _tell(context: Context, screen: Screen, keep: bool) -> Facts:
    settings, story = context.settings, screen.story
    if not settings.base.vlm:
        progress_log.info(
            "CLIP's story; `ratchet demo --with-vlm` tells that of the vision-language model as well, in 5 minutes more"
        )
    elif not vllm_start.installed():
        progress_log.info(
            f"without vLLM transformers serves the VLM, which is slower; to install it: {vllm_start.INSTALL}"
        )
    wanted = _data(settings)
    with ExitStack() as running:
        with screen.chapter("start"):
            with undisturbed():  # on the stack before an interrupt can come
                data = running.enter_context(Preparation(wanted, settings.home))
            make_clip(settings)
            make_vlm(settings)
            parts = running.enter_context(Supervisor(context, PARTS))
            starting = parts.wait_until_ready("clip")
            data.wait(captions.DOMAIN)
        client = Client(settings.serve.url, settings.operator_key().get_secret_value(), actor="demo")
        stage = Stage(context, screen, parts, client, Ledger.open(settings.ledger), SampleStore(settings.lake))
        with _traffic(settings) as traffic:
            with screen.chapter("stream"):
                first_search, searchable = captions.stream(stage, story.began)
                with step("drawing what the gate asks about"):
                    data.wait(*(each.name for each in wanted if each.name not in QUESTIONS))
            clip, searches = captions.learn(stage)
        loads = [traffic]
        vlm, comparison = None, None
        if settings.base.vlm:
            with screen.chapter("questions"):
                data.wait_for_all()
                starting.wait_for("vlm", parts.work, parts.check)
                loads.append(_traffic(settings, _questions(settings)))
                running.enter_context(loads[-1])
                questions.stream(stage)
            vlm, comparison = questions.learn(stage)
            loads[-1].stop()
        with screen.chapter("check"), step("comparing every answer with the release it was stamped with"):
            checked = [load.report() for load in loads]
        facts = _facts(stage, clip, vlm, checked, first_search, searchable)
        content = Story(
            facts, story.plan, searches, comparison, [sample for report in checked for sample in report.samples],
            stage.ledger.releases()[::-1],
            {suite.name: suite.description for suite in load_suites([], settings.home)},
        )  # fmt: skip
        progress_log.info(f"the story with pictures: {write_page(content, client.sample_image, Path(facts.page))}")
        if keep:
            progress_log.info(f"still serving on {settings.serve.url}; Ctrl-C ends it")
            _stay(parts)
    return facts


def _settle(folder: Path, with_vlm: bool) -> Context:
    """Delete an earlier demo except downloads and bases, and write the settings file."""
    home = folder.resolve()
    for name in ("artifacts", "lake", "logs", "updates", "cache"):
        shutil.rmtree(home / name, ignore_errors=True)
    for file in home.glob("ledger.db*"):
        file.unlink()
    home.mkdir(parents=True, exist_ok=True)
    file = home / "ratchet.yaml"
    usual = Settings()
    serve, console, broker = _free_ports(
        f"{usual.serve.host}:{usual.serve.port}", f"{usual.console.host}:{usual.console.port}", usual.kafka.bootstrap
    )
    settings = {
        "home": str(home),
        "base": {"vlm": SHIPPED_VLM if with_vlm else ""},
        "budget": {"gflops_per_update": GFLOPS_PER_UPDATE},
        "serve": {"port": int(serve.rpartition(":")[2])},
        "console": {"port": int(console.rpartition(":")[2])},
        "kafka": {"bootstrap": broker},
    }
    file.write_text(yaml.safe_dump(settings))
    return Context(file, [])


def _free_ports(*usual: str) -> list[str]:
    """Each address, or a later port if another process listens there; all are distinct."""
    free: list[str] = []
    for address in usual:
        host, _, first = address.rpartition(":")
        near = (f"{host}:{port}" for port in range(int(first), int(first) + PORTS))
        free.append(next((each for each in near if each not in free and not listens(each)), address))
    return free


def _data(settings: Settings) -> list[DemoData]:
    of_questions = [DemoData(questions.DOMAIN)] if settings.base.vlm else []
    return [DemoData(captions.DOMAIN), *clip_data(settings), *vlm_data(settings), *of_questions]


def _traffic(settings: Settings, vlm_probes: Sequence[Question] = ()) -> Traffic:
    """Load on held-out items of the new domain, whose vectors an update changes."""
    items = [item for item in read_folder(settings.home / "data" / captions.DOMAIN, split="test") if item.text]
    probes = items[:PROBES]
    return Traffic(
        settings.serve.url, images=[item.bytes() for item in probes], texts=[item.text for item in probes],
        questions=vlm_probes, settings=settings, rate=REQUESTS_PER_SECOND,
    )  # fmt: skip


def _questions(settings: Settings) -> list[Question]:
    """Held-out questions of the new kind and of the one that the VLM knows."""
    items: list[FolderItem] = []
    for name in (questions.DOMAIN, "vqa_base"):
        items += questions.held_out(settings, name, PROBES // 2)
    return [(item.bytes(), item.question) for item in items]


def _facts(
    stage: Stage, clip: Lesson, vlm: Lesson | None, checked: Sequence[Report], first_search: float, searchable: float
) -> Facts:
    story = stage.screen.story
    return Facts(
        release=stage.client.live(), clip=clip, vlm=vlm, requests=sum(report.requests for report in checked),
        vlm_requests=sum(sample.family == "vlm" for report in checked for sample in report.samples),
        failed=sum(report.failed for report in checked), mixed=sum(report.mixed for report in checked),
        event_to_searchable_seconds=searchable, seconds=time.monotonic() - story.began,
        first_search_seconds=first_search, chapters=story.seconds(),
        problems=tuple(problem for report in checked for problem in report.problems),
        page=str(stage.settings.home / "demo.html"),
    )  # fmt: skip


def _stay(parts: Supervisor) -> None:
    try:
        while True:
            parts.restart_dead()
            time.sleep(1)
    except Stopped:
        progress_log.info("stopping")
