"""Suites from held-out (`fresh_eval`) rows of the sample store, and the best release so far by each suite. Gain suites
use the newest rows. Once the update is released these become memory: retention suites, a bounded reservoir per domain
drawn by a hash of the sample ID, so that a new row displaces at most one and a deleted one is gone. IDs, domains and
texts, which determine the items, are read at once; images only when needed."""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property, partial
from threading import Lock
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from core.errors import AdapterError, GateError, StoreError
from core.ledger import VerdictRow
from core.settings import Settings
from serving.engines.heads import Head
from streams.records.signatures import FEEDBACK
from streams.store.rows import SAMPLE_SCHEMA
from streams.store.sample_store import ADDRESS, Having, SampleStore
from updater.gate.suite_items import Item, Part, Seal, limited, sample_item
from updater.gate.suites import MAX_ITEMS, Family, Role, Suite, Task

CAPACITY: dict[Family, int] = {"clip": 1000, "vlm": 400}
"""Items of a suite; a VLM's answer costs many times what a vector does. Some 160 exclude a loss of 5 points at 80%
power if nothing was lost; if updates since took 3 points from the best release, it takes 1,000."""
MOST_DOMAINS = 12
"""Suites of single domains. All must pass, and each is asked of the candidate."""
MOST_FRESH = 6
PREFIX = "memory"
COLUMNS = ("id", "label", "domain", "concept")
WORDS_ROWS = 1024
TEXT_COLUMNS = ("id", "text", "question", "answer", "domain", "concept", "source")
PAGE = 16
PAGES = 8
"""Cached pages, for as many threads: with images of 8 MiB, the ingest limit, 1 GiB."""
MOST_RIVALS = 2
"""Best releases to compare: each is resident in the gate's engine with incumbent and candidate."""


class Images(Protocol):
    def expect(self, ids: Sequence[str]) -> None:
        """Announce the next images in order, so that neighbours can be read together."""

    def __call__(self, sample: str) -> bytes:
        """Raises GateError."""


class HeldOut:
    """The split ``fresh_eval`` of one version of the store; also gives the images of the rows that were read.
    Thread-safe. ``version``: pinned, or otherwise kept for as long as images are needed. ``having``: only samples with
    this field; None: all. ``without``: sources to leave out."""

    def __init__(
        self, store: SampleStore, version: int, having: Having | None, seal: Seal, without: Collection[str] = ()
    ) -> None:
        self.store, self.version, self.having, self.seal, self.without = store, version, having, seal, without
        self._addresses: dict[str, int] = {}
        self._pages: list[list[str]] = []
        self._page_of: dict[str, int] = {}
        self._cached_pages: OrderedDict[int, dict[str, bytes]] = OrderedDict()
        self._lock = Lock()

    def rows(self, columns: Sequence[str], after: Mapping[str, int] | None = None, part: Part = "judged") -> pa.Table:
        """All rows of a part, or those at or after some offsets, unordered. ``columns``: ``id``, and others except the
        image."""
        schema = pa.schema([SAMPLE_SCHEMA.field(name) for name in columns])
        parts = [schema.empty_table()]
        sealed = self._sealed
        for batch in self.store.addresses(columns, self.version, "fresh_eval", self.having, after, self.without):
            self._addresses.update(zip(batch["id"].to_pylist(), batch[ADDRESS].to_pylist(), strict=True))
            wanted = [(name in sealed) == (part == "sealed") for name in batch["id"].to_pylist()]
            parts.append(pa.Table.from_batches([batch.select(list(columns))]).filter(pa.array(wanted, pa.bool_())))
        return pa.concat_tables(parts)

    @cached_property
    def _sealed(self) -> frozenset[str]:
        batches = self.store.addresses(["id"], self.version, "fresh_eval", self.having, dict(self.seal.audited))
        names = (name for batch in batches for name in batch["id"].to_pylist())
        return frozenset(name for name in names if self.seal.holds(name))

    def some(self, ids: Sequence[str], columns: Sequence[str]) -> pa.Table:
        """Other columns of rows that :meth:`rows` returned, in the order of ``ids``."""
        rows: list[dict[str, Any]] = []
        for start in range(0, len(ids), WORDS_ROWS):
            addresses = [self._addresses[each] for each in ids[start : start + WORDS_ROWS]]
            rows += self.store.rows_at(addresses, columns, self.version)
        return pa.Table.from_pylist(rows, pa.schema([SAMPLE_SCHEMA.field(name) for name in columns]))

    def expect(self, ids: Sequence[str]) -> None:
        new = [each for each in dict.fromkeys(ids) if each not in self._page_of]
        for start in range(0, len(new), PAGE):
            page = new[start : start + PAGE]
            self._page_of.update(dict.fromkeys(page, len(self._pages)))
            self._pages.append(page)

    def __call__(self, sample: str) -> bytes:
        """Image of a row that :meth:`rows` returned. Raises GateError if the store cannot be read."""
        if sample not in self._page_of:
            self.expect([sample])
        number = self._page_of[sample]
        with self._lock:
            if number not in self._cached_pages:
                self._cached_pages[number] = self._read(self._pages[number])
            self._cached_pages.move_to_end(number)
            while len(self._cached_pages) > PAGES:
                self._cached_pages.popitem(last=False)
            return self._cached_pages[number][sample]

    def _read(self, page: Sequence[str]) -> dict[str, bytes]:
        try:
            rows = self.store.rows_at([self._addresses[each] for each in page], ["image"], self.version)
        except StoreError as error:
            raise GateError(f"images of held-out samples cannot be read: {error.message}", error.fix) from error
        return {each: row["image"] for each, row in zip(page, rows, strict=True)}


