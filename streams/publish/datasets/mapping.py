"""Mapping of common column names to sample fields, for formats that prescribe none. Columns are matched by name,
ignoring case. Each caption of a list, and each turn of a conversation, becomes a sample of the same image. A class name
serves as the text if there is no other. Values that define the sample (texts, questions, answers, classes) must have
the right type, or the row is bad. Other values (source, concept, domain, split, time, tags) are ignored if they do not
fit: elsewhere these names mean other things."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final

from core.errors import RecordError
from ratchet_client.images import MAX_BYTES
from streams.publish.folders import DatasetRow, FolderItem, Where, iso_time, list_field

IMAGE_SUFFIXES: Final = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"})
MAX_TEXT_BYTES: Final = 2**20
"""Longest text, JSON object or other field of a row that is read."""
_SPLIT = re.compile(r"(?<![a-z])(train|test|validation|valid|val|dev|eval)(?![a-z])")


@dataclass(frozen=True, slots=True)
class Source:
    path: Path
    """A file, a folder, or (only shards) a pattern such as ``shards/{000..010}.tar``."""
    max_image_bytes: int = MAX_BYTES
    """A larger image is an error of its row; not read if its size is known beforehand."""

    @property
    def domain(self) -> str:
        if self.path.is_dir():
            return self.path.resolve().name
        return self.path.parent.resolve().name if "{" in self.path.name else self.path.name.split(".")[0]


@dataclass(frozen=True, slots=True)
class Format:
    name: str
    holds: str
    matches: Callable[[Path], bool]
    """True if a path has this format. Reads a bounded part; never raises for its content."""
    read: Callable[[Source], Iterator[DatasetRow]]
    """Yield its rows. Raises RecordError if it cannot be read further."""


def split_of(name: str) -> str:
    """The split in a file or folder name (``train`` in ``train-00000-of-00002``); empty if none."""
    match = _SPLIT.search(name.lower())
    return match.group(1) if match else ""


def files_under(root: Path, *suffixes: str) -> list[Path]:
    """Files with one of the suffixes in ``root`` and up to two levels below, sorted."""
    patterns = (f"{level}*{suffix}" for level in ("", "*/", "*/*/") for suffix in suffixes)
    return sorted(path for pattern in patterns for path in root.glob(pattern) if path.is_file())


TEXT: Final = ("text", "caption", "captions", "sentence", "sentences", "description", "alt_text", "alt")
QUESTION: Final = ("question", "query")
ANSWER: Final = ("answer", "multiple_choice_answer")
LABEL: Final = ("label", "class", "category", "labels", "fine_label")
SOURCE: Final = ("source", "url", "image_url")
CONVERSATIONS: Final = ("conversations", "conversation")
PLAIN: Final = ("concept", "domain", "split", "time", "tags")
COLUMNS: Final = (*TEXT, *QUESTION, *ANSWER, "answers", *LABEL, *SOURCE, *CONVERSATIONS, *PLAIN)
"""All columns that are read; others are ignored."""
MAX_SAMPLES: Final = 256
"""Most samples per row: captions, or turns of a conversation."""
_PEOPLE: Final = frozenset({"human", "user"})
_MODELS: Final = frozenset({"gpt", "assistant", "model"})


@dataclass(frozen=True, slots=True)
class ImageRef:
    path: Path
    inline: bytes | None = None


def rows_of(where: Where, items: Iterable[FolderItem]) -> Iterator[DatasetRow]:
    """Rows of the items; a single bad row if making them raises RecordError."""
    try:
        made = list(items)
    except RecordError as error:
        yield DatasetRow(str(where), error)
        return
    for item in made:
        yield DatasetRow(str(where), item)


def has_words(columns: Sequence[str]) -> bool:
    names = {name.lower() for name in columns}
    return bool(names & {*TEXT, *LABEL, *CONVERSATIONS}) or bool(names & set(QUESTION) and names & {*ANSWER, "answers"})


def items_of(
    row: Mapping[str, Any],
    image: ImageRef,
    where: Where,
    *,
    domain: str,
    split: str = "",
    label_names: Mapping[str, Sequence[str]] | None = None,
) -> Iterator[FolderItem]:
    """The samples of a row. ``where`` names the row in messages; ``domain`` and ``split`` are its defaults;
    ``label_names`` has class names in order, by column of class numbers. Raises RecordError that names the wrong or
    missing field."""
    values = {name.lower(): value for name, value in row.items() if value is not None}
    label = _label(values, label_names or {}, where)
    texts = next((found for name in TEXT if (found := _strings(values, name, where))), [])
    pairs = _pairs(values, where)
    if not texts and not pairs:
        if not label or label.isdecimal():
            raise where.error(
                "text",
                f"is empty, and class {label} has no name" if label else "is empty",
                f"give one of {', '.join(TEXT[:3])}, or question and answer, or a class with a name",
            )
        texts = [label.replace("_", " ")]
    if max(len(texts), len(pairs)) > MAX_SAMPLES:
        raise where.row_error(f"has more than {MAX_SAMPLES} texts or turns", "take the row apart")
    shared: dict[str, Any] = {
        "label": label,
        "concept": _metadata(values, "concept"),
        "split": _metadata(values, "split") or split,
        "domain": _metadata(values, "domain") or domain,
        "source": next((text for name in SOURCE if (text := _metadata(values, name))), ""),
        "time": _time(values, where),
        "tags": _tags(values, where),
        "inline": image.inline,
    }
    for text, pair in zip_longest(texts, pairs):
        question, answer, answers = pair or ("", "", ())
        yield FolderItem(image.path, text or "", **shared, question=question, answer=answer, answers=answers)


Pair = tuple[str, str, tuple[str, ...]]


def turns(conversation: Any, where: Where) -> list[Pair]:
    """Question and answer of each turn of a conversation, without its ``<image>`` marks. Turns are in LLaVA's form,
    ``{"from": "human" | "gpt", "value": ...}``, or OpenAI's with ``role`` and ``content``."""
    if not isinstance(conversation, list) or not all(isinstance(turn, Mapping) for turn in conversation):
        raise where.error("conversations", "is not a list of turns", 'write [{"from": "human", "value": "..."}, ...]')
    pairs: list[Pair] = []
    question = ""
    for turn in conversation:
        speaker, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if not isinstance(speaker, str) or not isinstance(text, str):
            raise where.error("conversations", "has a turn without speaker or words", 'give "from" and "value"')
        words = text.replace("<image>", "").strip()
        if speaker in _PEOPLE:
            question = words
        elif speaker in _MODELS and question:
            if words:
                pairs.append((question, words, ()))
            question = ""
    if not pairs:
        raise where.error("conversations", "has no question with its answer", "give a human and a gpt turn")
    return pairs


