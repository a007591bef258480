"""Suites of a labelled sample: one part of its pictures is held out for them, the rest becomes the reference pool."""

from __future__ import annotations

import secrets
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from core.errors import ConfigError
from core.files import replace_file
from ops.cli.first_steps.labelled import LabelledSample, Picture
from ratchet_client.images import sniff
from streams.publish.folders import FolderItem, write_folder
from updater.gate.suites import Suite, load_suites

HELD_OUT, REST = "test", "train"
"""Splits of the folder dataset: what the suites ask, and the reference pool."""
TEMPLATES = '["a photo of {}.", "a picture of {}."]'


@dataclass(frozen=True)
class Division:
    """The pictures of a sample, each on one side."""

    held_out: tuple[Picture, ...]
    rest: tuple[Picture, ...]

    @property
    def tasks(self) -> list[str]:
        """What the held-out pictures can be asked: their class, where two of them have members; their captions."""
        classes = Counter(picture.label for picture in self.held_out if picture.label)
        texts = any(row.text != _spoken(row.label) for picture in self.held_out for row in picture.rows)
        tasks = ["classification"] if sum(count > 1 for count in classes.values()) > 1 else []
        return [*tasks, "retrieval"] if texts else tasks


def divide(pictures: Sequence[Picture], share: float, most: int) -> Division:
    """Hold out a share of each class, by a hash of the pictures: the same ones each time, and at least two of a class.

    Args:
        share: of the pictures.
        most: pictures that are held out at most.
    """
    classes: dict[str, list[Picture]] = defaultdict(list)
    for picture in sorted(pictures, key=lambda picture: picture.digest):
        classes[picture.label].append(picture)
    share = min(share, most / len(pictures))
    held_out, rest = [], []
    for members in classes.values():
        count = max(2, round(len(members) * share)) if len(members) > 1 else 0
        held_out += members[:count]
        rest += members[count:]
    return Division(tuple(held_out), tuple(rest))


@dataclass(frozen=True)
class SuitePlan:
    """What is to be written."""

    division: Division
    home: Path
    data: Path
    """Folder dataset with copies of the pictures."""
    files: dict[str, Path]
    """Suite files by task."""


def plan_suites(sample: LabelledSample, share: float, most: int, home: Path, folder: Path, replace: bool) -> SuitePlan:
    """Divide the pictures; they go to ``home/data/NAME``, a suite for each task to ``folder``. Nothing is written.

    Raises:
        ConfigError: there is nothing to ask, or something is there already and ``replace`` is not set.
    """
    name, division = slug(sample.name), divide(sample.pictures, share, most)
    if not division.tasks:
        raise ConfigError(
            f"--data: the {len(division.held_out)} pictures that were held out have neither two classes with two "
            "pictures each nor captions.",
            "Give a folder for each class, or captions with --labels.",
        )
    files = {task: folder / f"{name}-{task}.yaml" for task in division.tasks}
    plan = SuitePlan(division, home, home / "data" / name, files)
    existing = [path for path in (plan.data, *files.values()) if path.exists()]
    if existing and not replace:
        raise ConfigError(
            f"{existing[0]} exists already.", "Replace it with --force, or choose another --suites or --home."
        )
    return plan


def write_suites(plan: SuitePlan, margin: float) -> list[Suite]:
    """Copy the pictures and write the suites; returns them as the gate reads them."""
    _write_data(plan.data, plan.division)
    for task, file in plan.files.items():
        replace_file(file, _suite_yaml(plan.data.name, task, len(plan.division.held_out), margin).encode())
    return load_suites(plan.files.values(), plan.home)


def slug(name: str) -> str:
    """A name that suites and folders may have."""
    text = "".join(char if char.isascii() and char.isalnum() else "-" for char in name.lower()).strip("-")[:40]
    return text or "pictures"


def _write_data(target: Path, division: Division) -> None:
    """Beside it and moved into place: a folder that is replaced is the old one or the new one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.with_name(f".{target.name}-{secrets.token_hex(4)}")
    try:
        write_folder(work, _items(division, target.name))
        if target.exists():
            target.rename(old := work.with_name(f"{work.name}-old"))
            shutil.rmtree(old, ignore_errors=True)
        work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _items(division: Division, domain: str) -> Iterator[FolderItem]:
    for split, pictures in ((HELD_OUT, division.held_out), (REST, division.rest)):
        for picture in pictures:
            data = picture.rows[0].bytes()
            place = Path("images") / f"{picture.digest[:24]}.{str(sniff(data)).lower()}"
            for row in picture.rows:
                yield FolderItem(
                    place, row.text, row.label, concept=row.label, split=split, domain=domain, inline=data
                )  # fmt: skip


def _suite_yaml(name: str, task: str, pictures: int, margin: float) -> str:
    question = f"label: label\ntemplates: {TEMPLATES}" if task == "classification" else "metric: recall@5"
    return f"""\
# Made by `ratchet init`: what the model can do today, and no update may lose. `ratchet init --help` says how.
description: {pictures} pictures of {name} that no update is trained on.
role: retention
task: {task}
data: ${{home}}/data/{name}
split: {HELD_OUT}
{question}
margin: {margin:g}  # the loss that an update must exclude; {margin:g} is {100 * margin:g} points
"""


def _spoken(label: str) -> str:
    return label.replace("_", " ")