def fresh_suites(
    rows: pa.Table, images: Images, *, family: Family = "clip", min_items: int = 50, limit: int = MAX_ITEMS
) -> list[Suite]:
    """One gain suite for each of the MOST_FRESH largest domains with at least `min_items` fresh captions (or images
    with questions), and one over the rest if it has as many. If no domain has enough, one suite over all rows.

    A CLIP is asked for retrieval both ways (items with the same text are hits of each other); a VLM answers the
    questions. Rows without a text (or question) are left out. ``rows``: columns id, domain, concept and text, or
    question and answer. ``limit``: items of a suite. A further row never lowers the number of items.
    """
    by_domain = items_by_domain(rows, family, images)
    suites: list[Suite] = []
    covered: set[str] = set()
    for domain in sorted(by_domain, key=lambda domain: (-len(by_domain[domain]), domain)):
        if len(by_domain[domain]) < min_items or len(suites) == MOST_FRESH:
            break
        suite = fresh_suite(by_domain[domain], domain, family, limit, images)
        if domain and suite.units() >= min_items:
            suites.append(suite)
            covered.add(domain)
    others = [item for domain, items in by_domain.items() if domain not in covered for item in items]
    rest = fresh_suite(others, "", family, limit, images)
    suites += [rest] if not suites or rest.units() >= min_items else []
    return [suite for suite in suites if len(suite.items()) >= 2]


def items_by_domain(
    rows: pa.Table, family: Family, images: Images, *, corrections: bool = False
) -> dict[str, list[Item]]:
    """Items of a family, without the corrections of callers; or only those. They were chosen by the errors of an
    incumbent, so what they show is no gain: part of it is regression to the mean."""
    by_domain: dict[str, list[Item]] = defaultdict(list)
    for row in rows.select([name for name in TEXT_COLUMNS if name in rows.column_names]).to_pylist():
        if corrections != str(row.get("source") or "").startswith(FEEDBACK):
            continue
        text, question, answer = ((row.get(name) or "").strip() for name in ("text", "question", "answer"))
        if family == "clip" and text:
            by_domain[row.get("domain") or ""].append(sample_item(row, images, text))
        elif family == "vlm" and question and answer:
            by_domain[row.get("domain") or ""].append(sample_item(row, images, question, answer))
    return dict(by_domain)


