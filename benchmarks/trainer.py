"""The real trainer process, with data that keep it busy for as long as a benchmark wants.

>>> busy = BusyTrainer(prepare_data(settings), settings.home / "ratchet.yaml")
>>> busy.start()                    # returns when it takes steps
>>> busy.steps()
3
>>> busy.stop()                     # with a checkpoint; the next start continues from it
"""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime
from pathlib import Path

import httpx
import yaml

from core.addresses import free_port
from core.child_process import STOP_SECONDS, ChildProcess, ratchet_command, tail
from core.digests import digest_bytes
from core.errors import RatchetError
from core.settings import Settings
from core.waiting import wait_until
from streams.publish.folders import FolderItem, write_folder
from streams.store.rows import Position
from streams.store.sample_store import SampleStore
from tests.support.inputs import pictures
from tests.support.samples import sample
from updater.recipes import Recipe, load_recipe

SAMPLES = 96
"""In each pool: preparing them takes seconds, and a batch has as many rows as ever."""
FOREVER = 10**6
START_SECONDS = 300.0
FIRST_STEPS = 2
COLOURS = ("red", "green", "blue", "yellow", "black", "white")


def prepare_data(settings: Settings) -> Settings:
    """Fill the sample store and a reference folder, and return settings with which an update never ends."""
    images = pictures(2 * SAMPLES)
    store = SampleStore(settings.lake)
    rows = [
        sample(0, number, "bench", id=digest_bytes(image), image=image, text=_caption(number), label="", domain="bench",
               concept="", tags=[], ingested_at=datetime.now(UTC), look=None, words=0)
        for number, image in enumerate(images[:SAMPLES])
    ]  # fmt: skip
    store.put(rows, [Position("bench", 0, SAMPLES)])
    folder = settings.home / "data" / "bench"
    write_folder(
        folder,
        [
            FolderItem(Path(f"{number}.png"), _caption(number), split="train", inline=image)
            for number, image in enumerate(images[SAMPLES:])
        ],
    )
    recipe = load_recipe(settings.updater.recipe)
    endless = Recipe.parse({**recipe.model_dump(mode="json"), "max_steps": FOREVER})
    path = settings.home / "endless.yaml"
    path.write_text(endless.to_yaml())
    updater = {
        "recipe": str(path), "reference": [folder], "min_new_samples": 1, "metrics_port": free_port(),
        "wait_for_items": False,
    }  # fmt: skip
    budget = dict.fromkeys(("gflops_per_day", "gflops_per_update", "seconds_per_update"), 1e15)
    return settings.model_copy(
        update={
            "updater": settings.updater.model_copy(update=updater),
            "budget": settings.budget.model_copy(update=budget),
        }
    )


class BusyTrainer:
    """``ratchet trainer`` as ``ratchet up`` runs it: with its own session, priority and duty cycle."""

    def __init__(self, settings: Settings, file: Path) -> None:
        """``file``: where the settings are written for the process."""
        values = settings.model_dump(mode="json", exclude_none=True, exclude={"serve": {"operator_key"}})
        file.write_text(yaml.safe_dump(values))
        self.url = f"http://127.0.0.1:{settings.updater.metrics_port}/metrics"
        self.part = ChildProcess(
            "trainer", ratchet_command("trainer", "--family", "clip", file=file), file.with_suffix(".log")
        )

    def start(self) -> None:
        """Start it, and return when it has taken some steps. Raises RatchetError when it does not."""
        self.part.start()
        running = lambda: self.part.running  # noqa: E731
        if not wait_until(lambda: self.steps() >= FIRST_STEPS, START_SECONDS, pause=0.5, alive=running):
            raise RatchetError(f"the trainer takes no steps:\n{tail(self.part.log)}", f"See {self.part.log}.")

    def steps(self) -> int:
        """Steps since its last start; 0 while it does not answer."""
        try:
            page = httpx.get(self.url, timeout=5.0, trust_env=False).text
        except httpx.TransportError:
            return 0
        found = re.search(r'^ratchet_update_steps_total\{family="clip"\} (\S+)', page, re.MULTILINE)
        return int(float(found[1])) if found else 0

    def stop(self) -> None:
        if self.part.running:
            self.part.stop(time.monotonic() + STOP_SECONDS)


def _caption(number: int) -> str:
    return f"a {COLOURS[number % len(COLOURS)]} drawing, number {number}"
