"""``ratchet bench traces``: the spans of one search and one chat, from HTTP to the engine, and their cost.

A server with the settings' bases sends its spans to a collector of this process. Clients begin both traces, as a
gateway would (W3C ``traceparent``). ``--picture FILE`` draws them. ``traced_over_untraced`` is the median time of
searches that are sampled over that of others, taken in turns.
"""

from __future__ import annotations

import base64
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

import httpx
from matplotlib.figure import Figure

from benchmarks.bench_home import bench_home, clip_base
from benchmarks.command import bench_parser, show_figures
from benchmarks.machine import machine
from benchmarks.otlp_collector import CollectedSpan, OtlpCollector
from benchmarks.samples import fill_store, wait_until_searchable
from core.addresses import free_port
from core.errors import RatchetError
from core.progress import step
from core.settings import Settings
from core.waiting import wait_until
from ratchet_client import Client
from serving.app import serves_vlm, start
from tests.support.inputs import pictures

SAMPLES = 64
COLOURS: Final = ("#4269d0", "#6cc5b0", "#efb118", "#ff725c", "#a463f2")
PATIENCE_SECONDS: Final = 60.0
"""Span processors send every few seconds."""
REQUEST_SPANS: Final = "replica_handle_request"
"""Prefix of the spans that Ray Serve makes of the calls of its replicas."""
SEARCH: Final = ("intake", "queue", "forward", "search")
CHAT: Final = ("intake", "inspect", "decode", "engine")


@dataclass(frozen=True)
class Trace:
    """One request: its name, and its spans in the order in which they began."""

    name: str
    spans: Sequence[CollectedSpan]

    def rows(self) -> Iterator[tuple[int, str, float, float]]:
        """Depth, label, and seconds since the first span began, of begin and end."""
        by_id = {span.id: span for span in self.spans}
        first = self.spans[0].began
        for span, depth in self._ordered("", by_id):
            yield depth, _label(span), span.began - first, span.ended - first

    def _ordered(self, parent: str, by_id: Mapping[str, CollectedSpan]) -> Iterator[tuple[CollectedSpan, int]]:
        for span in self.spans:
            if (span.parent if span.parent in by_id else "") == parent:
                yield span, 0
                yield from ((child, depth + 1) for child, depth in self._ordered(span.id, by_id))


def run(settings: Settings, searches: int = 200, picture: Path | None = None) -> dict[str, Any]:
    """Measure on a new home with the settings' bases. Returns the figures.

    Raises RatchetError when the server does not start, or its spans do not arrive.
    """
    with tempfile.TemporaryDirectory(prefix="ratchet-bench-") as folder, OtlpCollector() as collector:
        ours = bench_home(settings, Path(folder), clip_base(settings, settings.base.clip), port=free_port())
        ours = ours.model_copy(
            update={"traces": ours.traces.model_copy(update={"endpoint": collector.url, "share": 0})}
        )
        fill_store(ours, pictures(SAMPLES))
        server = start(ours)
        try:
            server.wait_ready()
            with Client(server.url, ours.operator_key().get_secret_value()) as client:
                wait_until_searchable(client, SAMPLES)
            return measure(server.url, collector, serves_vlm(ours), searches, picture)
        finally:
            server.stop()


def measure(url: str, collector: OtlpCollector, chats: bool, searches: int, picture: Path | None) -> dict[str, Any]:
    """The same on a server whose spans go to the collector, and whose ``traces.share`` is 0."""
    with httpx.Client(base_url=url, timeout=120) as http, step("requests"):
        traces = [_trace(http, collector, "search", SEARCH)]
        if chats:
            traces.append(_trace(http, collector, "chat", CHAT))
        cost = _cost(http, searches)
    for trace in traces:
        _print(trace)
    figures: dict[str, Any] = {
        trace.name: {
            "spans": len(trace.spans), "names": sorted({_label(span) for span in trace.spans}),
            "seconds": round(max(end for *_, end in trace.rows()), 4),
        }
        for trace in traces
    }  # fmt: skip
    if picture is not None:
        draw(traces, picture)
        figures["picture"] = str(picture)
    return {**figures, "traced_over_untraced": cost, "machine": machine()}