def correction_suites(rows: pa.Table, images: Images, *, family: Family, min_items: int, limit: int) -> list[Suite]:
    """A suite of each domain's corrections, to report and not to decide. ``rows``: as in :func:`fresh_suites`."""
    by_domain = items_by_domain(rows, family, images, corrections=True)
    about = "Corrections of callers that were never trained on."
    suites = [
        store_suite(
            items, slug(f"corrections.{domain}" if domain else "corrections"), "gain", family, limit, about, images
        )
        for domain, items in sorted(by_domain.items())
    ]
    return [each for each in suites if len(each.items()) >= 2 and each.units() >= min_items][:MOST_FRESH]


def store_suite(
    items: Sequence[Item], name: str, role: Role, family: Family, limit: int, description: str, images: Images
) -> Suite:
    task: Task = "retrieval" if family == "clip" else "vqa"
    suite = Suite(name=name, role=role, task=task, limit=limit, description=description)
    suite._items = tuple(limited(items, limit, suite.seed))
    images.expect([item.sample_id for item in suite._items])
    return suite


def fresh_suite(items: Sequence[Item], domain: str, family: Family, limit: int, images: Images) -> Suite:
    name = slug(f"fresh.{domain}" if domain else "fresh")
    description = f"New {domain or 'samples'} that were never trained on."
    return store_suite(items, name, "gain", family, limit, description, images)


def slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in "_.-" else "-" for c in name.lower())[:64]


def choose_memory(rows: pa.Table, family: Family, min_units: int) -> dict[str, list[str]]:
    """Choose the sample IDs of each memory suite, by its name; independent of the order of rows. The largest domains
    with at least `min_units` samples form a suite each; all other samples form one together. With fewer items no suite
    can exclude a loss, and every update would wait. ``rows``: columns id and domain of learned held-out samples."""
    by_name: dict[str, list[str]] = defaultdict(list)
    for name, domain in zip(rows["id"].to_pylist(), rows["domain"].to_pylist(), strict=True):
        by_name[slug(f"{PREFIX}.{domain}") if domain else PREFIX].append(name)
    single = {name: ids for name, ids in by_name.items() if name != PREFIX and len(ids) >= min_units}
    largest = sorted(single, key=lambda name: (-len(single[name]), name))[:MOST_DOMAINS]
    rest = [each for name, ids in by_name.items() if name not in largest for each in ids]
    groups = {**{name: single[name] for name in sorted(largest)}, PREFIX: rest}
    return {name: reservoir(ids, CAPACITY[family]) for name, ids in groups.items() if len(ids) >= min_units}


def reservoir(ids: Sequence[str], capacity: int) -> list[str]:
    return sorted(ids, key=lambda name: hashlib.sha256(f"{PREFIX} {name}".encode()).digest())[:capacity]


def memory_suites(
    rows: pa.Table, chosen: dict[str, list[str]], family: Family, min_units: int, images: Images
) -> list[Suite]:
    """The suites of :func:`choose_memory` from the rows that it chose, except those with fewer than `min_units`
    independent items."""
    by_id = {item.sample_id: item for items in items_by_domain(rows, family, images).values() for item in items}
    suites = []
    for name, ids in chosen.items():
        items = [by_id[each] for each in ids if each in by_id]
        about = f"Samples of {name.removeprefix(f'{PREFIX}.')} that" if name != PREFIX else "Other samples that"
        description = f"{about} released updates were judged by, and that were never trained on."
        suite = store_suite(items, name, "retention", family, CAPACITY[family], description, images)
        if len(items) >= 2 and suite.units() >= min_units:
            suites.append(suite)
    return suites


def learned_before(rows: pa.Table, fresh: pa.Table) -> pa.Table:
    known = set(fresh["id"].to_pylist())
    return rows.filter(np.array([name not in known for name in rows["id"].to_pylist()], dtype=bool))


