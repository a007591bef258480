"""What is measured and traced: drift of a catalog, gain and forgetting of what is live, and spans of requests."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from opentelemetry import context, trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from prometheus_client import REGISTRY

from core import tracing
from core.ledger import Family, Ledger
from core.settings.serving import Serve
from core.settings.watching import Watch
from serving.catalog.watch import Moments, Watcher, frechet_distance, mean_shift
from serving.engines.preprocess import Preprocess
from serving.http.image_loader import ImageLoader
from serving.releases.controller import tell_of_live
from tests.unit.serving.catalog_world import HERE, World
from tests.unit.serving.scripted_vlms import ScriptedVlms, about_image, app_state, client, png

DIM = 64
SMALL = Watch(drift_window=16)


def value(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(f"ratchet_{name}", labels)


async def test_samples_of_another_kind_are_drift_for_a_while(catalog: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def encode(batch: np.ndarray, clip: str | None) -> np.ndarray:
        seeds = batch[:, 0, 0, 0].astype(int)
        made = np.stack([np.random.default_rng(seed).normal(size=8) for seed in seeds]).astype(np.float32)
        made[(seeds >= 100) & (seeds < 180), 0] += 3.0  # samples 100 to 179 are of another domain
        return made

    monkeypatch.setattr(catalog.reconciler.embedder, "encode", encode)
    await catalog.adopt([HERE])
    watcher, shifts = Watcher(catalog, SMALL), []
    before = value("drift_mean_shift", space="image")
    for start, count in ((0, 20), (20, 40), (60, 40), (100, 16), (116, 60)):
        catalog.put(start, count)
        await catalog.settle()
        await watcher.measure()
        shifts.append(value("drift_mean_shift", space="image") or 0.0)
    few, calm, still_calm, drifted, settled = shifts
    assert few == (before or 0.0), "few samples say nothing"
    assert 2 * max(calm, still_calm, settled) < drifted


def windows(shift: float = 0.0, scale: float = 1.0, seed: int = 0) -> tuple[Moments, Moments]:
    """512 and 128 vectors; dimensions depend on each other, as those of embeddings do."""
    random = np.random.default_rng(seed)
    mixing = random.normal(size=(DIM, DIM)) / np.sqrt(DIM)
    before = random.normal(size=(512, DIM)) @ mixing
    now = random.normal(size=(128, DIM)) @ mixing * scale + shift
    return Moments.of(before.astype(np.float32)), Moments.of(now.astype(np.float32))


def test_another_mean_is_seen_by_both_and_grows_with_the_shift() -> None:
    squares = [mean_shift(*windows(seed=seed)) ** 2 for seed in range(20)]
    assert np.mean(squares) == pytest.approx(1.0, abs=0.15), "without drift"
    calm, little, much = windows(), windows(shift=0.5), windows(shift=2.0)
    assert mean_shift(*calm) < 1.5 < 4 < mean_shift(*little) < mean_shift(*much)
    assert frechet_distance(*calm) < frechet_distance(*little) < frechet_distance(*much)
    assert frechet_distance(*much) == pytest.approx(DIM * 2.0**2, rel=0.1)


def test_the_frechet_distance_is_that_of_the_formula() -> None:
    one = Moments(10, np.array([0.0, 1.0]), np.array([1.0, 4.0]))
    other = Moments(10, np.array([3.0, 1.0]), np.array([4.0, 9.0]))
    assert frechet_distance(one, other) == pytest.approx(3.0**2 + (1 - 2) ** 2 + (2 - 3) ** 2)
    assert frechet_distance(one, one) == 0
    same = Moments.of(np.ones((16, 4), np.float32))
    assert mean_shift(same, same) == 0


FAMILIES: tuple[Family, ...] = ("clip", "vlm")


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}")


def release(ledger: Ledger, number: int, clip: str | None) -> tuple[Any, Any]:
    """Gain and forgetting of CLIP once this release is live."""
    ledger.commit_release(number, clip=clip, vlm=None, actor="test", reason="test", proposal_id=None)
    tell_of_live(ledger, FAMILIES)
    return value("release_gain_ratio", family="clip"), value("release_forgetting_ratio", family="clip")


def judge(ledger: Ledger, adapter: str, after: float) -> None:
    """A verdict: on new data the base had 0.2; on old data it had 0.6, of which 0.02 were lost."""
    update = f"update-{adapter}-{after}"
    ledger.begin_update(
        update, family="clip", recipe={}, seed=0, store_version=1, data_from={}, data_to={}, incumbent=None
    )
    suites = {
        "fresh": {"role": "gain", "base": 0.2, "after": after},
        "old": {"role": "retention", "base": 0.6, "after": 0.58},
    }
    ledger.record_verdict(update, adapter, "passed", "", {"suites": suites})


def test_each_live_release_shows_its_gain_and_forgetting_by_the_newest_verdict(ledger: Ledger) -> None:
    judge(ledger, "clip-a", 0.5)
    assert release(ledger, 1, None) == (0, 0)
    assert release(ledger, 2, "clip-a") == (pytest.approx(0.3), pytest.approx(0.02))
    assert value("release_gain_ratio", family="vlm") == 0
    assert release(ledger, 3, None)[0] == 0
    live = ledger.live()
    assert live is not None and value("release_committed_timestamp_seconds") == live.created_at.timestamp()
    assert value("release_live", part="controller") == 3
    assert math.isnan(release(ledger, 4, "clip-b")[0]), "without a verdict nothing is claimed"
    judge(ledger, "clip-b", 0.3)
    judge(ledger, "clip-b", 0.4)
    assert release(ledger, 5, "clip-b")[0] == pytest.approx(0.2)


TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "_tracer", None)  # off again afterwards
    tracing.switch_on(provider)
    return exporter


@contextmanager
def traced(trace_id: str = TRACE, sampled: bool = True) -> Iterator[None]:
    """As Ray Serve does with a request that has a ``traceparent``."""
    headers = {"traceparent": f"00-{trace_id}-{PARENT}-0{int(sampled)}"}
    token = context.attach(TraceContextTextMapPropagator().extract(headers))
    try:
        yield
    finally:
        context.detach(token)


def ids(span: ReadableSpan) -> tuple[str, str]:
    assert span.parent is not None
    return trace.format_trace_id(span.context.trace_id), trace.format_span_id(span.parent.span_id)


async def test_a_chat_with_an_image_has_its_intake_in_the_trace_of_its_client(spans: InMemorySpanExporter) -> None:
    with traced():
        async with client(app_state(ScriptedVlms())) as http:
            body = {"model": "vlm", "messages": about_image()}
            answer = await http.post("/v1/chat/completions", json=body, headers={"x-request-id": "r1"})
    assert answer.status_code == 200
    finished = spans.get_finished_spans()
    assert [span.name for span in finished] == ["intake", "inspect", "decode"]
    assert {ids(span) for span in finished} == {(TRACE, PARENT)}
    assert dict(finished[0].attributes or {}) == {"ratchet.request_id": "r1"}
    assert dict(finished[2].attributes or {}) == {
        "images": 1, "ratchet.request_id": "r1", "ratchet.release": 3, "ratchet.adapter": "vlm-b",
    }  # fmt: skip


async def test_a_request_that_is_not_sampled_has_no_spans_and_none_begins_a_trace(spans: InMemorySpanExporter) -> None:
    loader = ImageLoader(Preprocess(size=16), Serve())
    with traced(sampled=False):
        await loader.pixels([("image", png())])
        tracing.record("queue", 0.0, 1.0)
    await loader.pixels([("image", png())])
    assert spans.get_finished_spans() == ()
