"""Settings of learning: when updates are trained, their budget, and the gate."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from cronsim import CronSim, CronSimError
from pydantic import Field, ValidationInfo, field_validator

from core.settings.section import Section

Draw = Literal["uniform", "newest"]
Trigger = Literal["samples", "age", "drift", "wrong_rate", "cron"]


HEAD_NAME = r"^[a-z0-9][a-z0-9._-]{0,63}$"
MAX_HEADS = 64


class LearnedHead(Section):
    """A classifier over labelled samples, learned with every update of the CLIP and released with it."""

    name: str = Field(pattern=HEAD_NAME, description="Name in `/v1/classify`.")
    domains: list[str] = Field(
        default_factory=list, description="Domains whose labelled samples it learns from; empty: all."
    )
    min_images: int = Field(8, ge=2, description="Minimum samples per class; labels with fewer are left out.")
    max_images: int = Field(
        5000, ge=4, le=1_000_000, description="Maximum samples to learn from, equally many of each class."
    )


class Updater(Section):
    """Training of updates: triggers, data and workers."""

    recipe: str = Field("default", description="Recipe of CLIP updates: name or YAML path.")
    vlm_recipe: str = Field("vlm-default", description="Recipe of VLM updates: name or YAML path.")
    triggers: list[Trigger] = Field(
        ["samples", "age"], min_length=1, description="Any of these begins an update, see docs/operator/learning.md."
    )
    cron: str = Field("", max_length=100, description="Cron expression in UTC, for the trigger cron: `0 3 * * *`.")
    min_new_samples: int = Field(256, ge=1, description="New train samples that trigger an update.")
    max_wait_seconds: float = Field(
        3600.0, gt=0, description="Maximum wait before an update starts with fewer samples or fresh items."
    )
    wait_for_items: bool = Field(
        True,
        description="Wait for enough fresh items to detect gate.detect; off: judge each update once, with what exists.",
    )
    draw: Draw = Field(
        "uniform",
        description="Which pending samples an update trains on if it cannot afford all: a random draw, or the newest.",
    )
    work_gib: float = Field(
        16.0, gt=0, description="Maximum disk space of an update in home/updates, for precomputed features."
    )
    reference: list[Path] = Field(
        default_factory=list, description="Folder datasets of the reference pool; default: that of the shipped base."
    )
    threads: int = Field(2, ge=1, le=256, description="CPU threads of the trainer, or of each of its workers.")
    workers: int = Field(
        1, ge=1, le=64, description="Data-parallel training processes, by Ray Train; 1: train in the updater itself."
    )
    workers_on_gpus: Literal["auto", "always", "never"] = Field(
        "auto", description="Give each of them a GPU; auto: if the updater sees one."
    )
    ray_address: str = Field(
        "",
        description="Ray cluster for several workers, e.g. ray://head:10001; it must share home with this "
        "machine. Empty: this machine.",
    )
    duty_cycle: float = Field(1.0, gt=0, le=1, description="Maximum share of time that the trainer computes.")
    checkpoint_steps: int = Field(10, ge=1, description="Steps between checkpoints.")
    heads: list[LearnedHead] = Field(
        default_factory=list,
        max_length=MAX_HEADS,
        description="Classifiers that each CLIP update learns from labelled samples; see docs/heads.md.",
    )
    metrics_port: int = Field(9465, ge=0, le=65535, description="Prometheus port of the updater; 0: off.")

    @field_validator("cron")
    @classmethod
    def _due_some_time(cls, value: str, info: ValidationInfo) -> str:
        if value or "cron" in info.data.get("triggers", ()):
            try:
                next(CronSim(value, datetime.now(UTC)))
            except (CronSimError, StopIteration) as error:
                raise ValueError(f"the trigger cron needs five fields such as `0 3 * * *` ({error})") from None
        return value


class Budget(Section):
    """Compute for learning, in memory-adjusted GFLOPs (FLOPs per step x peak memory / that of full fine-tuning)."""

    gflops_per_day: float = Field(200_000.0, gt=0, description="Daily refill of the token bucket, and its size.")
    gflops_per_update: float = Field(6_000.0, gt=0, description="Maximum per update.")
    seconds_per_update: float = Field(900.0, gt=0, description="Maximum training time per update.")


class Gate(Section):
    """Requirements for a candidate."""

    suites: list[Path] = Field(default_factory=list, description="Suites: YAML files, or folders of them.")
    alpha: float = Field(
        0.05,
        gt=0,
        lt=0.5,
        description="Maximum probability of a false accept: of each candidate that loses a margin, and of any "
        "candidate without a gain until the next release.",
    )
    detect: float = Field(
        0.03, gt=0, lt=1, description="Gain to detect; updates wait for enough fresh items to show it."
    )
    margin: float = Field(0.05, gt=0, lt=1, description="Loss that each retention suite must exclude (0.05: 5 points).")
    mean_margin: float = Field(
        0.015, gt=0, lt=1, description="Mean loss over the retention suites that must be excluded (0.015: 1.5 points)."
    )
    audit_every: int = Field(
        8, ge=1, description="Releases after which the live one is audited on the sealed quarter of all items."
    )
    trusted_sources: list[str] = Field(
        default_factory=list,
        description="Values of `source` whose held-out samples may show a gain even if the base does not agree with "
        "their labels; * for all.",
    )
    min_items: int = Field(
        50, ge=2, description="Minimum independent items (captions, images); fewer are inconclusive."
    )
    max_items: int = Field(
        2000, ge=50, le=50_000, description="Maximum items of a fresh domain, and of a suite without its own limit."
    )