def head_suites(settings: Settings, held_out: HeldOut, heads: Mapping[str, Head]) -> list[Suite]:
    """A retention suite for each head of the candidate, answered by head, or by prompts if incumbent or base lacks it:
    a head must not be worse than its predecessor, nor than zero-shot classification. Raises AdapterError for a head
    that cannot be judged: it is not in the settings, or no held-out sample has its labels. ``held_out``: with
    captions or without."""
    wanted = {head.name: head for head in settings.updater.heads}
    if not heads:
        return []
    if unknown := sorted(heads.keys() - wanted.keys()):
        raise AdapterError(f"nothing judges the head {unknown[0]!r} of the candidate.", "Name it in updater.heads.")
    rows = held_out.rows(COLUMNS).to_pylist()
    suites = []
    for name in sorted(heads):
        head, labels = wanted[name], set(heads[name].labels)
        own = [r for r in rows if r["label"] in labels and (not head.domains or r["domain"] in head.domains)]
        own.sort(key=lambda row: hashlib.sha256(f"head {row['id']}".encode()).digest())
        items = [sample_item(row, held_out, row["label"], key=row["id"]) for row in own[: CAPACITY["clip"]]]
        if len(items) < 2:
            raise AdapterError(
                f"no held-out samples have the labels of the head {name!r}.", "Publish some with labels."
            )
        suite = Suite(
            name=f"head.{name}",
            role="retention",
            task="classification",
            head=name,
            limit=CAPACITY["clip"],
            description=f"Held-out samples with a label of the head {name}.",
        )
        suite._items = tuple(items)
        held_out.expect([item.sample_id for item in items])
        suites.append(suite)
    return suites


def best_releases(
    verdicts: Sequence[VerdictRow], fixed: Sequence[str], learned: Sequence[str], incumbent: str | None
) -> dict[str, str]:
    """By retention suite the released adapter with the highest score in its verdict relative to the base's score there.
    Candidates are compared with it, so that small losses cannot add up.

    For ``fixed`` suites, those over folders, it is the one with the highest mean over all of them: the highest of each
    suite would be chosen by the chance of its items. Each ``learned`` suite has its own, as a domain may have been
    learned and lost since. Scores are relative to the base because the items of a memory suite change as data are
    learned; such a suite also stands for the fresh suite of its domain, by which the domain was judged when it was new.
    The incumbent is omitted, as it is a reference anyway. Of more than MOST_RIVALS adapters, that of the fixed suites
    and those best on most others are kept. ``verdicts``: released ones of one family and base, newest first.
    """
    overall = _best(verdicts, lambda verdict: _mean_score(verdict, fixed))
    best = dict.fromkeys(fixed, overall) | {name: _best(verdicts, partial(_score, name=name)) for name in learned}
    best = {name: adapter for name, adapter in best.items() if adapter not in ("", incumbent)}
    ranked = [adapter for adapter, _ in Counter(best.values()).most_common() if adapter != overall]
    named = [*({overall} & {*best.values()}), *ranked][:MOST_RIVALS]
    return {name: adapter for name, adapter in best.items() if adapter in named}


def _best(verdicts: Sequence[VerdictRow], score: Callable[[VerdictRow], float | None]) -> str:
    """The adapter with the highest score, the newest of equal ones; empty if none has a score."""
    scored = [(value, verdict.adapter) for verdict in verdicts if (value := score(verdict)) is not None]
    return max(scored, key=lambda pair: pair[0])[1] if scored else ""


def _mean_score(verdict: VerdictRow, names: Sequence[str]) -> float | None:
    """Mean over suites, weighted by independent items; None unless the verdict has all of them."""
    suites: Mapping[str, Mapping[str, Any]] = verdict.summary.get("suites", {})
    if not names or any(name not in suites for name in names):
        return None
    weights = [suites[name].get("units", 1) for name in names]
    scores = [suites[name]["after"] - suites[name]["base"] for name in names]
    return float(np.average(scores, weights=weights))


def _score(verdict: VerdictRow, name: str) -> float | None:
    suites: Mapping[str, Mapping[str, Any]] = verdict.summary.get("suites", {})
    suite = suites.get(name)
    if suite is None and name.startswith(PREFIX):
        suite = suites.get(f"fresh{name.removeprefix(PREFIX)}")
    return None if suite is None else float(suite["after"]) - float(suite["base"])
