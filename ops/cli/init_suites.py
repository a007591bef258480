"""Makes suites and a reference pool of your pictures for ``ratchet init``, and computes what they can detect."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from core.digests import digest_bytes
from core.errors import ConfigError, RecordError
from core.files import folder_next_to, replace_file
from core.progress import track
from core.settings.streams import Ingest
from core.settings.updates import Gate
from ratchet_client.images import open_image, sniff
from streams.publish.datasets import imagefolder
from streams.publish.datasets.mapping import Source
from streams.publish.folders import INDEX, DatasetRow, FolderItem, write_folder
from streams.store.sample_queries import SampleFilter, stream_samples
from streams.store.sample_store import SampleStore
from updater.gate.interim_analyses import PRIOR_SPREAD, candidate_alpha, needed_items
from updater.gate.statistics import items_needed, smallest_difference
from updater.gate.suite_items import SEALED
from updater.gate.suites import Suite, load_suites

MAX_ROWS = 200_000
"""Maximum listed rows: about 200 MB of names and texts."""
MAX_COPIED_BYTES = 2 * 2**30
"""Total of the copied pictures."""
FORMATS = "subfolders that are classes, a data.csv, or a metadata.csv; or name a CSV or JSON Lines file with --labels"
HELD_OUT, REST = "test", "train"
"""Splits of the folder dataset: suites, and the reference pool."""
STREAM = "stream"
"""Name of the suites of stored samples, and of their data folder."""
FRESH = "fresh_eval"
"""Split of stored samples that no update is trained on."""
JUDGED = 1 - 1 / SEALED
"""Share of items that candidates are judged on."""
TEMPLATES = '["a photo of {}.", "a picture of {}."]'


@dataclass(frozen=True)
class Picture:
    digest: str
    path: Path
    rows: tuple[FolderItem, ...]

    @property
    def label(self) -> str:
        return self.rows[0].label


@dataclass
class LabelledSample:
    """Pictures with a class or a caption, in an order that only depends on their names."""

    name: str
    pictures: list[Picture] = field(default_factory=list)
    listed: int = 0
    """Pictures with a class or a caption; more than ``pictures`` if not all were needed."""
    unusable: list[str] = field(default_factory=list)


def read_sample(data: Path | None, labels: Path | None, bounds: Ingest, most: int) -> LabelledSample:
    """Read at most ``most`` pictures, sampled by a hash of their names. ``data``: None: the folder of ``labels``;
    ``labels``: CSV or JSON Lines file; None: labels come from the contents of ``data``; ``bounds``: limits as for
    records. Raises ConfigError, which names the wrong option and the fix."""
    option = "--labels" if labels else "--data"
    source = _source(data, labels)
    sample = LabelledSample(source.domain)
    by_path: dict[Path, list[FolderItem]] = defaultdict(list)
    try:
        for number, row in enumerate(_rows(source, labels)):
            if number >= MAX_ROWS:
                raise ConfigError(f"{option}: there are more than {MAX_ROWS:,} pictures.", "Name a part of them.")
            if isinstance(row.content, RecordError):
                sample.unusable.append(row.content.message)
            elif row.content.text:
                by_path[row.content.path].append(row.content)
    except (RecordError, OSError) as error:
        fix = error.fix if isinstance(error, RecordError) else "Check its permissions."
        raise ConfigError(f"{option}: {getattr(error, 'message', error)}", fix) from None
    sample.listed = len(by_path)

    def place(path: Path) -> str:
        return digest_bytes(path.relative_to(source.path).as_posix().encode(errors="surrogateescape"))

    chosen = sorted(by_path, key=place)[:most]
    _open(sample, ((path, by_path[path]) for path in chosen), bounds, len(chosen))
    if not sample.pictures:
        why = f" The first: {sample.unusable[0]}" if sample.unusable else ""
        raise ConfigError(f"{option}: {source.path} has no picture that can be used.{why}", f"Give {FORMATS}.")
    return sample


def read_stream(store: SampleStore, count: int, bounds: Ingest) -> LabelledSample:
    """Read the first ``count`` stored samples with a text. Raises ConfigError without any."""
    sample = LabelledSample(STREAM)
    rows = (row for row in stream_samples(store, SampleFilter()) if row["text"])

    def items() -> Iterator[tuple[Path, list[FolderItem]]]:
        for row in islice(rows, count):
            path = Path(row["id"])
            yield path, [FolderItem(path, row["text"], row["label"] or "", split=row["split"], inline=row["image"])]

    _open(sample, items(), bounds, count)
    sample.listed = len(sample.pictures)
    if not sample.pictures:
        raise ConfigError("--from-stream: no sample with a text is stored.", "Publish some, or give --data.")
    return sample


def _source(data: Path | None, labels: Path | None) -> Source:
    if data is not None and not data.is_dir():
        raise ConfigError(f"--data: {data} is not a folder.", "Name the folder that holds the pictures.")
    if labels is None:
        if data is None:
            raise ConfigError("--data: there are no pictures.", "Name the folder that holds them.")
        return Source(data)
    if not labels.is_file() or labels.suffix.lower() not in (".csv", ".jsonl", ".ndjson"):
        raise ConfigError(
            f"--labels: {labels} is not a CSV or JSON Lines file.",
            "Name one (.csv or .jsonl) with the columns file, and label or caption.",
        )
    return Source(data or labels.parent)


def _rows(source: Source, labels: Path | None) -> Iterator[DatasetRow]:
    listed = labels or (source.path / INDEX if (source.path / INDEX).is_file() else None)
    if listed is not None:
        return imagefolder.read_metadata(listed, source, source.path)
    return imagefolder.read(source)


def _open(sample: LabelledSample, drawn: Iterable[tuple[Path, list[FolderItem]]], bounds: Ingest, total: int) -> None:
    taken: dict[str, Picture] = {}
    size = 0
    for path, rows in track(drawn, "looking at the pictures", total):
        try:
            data = rows[0].bytes(bounds.max_image_bytes)
            opened = open_image(data, bounds.max_pixels, bounds.max_image_bytes, bounds.min_side)
            opened.decode(lambda size: (min(size[0], 224), min(size[1], 224)))
        except RecordError as error:
            sample.unusable.append(f"{path}: {error.message}")
            continue
        digest = digest_bytes(data)
        old = taken.get(digest)
        if old is None and size + len(data) > MAX_COPIED_BYTES:
            break
        size += 0 if old else len(data)
        known = {(row.text, row.label): row for row in (*(old.rows if old else ()), *rows)}
        taken[digest] = Picture(digest, old.path if old else path, tuple(known.values()))
    for picture in taken.values():
        if len({row.label for row in picture.rows}) > 1:
            sample.unusable.append(f"{picture.path}: the same picture has several classes.")
        else:
            sample.pictures.append(picture)


@dataclass(frozen=True)
class SuitePlan:
    held_out: list[Picture]
    rest: list[Picture]
    home: Path
    data: Path
    """Folder dataset with copies of the pictures."""
    suites: Path
    """Folder of the suites' files."""
    files: dict[str, Path]


