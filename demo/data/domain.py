"""From a builder's drafts to a folder dataset on disk. The same thing drawn by other artists has the same concept, and
in every domain a concept is wholly in `train` or in `test`, so no test item was seen in training in any style."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

from PIL import Image

from core.digests import share_of
from core.progress import progress_log, track
from demo.data.packages import Package, lock
from demo.data.render import Unfit, encode, on_canvas
from streams.publish.folders import INDEX, FolderItem, write_folder

TEST_SHARE: Final = 0.15
_ARTICLE: Final = re.compile(r"^(an?|the|some) ")
_ASIDE: Final = re.compile(r"\([^)]*\)|\[[^]]*\]")
_PEOPLE: Final = {"man": "person", "woman": "person", "men": "people", "women": "people"}


def concept_of(text: str) -> str:
    """`"A crowned crane."` -> `"crowned crane"`; man, woman and person doing a thing are one concept."""
    plain = _ASIDE.sub(" ", unicodedata.normalize("NFKC", text).casefold()).removesuffix(": facing right")
    words = re.sub(r"[^\w]+", " ", plain).replace("_", " ").split()
    return _ARTICLE.sub("", " ".join(_PEOPLE.get(word, word) for word in words))


def flag_concept(code: str) -> str:
    """Concept of a country's flag by ISO 3166 code, since spellings of country names differ."""
    return f"flag {code.casefold()}"


def split_of(concept: str) -> str:
    """`test` for about `TEST_SHARE` of all concepts, else `train`; only depends on the concept."""
    return "test" if share_of(f"split:{concept}") < TEST_SHARE else "train"


VERSION: Final = 1
"""Increase it when builders change rows or pictures, so that existing folders are made again."""
RECEIPT: Final = "domain.json"
THREADS: Final = 2
WAITING: Final = 64
"""Drafts in flight: enough to keep the threads busy without holding a large package in memory."""


@dataclass(frozen=True, slots=True)
class Draft:
    name: str
    """File name without suffix, unique in the domain."""
    text: str
    concept: str
    picture: Callable[[], Image.Image]
    label: str = ""
    tags: tuple[str, ...] = ()
    split: str = ""
    """Empty: by the concept's hash."""


@dataclass(frozen=True, slots=True)
class DomainInfo:
    name: str
    packages: tuple[Package, ...]
    licence: str
    attribution: str
    builder: Callable[..., Iterable[Draft]]
    """Takes the archives of `packages`, in order."""
    suffix: str = "png"
    crisp: bool = False
    templates: tuple[str, ...] = ("a picture of {}.",)

    @property
    def package(self) -> str:
        """All packages in one line: `npm:emojibase-data@17.0.0 npm:openmoji@17.0.0`."""
        return " ".join(map(str, self.packages))


def build(info: DomainInfo, home: Path, split: str | None = None) -> Path:
    """Make the dataset of `info` under `home`/data if missing: only `split`, or the whole if another part exists."""
    target = home / "data" / info.name
    if current(target, split=split):
        return target
    with lock(home / "data" / f".{info.name}.lock"):
        if current(target, split=split):
            return target
        if current(target, split=_receipt(target).get("split")):
            split = None
        archives = [package.fetch(home / "packages") for package in info.packages]
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{info.name}-") as scratch:
            staging = Path(scratch) / info.name
            _write(info, archives, staging, split)
            if target.exists():
                target.rename(Path(scratch) / "old")
            staging.rename(target)
    return target


def _write(info: DomainInfo, archives: list[Path], folder: Path, split: str | None) -> None:
    (folder / "images").mkdir(parents=True)
    skipped: Counter[str] = Counter()
    pictures: dict[str, str] = {}
    rows: list[FolderItem] = []
    # Threads are enough: Pillow's codecs and scaling release the GIL.
    with ThreadPoolExecutor(THREADS) as pool:
        for draft, drawn in track(_ahead(pool, info, archives, split), f"drawing {info.name}"):
            try:
                data = drawn.result()
            except Unfit as reason:
                skipped[str(reason)] += 1
                continue
            if pictures.setdefault(hashlib.sha256(data).hexdigest(), draft.name) != draft.name:
                skipped["same picture as another"] += 1
                continue
            path = folder / "images" / f"{draft.name}.{info.suffix}"
            path.write_bytes(data)
            rows.append(
                FolderItem(
                    path=path,
                    text=draft.text,
                    label=draft.label,
                    concept=draft.concept,
                    split=_split_of(draft),
                    domain=info.name,
                    source=info.package,
                    tags=draft.tags,
                )
            )
    rows.sort(key=lambda row: row.path.name)
    counts = Counter(row.split for row in rows)
    receipt = {
        "domain": info.name,
        "version": VERSION,
        "split": split or "",
        "archives": [archive.name for archive in archives],
        "licence": info.licence,
        "attribution": info.attribution,
        "splits": dict(sorted(counts.items())),
        "skipped": dict(sorted(skipped.items())),
    }
    (folder / RECEIPT).write_text(json.dumps(receipt, indent=2) + "\n")
    write_folder(folder, rows)
    left_out = ", ".join(f"{number} {reason}" for reason, number in sorted(skipped.items()))
    shown = ", ".join(f"{counts[name]} {name}" for name in ("train", "test") if split in (None, name))
    progress_log.info(f"{info.name}: {shown}" + (f"; left out: {left_out}" * bool(left_out)))


def _split_of(draft: Draft) -> str:
    return draft.split or split_of(draft.concept)


def _ahead(
    pool: ThreadPoolExecutor, info: DomainInfo, archives: list[Path], split: str | None
) -> Iterator[tuple[Draft, Future[bytes]]]:
    """Drafts (of one split) in the builder's order, with at most `WAITING` being drawn."""

    def draw(draft: Draft) -> bytes:
        return encode(on_canvas(draft.picture(), info.crisp), info.suffix)

    drafts = (draft for draft in info.builder(*archives) if split in (None, _split_of(draft)))
    waiting = [(draft, pool.submit(draw, draft)) for draft in islice(drafts, WAITING)]
    for draft in drafts:
        yield waiting.pop(0)
        waiting.append((draft, pool.submit(draw, draft)))
    yield from waiting


def current(target: Path, version: int | None = None, split: str | None = None) -> bool:
    """True if `target` is a finished folder dataset of this version, with at least this split."""
    receipt = _receipt(target)
    wanted = VERSION if version is None else version
    covers = receipt.get("split", "") in ("", split)
    return bool(receipt.get("version") == wanted and covers and (target / INDEX).is_file())


def _receipt(target: Path) -> dict[str, Any]:
    """The receipt of a dataset; empty if there is none. A receipt without split covers the whole."""
    try:
        receipt: dict[str, Any] = json.loads((target / RECEIPT).read_text())
    except (OSError, ValueError):
        return {}
    return receipt
