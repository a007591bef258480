"""Settings of learning: when updates are trained, their budget, and the gate."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from core.settings.section import Section

Draw = Literal["uniform", "newest"]


HEAD_NAME = r"^[a-z0-9][a-z0-9._-]{0,63}$"
MAX_HEADS = 64


class LearnedHead(Section):
    """A classifier over labelled samples, learned with every update of the CLIP and released with it."""

    name: str = Field(pattern=HEAD_NAME, description="What `/v1/classify` calls it.")
    domains: list[str] = Field(
        default_factory=list, description="Domains whose samples it learns from, those with a label; empty: all."
    )
    min_images: int = Field(8, ge=2, description="A label with fewer samples is no class yet.")
    max_images: int = Field(
        5000, ge=4, le=1_000_000, description="Most samples that it learns from, as many of each class."
    )


class Updater(Section):
    """Training of updates: triggers, data and workers."""

    recipe: str = Field("default", description="Recipe of CLIP updates: a name or a YAML path.")
    vlm_recipe: str = Field("vlm-default", description="Recipe of VLM updates: a name or a YAML path.")
    min_new_samples: int = Field(256, ge=1, description="New train samples that trigger an update.")
    max_wait_seconds: float = Field(
        3600.0, gt=0, description="Trigger with fewer samples or fresh items after this long."
    )
    wait_for_items: bool = Field(
        True,
        description="Wait for the fresh items that show gate.detect; off: an update is judged once, by what there is.",
    )
    draw: Draw = Field(
        "uniform",
        description="Which pending samples an update visits where it cannot visit all: drawn by chance, or the newest.",
    )
    work_gib: float = Field(
        16.0, gt=0, description="Disk that one update may take in home/updates for what it computes once per sample."
    )
    reference: list[Path] = Field(
        default_factory=list, description="Folder datasets of the reference pool; unset: the shipped base's own."
    )
    threads: int = Field(2, ge=1, le=256, description="CPU threads of the trainer, of each of its workers.")
    workers: int = Field(
        1,
        ge=1,
        le=64,
        description="Processes that take the steps of an update together, by Ray Train. 1: the updater itself.",
    )
    workers_on_gpus: Literal["auto", "always", "never"] = Field(
        "auto", description="Whether each of them has a GPU; auto: where the updater itself sees one."
    )
    ray_address: str = Field(
        "",
        description="Ray cluster for more workers than one, which sees home as this machine does, e.g. ray://head:10001;"
        " empty: this machine.",
    )
    duty_cycle: float = Field(1.0, gt=0, le=1, description="Share of time the trainer may compute.")
    checkpoint_steps: int = Field(10, ge=1, description="Steps between checkpoints.")
    heads: list[LearnedHead] = Field(
        default_factory=list,
        max_length=MAX_HEADS,
        description="Classifiers that each update of the CLIP learns from labelled samples; see docs/heads.md.",
    )
    metrics_port: int = Field(9465, ge=0, le=65535, description="Prometheus port of the updater; 0 is off.")


class Budget(Section):
    """Compute for learning, in memory-adjusted GFLOPs (FLOPs per step x peak memory / that of full fine-tuning)."""

    gflops_per_day: float = Field(200_000.0, gt=0, description="Refill of the token bucket a day, and its size.")
    gflops_per_update: float = Field(6_000.0, gt=0, description="Most that one update may spend.")
    seconds_per_update: float = Field(900.0, gt=0, description="Wall-clock bound of one update's training.")


class Gate(Section):
    """Requirements for a candidate."""

    suites: list[Path] = Field(default_factory=list, description="Suite YAML files or folders of them.")
    alpha: float = Field(
        0.05,
        gt=0,
        lt=0.5,
        description="Chance of a false accept: of each candidate that loses a margin, and of any without a gain before "
        "the next release.",
    )
    detect: float = Field(
        0.03, gt=0, lt=1, description="Gain that the gate is to see: updates wait for the fresh items that show it."
    )
    margin: float = Field(0.05, gt=0, lt=1, description="Loss that a retention suite must exclude (0.05 = 5 points).")
    min_items: int = Field(
        50, ge=2, description="Fewer independent items (captions, images) than this are inconclusive."
    )
    max_items: int = Field(
        2000, ge=50, le=50_000, description="Most items of a suite that names no limit, of a fresh domain as well."
    )