def plan_suites(sample: LabelledSample, share: float, most: int, home: Path, folder: Path, replace: bool) -> SuitePlan:
    """Plan to hold out ``share`` of the pictures, at most ``most``; the data goes to ``home/data/NAME``, suites to
    ``folder``. Raises ConfigError when no task is possible, or files exist and ``replace`` is not set."""
    name, (held_out, rest) = slug(sample.name), _divide(sample.pictures, share, most)
    classes = Counter(picture.label for picture in held_out if picture.label)
    captioned = any(row.text != row.label.replace("_", " ") for picture in held_out for row in picture.rows)
    tasks = ["classification"] if sum(count > 1 for count in classes.values()) > 1 else []
    tasks += ["retrieval"] if captioned else []
    if not tasks:
        raise ConfigError(
            f"--data: the {len(held_out)} pictures that were held out have neither two classes with two "
            "pictures each nor captions.",
            "Give a folder for each class, or captions with --labels.",
        )
    plan = SuitePlan(
        held_out, rest, home, home / "data" / name, folder, {task: folder / f"{name}-{task}.yaml" for task in tasks}
    )
    existing = [path for path in (plan.data, *plan.files.values()) if path.exists()]
    if existing and not replace:
        raise ConfigError(
            f"{existing[0]} exists already.", "Replace it with --force, or choose another --suites or --home."
        )
    return plan


