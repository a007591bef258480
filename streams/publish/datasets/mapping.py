"""From the columns that people use to the fields of a sample, for formats that prescribe none.

Columns are found by name, without case. A list of captions, and a conversation of several turns, become a sample each
of the same image. Where there is nothing but a class with a name, that name is the text as well.

What a sample is made of (texts, questions, answers, classes) must be of its type, or the row is wrong. Of the rest
(source, concept, domain, split, time, tags) what does not fit is passed over: elsewhere these names mean other things.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final

from core.errors import RecordError
from streams.publish.folders import FolderItem
from streams.publish.row_files import Where, iso_time, list_field

TEXT: Final = ("text", "caption", "captions", "sentence", "sentences", "description", "alt_text", "alt")
QUESTION: Final = ("question", "query")
ANSWER: Final = ("answer", "multiple_choice_answer")
ANSWERS: Final = ("answers",)
LABEL: Final = ("label", "class", "category", "labels", "fine_label")
SOURCE: Final = ("source", "url", "image_url")
CONVERSATIONS: Final = ("conversations", "conversation")
PLAIN: Final = ("concept", "domain", "split", "time", "tags")
COLUMNS: Final = (*TEXT, *QUESTION, *ANSWER, *ANSWERS, *LABEL, *SOURCE, *CONVERSATIONS, *PLAIN)
"""All columns that are read; others are passed over."""
MAX_SAMPLES: Final = 256
"""Most samples of one row: captions, or turns of a conversation."""
IMAGE_MARK: Final = "<image>"
_PEOPLE: Final = frozenset({"human", "user"})
_MODELS: Final = frozenset({"gpt", "assistant", "model"})


@dataclass(frozen=True, slots=True)
class ImageRef:
    """The image of a row: a file, or bytes that came with the row and a name for them."""

    path: Path
    inline: bytes | None = None


def has_words(columns: Sequence[str]) -> bool:
    """Whether columns of these names can make a sample."""
    names = {name.lower() for name in columns}
    return bool(names & {*TEXT, *LABEL, *CONVERSATIONS}) or bool(names & set(QUESTION) and names & {*ANSWER, *ANSWERS})


def items_of(
    row: Mapping[str, Any],
    image: ImageRef,
    where: Where,
    *,
    domain: str,
    split: str = "",
    label_names: Mapping[str, Sequence[str]] | None = None,
) -> Iterator[FolderItem]:
    """The samples of a row.

    Args:
        row: values by column.
        image: its image.
        where: the row, for messages.
        domain: where the row has none.
        split: where the row has none.
        label_names: for columns that hold the number of a class, its names in order.

    Raises:
        RecordError: names the field that is wrong or missing.
    """
    values = {name.lower(): value for name, value in row.items() if value is not None}
    label = _label(values, label_names or {}, where)
    texts = _texts(values, where)
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
    shared = {
        "label": label,
        "concept": _metadata(values, "concept"),
        "split": _metadata(values, "split") or split,
        "domain": _metadata(values, "domain") or domain,
        "source": next((text for name in SOURCE if (text := _metadata(values, name))), ""),
        "time": _time(values, where),
    }
    tags = _tags(values, where)
    for text, pair in zip_longest(texts, pairs):
        question, answer, answers = pair or ("", "", ())
        yield FolderItem(
            image.path,
            text or "",
            **shared,
            tags=tags,
            question=question,
            answer=answer,
            answers=answers,
            inline=image.inline,
        )


Pair = tuple[str, str, tuple[str, ...]]


def turns(conversation: Any, where: Where) -> list[Pair]:
    """Question and answer of each turn of a conversation in LLaVA's form, without its ``<image>`` marks.

    Each is a list of ``{"from": "human" | "gpt", "value": ...}``; OpenAI's ``role`` and ``content`` are read as well.
    """
    if not isinstance(conversation, list) or not all(isinstance(turn, Mapping) for turn in conversation):
        raise where.error("conversations", "is not a list of turns", 'write [{"from": "human", "value": "..."}, ...]')
    pairs: list[Pair] = []
    question = ""
    for turn in conversation:
        speaker, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if not isinstance(speaker, str) or not isinstance(text, str):
            raise where.error("conversations", "has a turn without speaker or words", 'give "from" and "value"')
        words = text.replace(IMAGE_MARK, "").strip()
        if speaker in _PEOPLE:
            question = words
        elif speaker in _MODELS and question:
            if words:
                pairs.append((question, words, ()))
            question = ""
    if not pairs:
        raise where.error("conversations", "has no question with its answer", "give a human and a gpt turn")
    return pairs


def best_answer(answers: Sequence[str]) -> str:
    """The answer that most people gave; of several, the first."""
    return Counter(answers).most_common(1)[0][0] if answers else ""


def _texts(values: Mapping[str, Any], where: Where) -> list[str]:
    for name in TEXT:
        if texts := _strings(values, name, where):
            return texts
    return []


def _pairs(values: Mapping[str, Any], where: Where) -> list[Pair]:
    for name in CONVERSATIONS:
        if values.get(name):
            return turns(values[name], where)
    question = _first_string(values, QUESTION, where)
    if not question:
        return []  # an answer alone is no example of anything
    best = [text for name in ANSWER for text in _strings(values, name, where)]
    answers = _answers(values, where) or best[1:]
    if not best and not answers:
        raise where.error("answer", "is empty, its question is not", "give both question and answer")
    return [(question, best[0] if best else best_answer(answers), tuple(dict.fromkeys(answers)))]


def _answers(values: Mapping[str, Any], where: Where) -> list[str]:
    given = values.get(ANSWERS[0])
    if isinstance(given, list):  # VQA has an object for each answer
        given = [each.get("answer") if isinstance(each, Mapping) else each for each in given]
        return _strings({ANSWERS[0]: given}, ANSWERS[0], where)
    return list(list_field(values, ANSWERS[0], where))


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


def _string(values: Mapping[str, Any], name: str, where: Where) -> str:
    value = values.get(name)
    if value is not None and not isinstance(value, str):
        raise where.error(name, f"is a {type(value).__name__}", "write it as a string")
    return (value or "").strip()


def _first_string(values: Mapping[str, Any], names: Sequence[str], where: Where) -> str:
    return next((text for name in names if (text := _string(values, name, where))), "")


def _metadata(values: Mapping[str, Any], name: str) -> str:
    """A string; what is none belongs to somebody else's meaning of the name."""
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
