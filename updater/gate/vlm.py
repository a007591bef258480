"""Gates a vision-language model with questions about images, and by its order of a search's hits, through the engine
that serves it. All questions of a suite are asked greedily in one batch. Each answer is generated once: checks and
suites share it, and answers of base and incumbent are cached on disk."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from core.digests import digest12, digest_json
from core.errors import AdapterError, GateError
from core.settings.serving import Serve
from serving.engines.vlm.generation import ABOUT_IMAGE, CHOICES, GenerationRequest, GenerationResult, question
from serving.engines.vlm.vlm_base import VlmBase
from serving.errors import EngineDead, InvalidRequest
from updater.gate import checks as c
from updater.gate.decision import Scores
from updater.gate.diagnostics import yes_share
from updater.gate.score import Scorer, kept, worst_answers
from updater.gate.statistics import Floats, reciprocal_log_rank
from updater.gate.suite_items import Item, grade, majority, open_picture, polarity, spread
from updater.gate.suites import Family, Suite, probe
from updater.gate.verdict import Check, Diagnostics, Regression, YesShare

if TYPE_CHECKING:  # importing it loads the engines
    from serving.engines.vlm.open import SyncVlm

SPARE_TOKENS = 4
"""Room beyond the longest reference answer: a longer answer is cut, and is wrong either way."""
KEEP_PIXELS = 256 * 1024 * 1024
GOLDEN = 6
LATENCY_BATCH = 8
HITS = 10
LiveClip = Callable[[], tuple[Scorer, str | None]]


@dataclass(frozen=True, slots=True)
class VlmAnswers:
    ids: NDArray[np.str_]
    texts: tuple[str, ...]
    """Raw answers; empty if a log-probability was not finite."""
    hits: NDArray[np.float64]
    ranks: None = None


@dataclass(frozen=True, slots=True, eq=False)
class FirstHits:
    """A CLIP's first hits of each text of a rerank suite among the suite's pictures. What it does not find is lost for
    every VLM, and all VLMs of a verdict order the same hits."""

    texts: Sequence[str]
    sources: Sequence[Sequence[str]]
    right: NDArray[np.bool_]
    """[texts, hits]: pictures with the text as caption."""
    most: Floats
    """[texts]: DCG with all right pictures in front."""
    key: Sequence[str]

    @classmethod
    def of(cls, suite: Suite, scorer: Scorer, adapter: str | None) -> FirstHits:
        """Raises GateError for an unreadable image."""
        pairs = {(item.text, item.source) for item in suite.items()}
        pictures = list({item.source: item for item in suite.items()}.values())
        count = Counter(text for text, _ in pairs)
        texts, label = sorted(count), f"{suite.name}, CLIP"
        similarity = scorer.texts(texts, adapter, label) @ scorer.images(pictures, adapter, label).T
        nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :HITS]
        sources = [[pictures[each].source for each in row] for row in nearest]
        right = [[(text, source) in pairs for source in own] for text, own in zip(texts, sources, strict=True)]
        most = np.array([reciprocal_log_rank(np.arange(min(count[text], HITS))).sum() for text in texts])
        return cls(texts, sources, np.array(right), most, scorer.key(suite, adapter))

    def ndcg(self, odds: Floats | None) -> Floats:
        """NDCG@10 (Jarvelin and Kekalainen, 2002) of the order by ``odds`` [texts, hits], by text; None: expected of a
        random order. Ties count against the model."""
        right, gains = self.right.astype(np.float64), reciprocal_log_rank(np.arange(self.right.shape[1]))
        if odds is None:
            return np.asarray(right.mean(axis=1) * gains.sum() / self.most)
        order = np.lexsort((right, -np.where(np.isnan(odds), -np.inf, odds)))
        return np.asarray(np.take_along_axis(right, order, axis=1) @ gains / self.most)


class VlmEvaluator:
    family: Family = "vlm"

    def __init__(self, vlm: SyncVlm, serve: Serve, clip: LiveClip, *, cache: Path | None = None) -> None:
        """`vlm` is started; `clip`: for rerank suites; `cache`: folder of answers, by default each suite's own."""
        self.clip = clip
        self.vlm = vlm
        self.base: VlmBase = vlm.engine.base
        self.kind = vlm.engine.kind
        self.serve = serve
        self.cache = cache
        self.question_count = 0
        self._directories: dict[str, Path] = {}
        self._known_texts: dict[tuple[str | None, str, str, int], str] = {}
        self._room: dict[str, int] = {}

    def load(self, name: str, directory: Path, *, candidate: bool = False) -> None:
        """Raises AdapterError; GateError if the engine died."""
        with _living(f"loading {name}"):
            self.vlm.load(name, directory)
        self._directories[name] = directory

    def score(self, suite: Suite, adapter: str | None, *, label: str = "") -> VlmAnswers:
        """One model's answers with their scores. Raises GateError: the engine died, or an item cannot be asked."""
        if suite.task == "rerank":
            return self._reranked(suite, adapter, label or adapter or "base")
        items, folder = suite.items(), self.cache or suite.cache
        ids = np.array([item.id for item in items], dtype=np.str_)

        def compute() -> tuple[NDArray[np.str_], ...]:
            return ids, np.array(self._texts(suite, items, adapter, label or adapter or "base"), dtype=np.str_)

        def fits(known: Sequence[NDArray[Any]]) -> bool:
            return known[0].tolist() == ids.tolist() and known[1].shape == ids.shape

        what = [suite.digest(), self.base.digest, adapter or "base", self.kind, self._tokens(suite)]
        path = folder and folder / f"{digest12(digest_json(what))}.npz"
        texts = [str(text) for text in kept(path, ("ids", "texts"), compute, fits)[1]]
        self._remember(suite, items, adapter, texts)
        earned = [grade(str(suite.metric), text, item.answers) for text, item in zip(texts, items, strict=True)]
        return VlmAnswers(ids, tuple(texts), np.array(earned, dtype=np.float64)[:, None])

    def chance(self, suite: Suite, some: Sequence[Item] | None = None) -> float:
        """Score of the most common answer to some questions, or all; of a random order for a rerank suite."""
        if suite.task == "rerank":
            hits, asked = FirstHits.of(suite, *self.clip()), suite.items() if some is None else some
            return float(hits.ndcg(None)[[hits.texts.index(item.text) for item in asked]].mean())
        return majority(str(suite.metric), [item.answers for item in (suite.items() if some is None else some)])[1]

    def cross_version(
        self, suites: Sequence[Suite], incumbent: str | None, candidate: str, margin: float, level: float
    ) -> None:
        """Always None: a VLM has no vectors in the catalog."""

    def diagnostics(self, scores: Sequence[Scores], incumbent: str | None, candidate: str) -> Diagnostics:
        shares: dict[str, YesShare] = {}
        for each in (each for each in scores if each.suite.task == "vqa"):
            answers = cast(tuple[VlmAnswers, ...], (each.base, each.before, each.after))
            if (share := yes_share(each.suite, *(own.texts for own in answers))) is not None:
                shares[each.suite.name] = share
        return Diagnostics(yes=shares)

    def regressions(self, suite: Suite, before: VlmAnswers, after: VlmAnswers) -> tuple[Regression, ...]:
        return worst_answers(suite, (before.texts, before.hits[:, 0]), (after.texts, after.hits[:, 0]))

    def checks(self, candidate: str, suites: Sequence[Suite], facts: Mapping[str, Any]) -> list[Check]:
        directory = self._directories.get(candidate)
        checks = [c.check_loads(directory is not None, candidate, facts)]
        if directory is None or not suites:
            return checks
        try:
            checks.append(self._finite(candidate, suites))
            if not checks[-1].ok:
                return checks
            model = self.base.build_model()
            checks.append(c.check_vlm_drift(model, directory))
            few = spread([item for _, items in probe(suites) for item in items], GOLDEN)
            asks, answers = [self._ask(item, 1) for item in few], [item.answers[0] for item in few]
            with _living("comparing log-probabilities"):
                served = [self._log_probabilities(asks, answers, name) for name in (None, candidate)]
                checks.append(c.check_vlm_parity(self.base, model, directory, asks, answers, served))
                asks, answers = (asks * LATENCY_BATCH)[:LATENCY_BATCH], (answers * LATENCY_BATCH)[:LATENCY_BATCH]
                latency = c.check_latency(
                    lambda adapter: self._log_probabilities(asks, answers, adapter), candidate,
                    "a batch of questions takes", ratio=c.VLM_LATENCY_RATIO, grace=c.VLM_GRACE_SECONDS, rounds=3,
                    clock=time.perf_counter,  # the engine may be another process
                )  # fmt: skip
                checks.append(latency)
            checks.append(c.check_size(facts.get("rank"), facts.get("bytes")))
        except GateError:
            raise
        except Exception as error:  # a candidate that breaks is rejected, with a report
            checks.append(Check("finite", False, f"the candidate failed on the probe: {error!r}"[:300]))
        return checks

    def answer_checks(self, candidate: str, suites: Sequence[Suite]) -> list[Check]:
        """Detect the same answer to everything, always yes, or always no."""
        suites = [suite for suite in suites if suite.task == "vqa"]
        references = [item.answers[0] for suite in suites for item in suite.items()]
        base, after = ([t for suite in suites for t in self.score(suite, name).texts] for name in (None, candidate))
        closed = np.array([bool(polarity(reference)) for reference in references])
        checks = []
        for check, wanted in ((c.check_sameness, ~closed), (c.check_polarity, closed)):
            if wanted.sum() >= c.FEWEST:
                own, first, second = (list(compress(texts, wanted)) for texts in (references, base, after))
                checks.append(check(own, first, second))
        return checks

    def _finite(self, candidate: str, suites: Sequence[Suite]) -> Check:
        try:
            with _living("answering the golden inputs"):
                self.vlm.golden(candidate)
        except AdapterError as error:
            return Check("finite", False, error.message[:300])
        asked = probe(suites)
        replies = [reply for suite, few in asked for reply in self._ask_all(suite, few, candidate, "probe, candidate")]
        bad = sum(not _is_finite(reply) for reply in replies)
        detail = f"{bad} of {len(replies)} answers have a log-probability of NaN or infinity"
        return Check("finite", not bad, detail, float(bad), 0.0)

    def _log_probabilities(
        self, asks: Sequence[GenerationRequest], answers: Sequence[str], adapter: str | None
    ) -> list[float]:
        return [score for (score,) in self.vlm.scores(asks, [[answer] for answer in answers], adapter)]

    def _reranked(self, suite: Suite, adapter: str | None, label: str) -> VlmAnswers:
        """Each item has the score of its text's hits, and that as its answer."""
        hits, items, folder = FirstHits.of(suite, *self.clip()), suite.items(), self.cache or suite.cache

        def compute() -> list[NDArray[np.float64]]:
            pixels = {item.source: np.array(open_picture(item), dtype=np.uint8) for item in items}
            pairs = [(text, source) for text, own in zip(hits.texts, hits.sources, strict=True) for source in own]
            asks = [question(pixels[source], ABOUT_IMAGE.format(text)) for text, source in pairs]
            self.question_count += len(asks)
            with _living(f"reranking for suite {suite.name}"):
                scores = self.vlm.scores(asks, [CHOICES] * len(asks), adapter, label=label)
            return [np.array([yes - no for yes, no in scores]).reshape(hits.right.shape)]

        what = [*hits.key, ABOUT_IMAGE, self.base.digest, adapter or "base", self.kind]
        path = folder and folder / f"{digest12(digest_json(what))}.npz"
        (odds,) = kept(path, ("odds",), compute, lambda known: known[0].shape == hits.right.shape)
        earned = hits.ndcg(odds)[[hits.texts.index(item.text) for item in items]]
        ids = np.array([item.id for item in items], dtype=np.str_)
        return VlmAnswers(ids, tuple(f"NDCG@10 {score:.2f}" for score in earned), earned[:, None])

    def _texts(self, suite: Suite, items: Sequence[Item], adapter: str | None, label: str) -> list[str]:
        missing = [item for item in items if self._key(suite, item, adapter) not in self._known_texts]
        self._ask_all(suite, missing, adapter, label)
        return [self._known_texts[self._key(suite, item, adapter)] for item in items]

    def _ask_all(self, suite: Suite, items: Sequence[Item], adapter: str | None, label: str) -> list[GenerationResult]:
        replies: list[GenerationResult] = []
        size = max((math.prod(open_picture(item).size) * 3 for item in spread(items, 8)), default=1)
        count = max(1, KEEP_PIXELS // max(size, 1))
        for some in (items[start : start + count] for start in range(0, len(items), count)):
            asks = [self._ask(item, self._tokens(suite)) for item in some]
            self.question_count += len(asks)
            with _living(f"answering suite {suite.name}"):
                own = self.vlm.replies(asks, adapter, label=label)
            texts = [reply.text.strip() if _is_finite(reply) else "" for reply in own]
            self._remember(suite, some, adapter, texts)
            replies += own
        return replies

    def _ask(self, item: Item, max_tokens: int) -> GenerationRequest:
        return question(np.array(open_picture(item), dtype=np.uint8), item.asked or item.text, max_tokens)

    def _tokens(self, suite: Suite) -> int:
        """Maximum answer length: the suite's longest reference plus SPARE_TOKENS."""
        known = self._room.get(suite.digest())
        if known is None:
            answers = sorted({answer for item in suite.items() for answer in item.answers})
            longest = max(len(ids) for ids in self._tokenizer(answers, add_special_tokens=False)["input_ids"])
            known = self._room[suite.digest()] = min(longest + SPARE_TOKENS, self.serve.vlm_max_tokens)
        return known

    @cached_property
    def _tokenizer(self) -> Any:
        return self.base.processor().tokenizer

    def _key(self, suite: Suite, item: Item, adapter: str | None) -> tuple[str | None, str, str, int]:
        return adapter, item.source, item.text, self._tokens(suite)

    def _remember(self, suite: Suite, items: Sequence[Item], adapter: str | None, texts: Sequence[str]) -> None:
        for item, text in zip(items, texts, strict=True):
            self._known_texts[self._key(suite, item, adapter)] = text


@contextmanager
def _living(doing: str) -> Iterator[None]:
    """Turn the death of the engine, or an unacceptable question, into a GateError: it is not the candidate's fault, so
    the update waits and is judged again."""
    try:
        yield
    except InvalidRequest as error:
        raise GateError(f"{doing}: a question cannot be asked: {error.message}", error.fix) from error
    except EngineDead as error:
        raise GateError(
            f"the VLM engine ended while {doing}: {error.message}",
            "The update is judged again; if it happens again, look at memory and `ratchet doctor`.",
        ) from error


def _is_finite(reply: GenerationResult) -> bool:
    return all(math.isfinite(value) for value in reply.logprobs)