def _divide(pictures: Sequence[Picture], share: float, most: int) -> tuple[list[Picture], list[Picture]]:
    """Hold out a share of each class, at least two pictures, deterministically by digest. Of stored samples, hold out
    those that are never trained on."""
    if any(row.split == FRESH for picture in pictures for row in picture.rows):
        untrained = [picture for picture in pictures if all(row.split == FRESH for row in picture.rows)][:most]
        return untrained, [picture for picture in pictures if any(row.split != FRESH for row in picture.rows)]
    classes: dict[str, list[Picture]] = defaultdict(list)
    for picture in sorted(pictures, key=lambda picture: picture.digest):
        classes[picture.label].append(picture)
    share = min(share, most / len(pictures))
    held_out, rest = [], []
    for members in classes.values():
        count = max(2, round(len(members) * share)) if len(members) > 1 else 0
        held_out += members[:count]
        rest += members[count:]
    return held_out, rest


def write_suites(plan: SuitePlan, margin: float) -> list[Suite]:
    """Copy the pictures and write the suites; returns them as loaded by the gate."""
    _write_data(plan)
    for task, file in plan.files.items():
        replace_file(file, _suite_yaml(plan.data.name, task, len(plan.held_out), margin).encode())
    return load_suites(plan.files.values(), plan.home)


def slug(name: str) -> str:
    """Convert to a name valid for bases, suites and folders."""
    text = "".join(char if char.isascii() and char.isalnum() else "-" for char in name.lower()).strip("-")[:40]
    return text or "mine"


def _write_data(plan: SuitePlan) -> None:
    """Written next to its place and moved there, so that readers see either the old or the new folder."""
    target = plan.data
    with folder_next_to(target) as work:
        new = write_folder(work / "new", _items(plan))
        if target.exists():
            target.rename(work / "old")
        new.rename(target)


def _items(plan: SuitePlan) -> Iterator[FolderItem]:
    for split, pictures in ((HELD_OUT, plan.held_out), (REST, plan.rest)):
        for picture in pictures:
            data = picture.rows[0].bytes()
            place = Path("images") / f"{picture.digest[:24]}.{str(sniff(data)).lower()}"
            for row in picture.rows:
                yield FolderItem(
                    place, row.text, row.label, concept=row.label, split=split, domain=plan.data.name, inline=data
                )


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


@dataclass(frozen=True)
class SuitePower:
    """Smallest loss that a retention suite detects with power POWER, by the gate's statistics."""

    suite: Suite
    items: int
    units: int
    """Independent items that candidates are judged on: each item, or each caption."""
    excludes: float
    """Smallest loss, as a share, that is excluded if nothing has changed."""
    margin: float
    needed: int
    """Independent items needed to exclude the margin."""
    min_items: int

    @property
    def enough(self) -> bool:
        """True if an update that changes nothing passes with power POWER."""
        return self.units >= max(self.needed, self.min_items)

    @property
    def advice(self) -> str:
        if self.enough:
            return ""
        wider = math.ceil(100 * self.excludes) / 100
        more = f"give {max(self.needed, self.min_items):,} or more that are independent"
        if self.units < self.min_items:
            return f"with fewer than {self.min_items} (gate.min_items) nothing is decided: {more}"
        return f"updates will be inconclusive: {more}, or allow a larger loss with --margin {wider:g}"


def suite_power(suite: Suite, gate: Gate) -> SuitePower:
    """Compute a suite's power for a single look at the three quarters that are judged, with the spread that the gate
    assumes."""
    level, units = gate.alpha, int(suite.units() * JUDGED)
    margin = suite.margin or gate.margin
    return SuitePower(
        suite=suite,
        items=len(suite.items()),
        units=units,
        excludes=smallest_difference(PRIOR_SPREAD, units, level),
        margin=margin,
        needed=items_needed(PRIOR_SPREAD, margin, level),
        min_items=gate.min_items,
    )


def mean_excluded(powers: Sequence[SuitePower], gate: Gate) -> float:
    """Smallest mean loss over these suites that is excluded with power POWER if nothing has changed."""
    return smallest_difference(PRIOR_SPREAD, sum(each.units for each in powers), gate.alpha)


def fresh_needed(gate: Gate) -> int:
    """Held-out new pairs needed to detect the first candidate's gain of ``gate.detect``."""
    level = candidate_alpha(gate.alpha, 0)
    return needed_items(None, detect=gate.detect, alpha=level, fewest=gate.min_items, most=gate.max_items)
