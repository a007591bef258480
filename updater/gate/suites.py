"""Suites: what a candidate is asked, and what it has to show.

A suite is a YAML file over a folder dataset (`streams.folders`), or is made from `fresh_eval` rows of the sample
store. `retention` suites must not lose, `gain` suites are where an update may show that it learned something.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from ops.digests import digest12, digest_bytes, digest_json
from ops.errors import GateError, RecordError
from streams.folders import read_folder

BUILTIN = Path(__file__).parent / "suites"

Role = Literal["retention", "gain"]
Task = Literal["classification", "retrieval"]
Metric = Literal["accuracy", "recall@1", "recall@5", "recall@10"]
Half = Literal["all", "tuning", "hidden"]


@dataclass(frozen=True, slots=True)
class Item:
    """One image with its text or class; `read` gives the encoded image."""

    id: str
    """Digest of name and text."""
    text: str
    """The caption, or the class label in a classification suite."""
    key: str
    """What decides the half: items of one concept are all tuned on, or all hidden."""
    name: str
    """The image's place inside its folder, which survives a move of the home folder."""
    source: str
    """Names the image everywhere: suites that ask different things about it embed it once."""
    read: Callable[[], bytes]


class Suite(BaseModel):
    """One suite. Unknown keys in the YAML are errors.

    >>> suite = load_suites([Path("my-suites")], home)[0]
    >>> suite.half("hidden").items()[0].text
    'flag of Angola'
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")
    role: Role = "retention"
    task: Task
    data: str = Field("", description="Folder dataset; ${home} is the home folder of the settings.")
    split: str | None = Field(None, description="Only items of this split; all when unset.")
    label: Literal["label", "concept", "text", "domain"] = Field("label", description="Column with the class.")
    names: dict[str, str] = Field(default_factory=dict, description="What to call a class in a prompt.")
    templates: list[str] = Field(["a picture of {}."], min_length=1, max_length=100)
    metric: Metric | None = Field(None, description="accuracy for classification; recall@5 for retrieval.")
    margin: float | None = Field(None, gt=0, lt=1, description="Loss to exclude; the setting gate.margin if unset.")
    limit: int = Field(500, ge=2, le=50_000, description="Most items, drawn with `seed`.")
    seed: int = 0
    description: str = ""

    _home: Path | None = PrivateAttr(None)
    _half: Half = PrivateAttr("all")
    _items: tuple[Item, ...] | None = PrivateAttr(None)
    _digest: str | None = PrivateAttr(None)

    @model_validator(mode="before")
    @classmethod
    def _metric_of_task(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("metric") is None:
            metric = "accuracy" if values.get("task") == "classification" else "recall@5"
            values = {**values, "metric": metric}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Suite:
        if (self.metric == "accuracy") != (self.task == "classification"):
            raise ValueError(f"metric {self.metric} does not go with task {self.task}")
        if self.task == "classification" and not all("{}" in template for template in self.templates):
            raise ValueError("every template needs a {} where the class name goes")
        if self.role == "gain" and self.margin:
            raise ValueError("a gain suite has no margin: it must show a gain above zero")
        return self

    @property
    def k(self) -> int:
        """Rank that counts as a hit."""
        return 1 if self.metric in (None, "accuracy") else int(str(self.metric).split("@")[1])

    @property
    def views(self) -> tuple[str, ...]:
        """What one item is asked: its class, or its text by image and its image by text."""
        return ("class",) if self.task == "classification" else ("image to text", "text to image")

    @property
    def folder(self) -> Path:
        """Where the data lie, with ${home} filled in."""
        return Path(self.data.replace("${home}", str(self._home or "."))).expanduser()

    @property
    def cache(self) -> Path | None:
        """Where scores of this suite may be kept, if it belongs to a home folder."""
        return self._home / "cache" / "gate" if self._home else None

    def half(self, half: Half) -> Suite:
        """The same suite over its tuning half or its hidden half: by hash of the concept, so both are stable."""
        suite = self.model_copy()
        suite._half, suite._digest = half, None
        suite._items = None if self._items is None else tuple(_of_half(self._items, half))
        return suite

    def items(self) -> tuple[Item, ...]:
        """The items, in a fixed order. Raises GateError if the data are missing or unusable."""
        if self._items is None:
            rows = _read(self)
            self._items = tuple(_of_half(_limited(rows, self.limit, self.seed), self._half))
            if len(self._items) < 2:
                raise GateError(
                    f"suite {self.name}: {self.folder} has {len(self._items)} items of split {self.split!r}.",
                    f"Give at least two with a {'class' if self.task == 'classification' else 'text'}.",
                )
        return self._items

    def digest(self) -> str:
        """Names the question: images, texts, prompts and metric, and neither role nor margin. 64 hex digits."""
        if self._digest is None:
            question = self.model_dump(include={"task", "metric", "templates", "names", "label"})
            images = [[item.id, item.text, digest_bytes(_bytes(self, item))] for item in self.items()]
            self._digest = digest_json([question, images])
        return self._digest


def load_suites(paths: Iterable[Path] = (), home: Path | None = None) -> list[Suite]:
    """Read suites from YAML files and folders of them; the built-in ones when `paths` is empty.

    Raises:
        GateError: a file is missing, is not a suite, or two have the same name.
    """
    given = list(paths)
    files: list[Path] = []
    for path in given or [BUILTIN]:
        place = Path(str(path).replace("${home}", str(home or "."))).expanduser()
        found = sorted([*place.glob("*.yaml"), *place.glob("*.yml")]) if place.is_dir() else [place]
        if not found:
            raise GateError(f"{place} holds no suite.", "Put *.yaml suites there, or change gate.suites.")
        files += found
    suites = [_load(file, home) for file in files]
    for name, count in Counter(suite.name for suite in suites).items():
        if count > 1:
            raise GateError(f"{count} suites are named {name!r}.", "Give each its own name.")
    return suites


def fresh_suite(rows: pa.Table, domain: str | None = None, *, limit: int = 400, seed: int = 0) -> Suite:
    """A gain suite from `fresh_eval` rows (columns id, image, text, domain, concept): retrieval both ways.

    Rows without a text are left out. Items with the same text count as each other's hits. `domain` takes only the
    rows of one domain.
    """
    columns = rows.select([c for c in ("id", "image", "text", "domain", "concept") if c in rows.column_names])
    items = []
    for row in columns.to_pylist():
        text = (row.get("text") or "").strip()
        if text and row.get("image") and domain in (None, row.get("domain")):
            source = f"sample/{row['id']}"
            items.append(_item(source, source, text, row.get("concept") or text, _held(bytes(row["image"]))))
    suite = Suite(
        name=_slug(f"fresh.{domain}" if domain else "fresh"),
        role="gain",
        task="retrieval",
        limit=limit,
        seed=seed,
        description=f"New {domain or 'samples'} that were never trained on.",
    )
    suite._items = tuple(_limited(items, limit, seed))
    return suite


def fresh_suites(rows: pa.Table, *, min_items: int = 50, limit: int = 400, most: int = 6) -> list[Suite]:
    """One gain suite for each domain with at least `min_items` fresh rows, the largest `most` of them.

    If no domain has enough, one suite over all rows together; none if there are no rows.
    """
    if rows.num_rows == 0:
        return []
    counts = Counter(rows.column("domain").to_pylist() if "domain" in rows.column_names else [])
    domains = [domain for domain, n in counts.most_common(most) if domain and n >= min_items]
    suites = [fresh_suite(rows, domain, limit=limit) for domain in domains] or [fresh_suite(rows, limit=limit)]
    return [suite for suite in suites if len(suite.items()) >= 2]


def _load(file: Path, home: Path | None) -> Suite:
    try:
        loaded = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise GateError(f"suite {file} cannot be read: {error}.", "Check gate.suites and the file.") from None
    if not isinstance(loaded, dict):
        raise GateError(f"suite {file} is not a mapping.", "See updater/gate/suites for examples.")
    try:
        suite = Suite(**{"name": file.stem, **loaded})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "suite"
        raise GateError(f"suite {file}: {where}: {first['msg']}.", "See updater/gate/suites for examples.") from None
    if not suite.data:
        raise GateError(f"suite {file} names no data.", "Set `data` to a folder with data.csv.")
    suite._home = home
    return suite


def _read(suite: Suite) -> list[Item]:
    if not suite.folder.is_dir():
        raise GateError(
            f"suite {suite.name}: its data folder {suite.folder} does not exist.",
            "Prepare it (`ratchet base build` makes the built-in domains) or take the suite out of gate.suites.",
        )
    items = []
    for row in read_folder(suite.folder, split=suite.split):
        text = row.text if suite.task == "retrieval" else getattr(row, suite.label)
        if text and text.strip():
            # where the class is all there is to a concept, each picture goes to a half by itself
            key = row.path.name if row.concept == text else row.concept or row.text or row.path.name
            place = row.path.relative_to(suite.folder) if row.path.is_relative_to(suite.folder) else row.path
            items.append(_item(place.as_posix(), str(row.path.absolute()), text.strip(), key, row.bytes))
    if suite.task == "classification":  # a class with one member measures the member
        sizes = Counter(item.text for item in items)
        items = [item for item in items if sizes[item.text] > 1]
    return items


def _bytes(suite: Suite, item: Item) -> bytes:
    try:
        return item.read()
    except (OSError, RecordError) as error:
        raise GateError(
            f"suite {suite.name}: the image of {item.text[:80]!r} cannot be read: {error}",
            "Mend or remove that row of data.csv.",
        ) from error


def _item(name: str, source: str, text: str, key: str, read: Callable[[], bytes]) -> Item:
    return Item(digest12(digest_json([name, text])), text, key, name, source, read)


def _held(image: bytes) -> Callable[[], bytes]:
    return lambda: image


def _limited(items: Sequence[Item], limit: int, seed: int) -> list[Item]:
    """A draw by hash of seed and image: in any order of rows, and alike for two suites over one folder."""
    unique = {item.id: item for item in items}.values()
    drawn = sorted(unique, key=lambda item: (digest_json([seed, item.name]), item.id))[:limit]
    return sorted(drawn, key=lambda item: item.id)


def _of_half(items: Iterable[Item], half: Half) -> list[Item]:
    if half == "all":
        return list(items)
    bit = 1 if half == "hidden" else 0
    return [item for item in items if int(digest_json(item.key)[:8], 16) % 2 == bit]


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in "_.-" else "-" for c in name.lower())[:64]
