"""Suites: the questions for a candidate, and the results it must show. A suite is a YAML file over a folder dataset
(`streams.publish.folders`), or is made from `fresh_eval` rows of the sample store (`fresh`). `retention` suites must
not lose; on `gain` suites an update may show that it learned. The task determines the model family: a CLIP classifies
and retrieves, a VLM answers questions and reranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from core.digests import digest_bytes, digest_json
from core.errors import GateError, RecordError
from serving.engines.vlm.generation import ABOUT_IMAGE, CHOICES
from streams.publish.folders import INDEX, FolderItem, read_folder
from updater.gate.suite_items import (
    Half,
    Item,
    Part,
    Seal,
    caption_clusters,
    captioned,
    image_clusters,
    limited,
    of_half,
    of_part,
    polarity,
    question_item,
    spread,
    without_lonely,
)

MAX_ITEMS = 2000
"""Default limit, as the setting gate.max_items: 12 s a model at 6 ms an image."""
MAX_RERANKED = 150
"""Items of a rerank suite: a VLM is asked about ten pictures for each."""
BUILTIN = Path(__file__).parent / "suites"
PROBE = 64
_NEEDED = {"classification": "class", "retrieval": "text", "vqa": "question and its answer", "rerank": "text"}

Role = Literal["retention", "gain"]
Task = Literal["classification", "retrieval", "vqa", "rerank"]
Metric = Literal["accuracy", "recall@1", "recall@5", "recall@10", "exact_match", "vqa_accuracy", "yes_no", "ndcg@10"]
Family = Literal["clip", "vlm"]
METRICS: dict[Task, tuple[Metric, ...]] = {
    "classification": ("accuracy",),
    "retrieval": ("recall@5", "recall@1", "recall@10"),
    "vqa": ("exact_match", "vqa_accuracy", "yes_no"),
    "rerank": ("ndcg@10",),
}
VIEWS: dict[Task, tuple[str, ...]] = {
    "classification": ("class",),
    "retrieval": ("image to text", "text to image"),
    "vqa": ("answer",),
    "rerank": ("order of CLIP's hits",),
}


class Suite(BaseModel):
    """One suite. Unknown keys in the YAML are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")
    role: Role = "retention"
    task: Task
    data: str = Field("", description="Folder dataset; ${home} is the home folder of the settings.")
    split: str | None = Field(None, description="Only items of this split; all when unset.")
    label: Literal["label", "concept", "text", "domain"] = Field("label", description="Column with the class.")
    head: str = Field("", description="Head of the adapter that answers (classification); prompts where it has none.")
    names: dict[str, str] = Field(default_factory=dict, description="What to call a class in a prompt.")
    templates: list[str] = Field(["a picture of {}."], min_length=1, max_length=100)
    kinds: list[str] = Field(default_factory=list, description="Only questions with these labels; all when unset.")
    metric: Metric | None = Field(None, description="By default the first of the task.")
    margin: float | None = Field(None, gt=0, lt=1, description="Loss to exclude; the setting gate.margin if unset.")
    limit: int = Field(
        MAX_ITEMS, ge=2, le=50_000, description="Most items, drawn with `seed`; the setting gate.max_items if unset."
    )
    seed: int = 0
    description: str = ""

    _home: Path | None = PrivateAttr(None)
    _half: Half = PrivateAttr("all")
    _part: tuple[Part, Seal] | None = PrivateAttr(None)
    _items: tuple[Item, ...] | None = PrivateAttr(None)
    _digest: str | None = PrivateAttr(None)

    @model_validator(mode="before")
    @classmethod
    def _metric_of_task(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("metric") is None and values.get("task") in METRICS:
            values = {**values, "metric": METRICS[values["task"]][0]}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Suite:
        if self.metric not in METRICS[self.task]:
            raise ValueError(f"metric {self.metric} does not go with task {self.task}")
        if self.task == "classification" and not all("{}" in template for template in self.templates):
            raise ValueError("every template needs a {} where the class name goes")
        if self.head and self.task != "classification":
            raise ValueError(f"a head classifies, and does not go with task {self.task}")
        if self.kinds and self.task != "vqa":
            raise ValueError(f"kinds select questions, and do not go with task {self.task}")
        if self.role == "gain" and self.margin:
            raise ValueError("a gain suite has no margin: it must show a gain above zero")
        return self

    @property
    def family(self) -> Family:
        return "vlm" if self.task in ("vqa", "rerank") else "clip"

    @property
    def k(self) -> int:
        """Rank that counts as a hit."""
        return int(str(self.metric).partition("@")[2] or 1)

    @property
    def views(self) -> tuple[str, ...]:
        return VIEWS[self.task]

    @property
    def folder(self) -> Path:
        return Path(self.data.replace("${home}", str(self._home or "."))).expanduser()

    def check_folder(self) -> None:
        """Raise GateError if the data folder does not exist."""
        if not self.folder.is_dir():
            raise GateError(
                f"suite {self.name}: its data folder {self.folder} does not exist.",
                f"Correct gate.suites; if it is built in, run `ratchet demo data prepare {self.folder.name}`.",
            )

    @property
    def cache(self) -> Path | None:
        return self._home / "cache" / "gate" if self._home else None

    def divisible(self, min_items: int) -> bool:
        """True if both halves have enough items; otherwise the suite stays whole for the gate."""
        halves: tuple[Half, Half] = ("tuning", "hidden")
        self.items()  # read once: both halves are made of it
        return all(len(self.half(half).items()) >= max(min_items, 2) for half in halves)

    def half(self, half: Half) -> Suite:
        """The same suite over one half, by a hash of the concept, so that halves are stable."""
        suite = self.model_copy()
        suite._half, suite._digest = half, None
        suite._items = None if self._items is None else tuple(of_half(self._items, half))
        return suite

    def part(self, part: Part, seal: Seal) -> Suite:
        """The same suite over the items that candidates are judged on, or over the sealed ones."""
        suite = self.model_copy()
        suite._part, suite._digest = (part, seal), None
        suite._items = None if self._items is None else tuple(of_part(self._items, part, seal))
        return suite

    def items(self) -> tuple[Item, ...]:
        """The items, in a fixed order. Raises GateError if the data are missing or unusable."""
        if self._items is None:
            rows = _read(self)
            limit = min(self.limit, MAX_RERANKED) if self.task == "rerank" else self.limit
            items = of_half(limited(rows, limit, self.seed), self._half)
            self._items = tuple(items if self._part is None else of_part(items, *self._part))
            if len(self._items) < 2:
                raise GateError(
                    f"suite {self.name}: {self.folder} has {len(self._items)} items of split {self.split!r}.",
                    f"Give at least two with a {_NEEDED[self.task]}.",
                )
        return self._items

    def digest(self) -> str:
        """SHA-256 of the questions (images, texts, prompts and metric, but not role and margin), 64 hex digits."""
        if self._digest is None:
            fields = {"task", "metric"} if self.family == "vlm" else {"task", "metric", "templates", "names", "label"}
            fields |= {"head"} if self.head else set()
            images = [
                [item.id, item.text, self._image_digest(item), *([list(item.answers)] if item.answers else [])]
                for item in self.items()
            ]
            self._digest = digest_json([self.model_dump(include=fields), images])
        return self._digest

    def clusters(self) -> NDArray[np.int_] | None:
        """Cluster number of each item: items that share a caption (retrieval) or an image (questions) are not
        independent. None if all items are."""
        if self.task == "classification":
            return None
        return (image_clusters if self.task == "vqa" else caption_clusters)(self.items())

    def units(self) -> int:
        """Number of independent units: clusters, or items without clusters."""
        clusters = self.clusters()
        return len(self.items()) if clusters is None else len(np.unique(clusters))

    def _image_digest(self, item: Item) -> str:
        try:
            return digest_bytes(item.read())
        except (OSError, RecordError) as error:
            raise GateError(
                f"suite {self.name}: the image of {item.text[:80]!r} cannot be read: {error}",
                "Fix or remove that row of data.csv.",
            ) from error


def probe(suites: Sequence[Suite]) -> list[tuple[Suite, list[Item]]]:
    share = max(2, PROBE // max(len(suites), 1))
    return [(suite, spread(suite.items(), share)) for suite in suites]


MAKE_SUITES: Final = "`ratchet init` makes suites of your pictures (--data), or of stored samples (--from-stream)."


def load_suites(
    paths: Iterable[Path] = (), home: Path | None = None, family: Family | None = None, max_items: int = MAX_ITEMS
) -> list[Suite]:
    """Read suites from YAML files and folders; the built-in ones if `paths` is empty. Returns only those for models of
    `family`; None means all. `max_items` is the default limit. Raises GateError: a file is missing, is not a suite, or
    two have the same name."""
    given = list(paths)
    files: list[Path] = []
    for path in given or [BUILTIN]:
        place = Path(str(path).replace("${home}", str(home or "."))).expanduser()
        if not place.exists():
            raise GateError(f"{place} does not exist.", f"Correct gate.suites; {MAKE_SUITES}")
        matches = sorted([*place.glob("*.yaml"), *place.glob("*.yml")]) if place.is_dir() else [place]
        if not matches:
            raise GateError(f"{place} holds no suite.", "Put *.yaml suites there, or change gate.suites.")
        files += matches
    suites = [_load(file, home, max_items) for file in files]
    for name, count in Counter(suite.name for suite in suites).items():
        if count > 1:
            raise GateError(f"{count} suites are named {name!r}.", "Give each its own name.")
    return [suite for suite in suites if family in (None, suite.family)]


def _load(file: Path, home: Path | None, max_items: int) -> Suite:
    try:
        loaded = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise GateError(f"suite {file} cannot be read: {error}.", "Check gate.suites and the file.") from None
    if not isinstance(loaded, dict):
        raise GateError(f"suite {file} is not a mapping.", "See updater/gate/suites for examples.")
    try:
        suite = Suite(**{"name": file.stem, "limit": max_items, **loaded})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "suite"
        raise GateError(f"suite {file}: {where}: {first['msg']}.", "See updater/gate/suites for examples.") from None
    if not suite.data:
        raise GateError(f"suite {file} names no data.", "Set `data` to a folder with data.csv.")
    suite._home = home
    return suite


def _read(suite: Suite) -> list[Item]:
    suite.check_folder()
    try:
        index = suite.folder / INDEX
        stamp = index.stat().st_mtime_ns if index.is_file() else 0
        rows = _rows(suite.folder, suite.split, stamp)
    except RecordError as error:
        raise GateError(f"suite {suite.name}: {error.message}", error.fix) from error
    places = [(row.path.relative_to(suite.folder) if row.path.is_relative_to(suite.folder) else row.path).as_posix()
              for row in rows]  # fmt: skip
    if suite.task == "vqa":
        items = [
            question_item(row, place)
            for row, place in zip(rows, places, strict=True)
            if row.question and row.answer and (not suite.kinds or row.label in suite.kinds)
        ]
        return [i for i in items if polarity(i.answers[0])] if suite.metric == "yes_no" else items
    texts = [str(getattr(row, suite.label if suite.task == "classification" else "text")).strip() for row in rows]
    items = [captioned(row, place, text) for row, place, text in zip(rows, places, texts, strict=True) if text]
    if suite.task == "rerank":  # the checks ask about a picture and its own text
        items = [replace(item, asked=ABOUT_IMAGE.format(item.text), answers=CHOICES[:1]) for item in items]
    return without_lonely(items) if suite.task == "classification" else items


@lru_cache(maxsize=1)
def _rows(folder: Path, split: str | None, stamp: int) -> Sequence[FolderItem]:
    """Cached, because consecutive suites often use one folder. `stamp`: modification time of its index."""
    return read_folder(folder, split=split)