def _trace(http: httpx.Client, collector: OtlpCollector, name: str, wanted: Sequence[str]) -> Trace:
    _ask(http, name, None)  # once before, so that no cache is cold and no kernel is chosen
    trace = secrets.token_hex(16)
    _ask(http, name, trace)
    missing: Callable[[], set[str]] = lambda: set(wanted) - {span.name for span in collector.spans(trace)}  # noqa: E731
    # The span of the request itself ends last.
    complete: Callable[[], bool] = lambda: not missing() and _request(collector.spans(trace)) is not None  # noqa: E731
    if not wait_until(complete, PATIENCE_SECONDS, pause=0.1):
        raise RatchetError(
            f"the trace of a {name} lacks {', '.join(sorted(missing())) or 'its request'}.", "See its log."
        )
    return Trace(name, collector.spans(trace))


def _request(spans: Sequence[CollectedSpan]) -> CollectedSpan | None:
    ids = {span.id for span in spans}
    outer = [span for span in spans if span.parent not in ids]
    return outer[0] if len(outer) == 1 else None


def _ask(http: httpx.Client, name: str, trace: str | None) -> float:
    """Seconds until the answer. ``trace``: its ID; None: not sampled."""
    parent = f"00-{trace or secrets.token_hex(16)}-{secrets.token_hex(8)}-0{int(trace is not None)}"
    began = time.perf_counter()
    if name == "search":
        body: dict[str, Any] = {"text": f"picture {secrets.token_hex(4)}", "k": 5}  # no cache has it
        answer = http.post("/v1/search", json=body, headers={"traceparent": parent})
    else:
        uri = f"data:image/png;base64,{base64.b64encode(pictures(1)[0]).decode()}"
        question = [{"type": "text", "text": "what is this?"}, {"type": "image_url", "image_url": {"url": uri}}]
        body = {"model": "vlm", "messages": [{"role": "user", "content": question}], "max_tokens": 8}
        answer = http.post("/v1/chat/completions", json=body, headers={"traceparent": parent})
    if answer.is_error:
        raise RatchetError(f"a {name} was answered with {answer.status_code}: {answer.text[:200]}")
    return time.perf_counter() - began


def _cost(http: httpx.Client, searches: int) -> float:
    pairs = [(_ask(http, "search", secrets.token_hex(16)), _ask(http, "search", None)) for _ in range(searches)]
    traced, untraced = zip(*pairs, strict=True)
    return round(float(median(traced) / median(untraced)), 3)


def _label(span: CollectedSpan) -> str:
    if not span.name.startswith(REQUEST_SPANS):
        return span.name
    return span.name.removeprefix(REQUEST_SPANS).strip()


def _print(trace: Trace) -> None:
    print(f"\n{trace.name}")
    for depth, label, began, ended in trace.rows():
        print(f"  {'  ' * depth}{label:<{48 - 2 * depth}} {began * 1e3:8.1f} ms  + {(ended - began) * 1e3:8.1f} ms")


def draw(traces: Sequence[Trace], path: Path) -> None:
    """Plot a bar for each span, indented by depth."""
    rows = [list(trace.rows()) for trace in traces]
    heights = [len(each) for each in rows]
    figure = Figure(figsize=(11, 0.9 * len(rows) + 0.28 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(rows), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axes, trace, spans in zip(panels, traces, rows, strict=True):
        for y, (depth, _, began, ended) in enumerate(spans):
            left, width = began * 1e3, (ended - began) * 1e3
            axes.barh(y, width, left=left, height=0.7, color=COLOURS[depth % len(COLOURS)])
            axes.annotate(f"{width:.1f} ms", (left + width, y), (3, 0), textcoords="offset points", va="center", size=7)
        labels = ["\N{NO-BREAK SPACE}" * 4 * depth + label for depth, label, *_ in spans]
        axes.set_yticks(range(len(spans)), labels, size=8, family="monospace")
        for tick in axes.get_yticklabels():
            tick.set_horizontalalignment("left")
        axes.tick_params(axis="y", length=0, pad=260)
        axes.invert_yaxis()
        axes.margins(x=0.08)
        axes.set_title(f"{trace.name}, ms", loc="left", size=10)
        axes.spines[["top", "right", "left"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main(settings: Settings, arguments: Sequence[str]) -> None:
    parser = bench_parser("traces", __doc__)
    parser.add_argument("--searches", type=int, default=200, help="sampled, and as many that are not (200)")
    parser.add_argument("--picture", type=Path, help="draw both traces into this SVG file")
    options = parser.parse_args(arguments)
    if options.searches < 1:
        parser.error("--searches must be 1 or more")
    show_figures("Traces", run(settings, options.searches, options.picture))