def _pairs(values: Mapping[str, Any], where: Where) -> list[Pair]:
    for name in CONVERSATIONS:
        if values.get(name):
            return turns(values[name], where)
    question = next((text for name in QUESTION for text in _strings(values, name, where)), "")
    if not question:
        return []  # an answer without a question is not a sample
    best = [text for name in ANSWER for text in _strings(values, name, where)]
    answers = _answers(values, where) or best[1:]
    if not best and not answers:
        raise where.error("answer", "is empty, its question is not", "give both question and answer")
    return [(question, best[0] if best else Counter(answers).most_common(1)[0][0], tuple(dict.fromkeys(answers)))]


def _answers(values: Mapping[str, Any], where: Where) -> list[str]:
    given = values.get("answers")
    if isinstance(given, list):  # VQA has an object for each answer
        given = [each.get("answer") if isinstance(each, Mapping) else each for each in given]
        return _strings({"answers": given}, "answers", where)
    return list(list_field(values, "answers", where))


def _label(values: Mapping[str, Any], names: Mapping[str, Sequence[str]], where: Where) -> str:
    for column in LABEL:
        value = values.get(column)
        if isinstance(value, int) and not isinstance(value, bool):
            known = names.get(column, ())
            if value >= len(known) and known:
                raise where.error(column, f"is {value}, but there are {len(known)} classes", "correct the number")
            return known[value] if known and value >= 0 else "" if value < 0 else str(value)  # -1: not labelled
        if isinstance(value, str) and value.strip():
            return value.strip()
    return ""


def _strings(values: Mapping[str, Any], name: str, where: Where) -> list[str]:
    value = values.get(name)
    given = value if isinstance(value, list) else [] if value is None else [value]
    for each in given:
        if each is not None and not isinstance(each, str):
            raise where.error(name, f"is a {type(each).__name__}", "write it as a string")
    return [text for each in given if each and (text := each.strip())]


def _metadata(values: Mapping[str, Any], name: str) -> str:
    """A string; other types belong to another meaning of the name."""
    value = values.get(name)
    return value.strip() if isinstance(value, str) else ""


def _tags(values: Mapping[str, Any], where: Where) -> tuple[str, ...]:
    with suppress(RecordError):
        return list_field(values, "tags", where)
    return ()


def _time(values: Mapping[str, Any], where: Where) -> str:
    value = values.get("time")
    with suppress(RecordError):
        return iso_time(value.isoformat() if isinstance(value, date) else _metadata(values, "time"), where)
    return ""
