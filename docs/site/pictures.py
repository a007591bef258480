"""Draws the documentation's diagrams and the logo, ``docs/images/*.svg``: ``python -m docs.site.pictures``.

They are 440 wide, so that their text is readable on a phone, and bring their own background, so that it is on any page.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from html import escape
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1]
FOLDER = DOCS / "images"
WIDTH = 440
LEFT, MIDDLE, RIGHT = 20, 160, 300
"""Left edges of the three columns of boxes."""
BOX_WIDTH, BOX_HEIGHT = 120, 44
STYLE = """
:root{--ground:#fafdfc;--ink:#16302b;--soft:#40625a;--process:#d9f2ec;--edge:#1d7a68;--state:#fff5d6;--rim:#b08a1c;\
--outside:#fff;--bad:#b23232}
@media (prefers-color-scheme:dark){:root{--ground:#16211e;--ink:#e6f2ee;--soft:#a9c4bc;--process:#1d4a40;\
--edge:#5cc2ac;--state:#4a3d14;--rim:#d9b44a;--outside:#24312d;--bad:#ff9c93}}
text{font:14px system-ui,sans-serif;fill:var(--ink);text-anchor:middle}
.label{font-size:13px;fill:var(--soft);paint-order:stroke;stroke:var(--ground);stroke-width:4px}
.start{text-anchor:start}.end{text-anchor:end}.strong{font-weight:600}
rect,circle{stroke:var(--edge);stroke-width:1.5}
.ground{fill:var(--ground);stroke:none}
.process,.good{fill:var(--process)}.state{fill:var(--state);stroke:var(--rim)}.outside{fill:var(--outside)}
.frame{fill:none;stroke:var(--soft);stroke-dasharray:5 4}
path{fill:none;stroke:var(--soft);stroke-width:1.5}
.arrow{marker-end:url(#tip)}.dashed{stroke-dasharray:5 4}
.interval{stroke:var(--edge);stroke-width:3}.margin{stroke:var(--bad);stroke-dasharray:5 4}.bad{fill:var(--bad)}
"""
TIP = (
    '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    '<path d="M0 0L8 4L0 8z" style="fill:var(--soft);stroke:none"/></marker></defs>'
)


class Drawing:
    """An SVG under construction."""

    def __init__(self, height: int, label: str) -> None:
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
            f'role="img" aria-label="{escape(label)}">',
            f"<style>{STYLE}</style>{TIP}",
            f'<rect class="ground" width="{WIDTH}" height="{height}" rx="10"/>',
        ]

    def text(self, x: float, y: float, words: str, kind: str = "") -> None:
        self._parts.append(f'<text class="{kind}" x="{x:g}" y="{y:g}">{escape(words)}</text>')

    def box(self, x: float, y: float, words: str, kind: str, width: float = BOX_WIDTH) -> None:
        """A box of one or two lines (separated by a line break)."""
        self._parts.append(f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{BOX_HEIGHT}" rx="8"/>')
        lines = words.split("\n")
        for number, line in enumerate(lines):
            self.text(x + width / 2, y + 27 + (number * 17 - (len(lines) - 1) * 8.5), line)

    def swatch(self, x: float, y: float, words: str, kind: str) -> None:
        """An entry of a legend."""
        self._parts.append(f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="18" height="14" rx="3"/>')
        self.text(x + 26, y + 12, words, "label start")

    def frame(self, x: float, y: float, width: float, height: float, title: str) -> None:
        self._parts.append(f'<rect class="frame" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="8"/>')
        self.text(x + 10, y + 18, title, "label start")

    def path(self, path: str, kind: str = "arrow") -> None:
        self._parts.append(f'<path class="{kind}" d="{path}"/>')

    def dot(self, x: float, y: float) -> None:
        self._parts.append(f'<circle class="good" cx="{x:g}" cy="{y:g}" r="5"/>')

    def svg(self) -> str:
        return "\n".join([*self._parts, "</svg>", ""])


def architecture() -> str:
    draw = Drawing(
        570, "Producers send records to a Kafka topic; ingest stores samples, or quarantines records; the updater "
        "trains a candidate; the gate judges it; the controller commits it and releases it to the replicas."
    )  # fmt: skip
    for path, kind in (
        ("M140 42H158", "arrow"), ("M280 42H298", "arrow"), ("M310 64V87H220V108", "arrow dashed"),
        ("M380 64V108", "arrow"), ("M260 200V177H330V156", "arrow"), ("M380 154V198", "arrow"),
        ("M380 244V288", "arrow"), ("M380 334V378", "arrow"), ("M220 334V357H330V378", "arrow"),
        ("M300 402H282", "arrow"), ("M380 424V468", "arrow"), ("M280 492H298", "arrow"),
    ):  # fmt: skip
        draw.path(path, kind)
    for x, y, words, end in (
        (268, 82, "invalid", ""), (386, 92, "valid", "start"), (374, 272, "candidate", "end"),
        (386, 352, "passed", "start"), (214, 352, "roll back, hold", "end"), (374, 452, "prepare, announce", "end"),
    ):  # fmt: skip
        draw.text(x, y, words, f"label {end}")
    for x, y, words, kind in (
        (LEFT, 20, "producers", "outside"), (MIDDLE, 20, "Kafka topic", "state"), (RIGHT, 20, "ingest", "process"),
        (MIDDLE, 110, "quarantine\ntopic", "state"), (RIGHT, 110, "sample store\n(lake)", "state"),
        (MIDDLE, 200, "maintenance", "process"), (RIGHT, 200, "updater", "process"),
        (MIDDLE, 290, "operator", "outside"), (RIGHT, 290, "gate", "process"),
        (MIDDLE, 380, "ledger", "state"), (RIGHT, 380, "release\ncontroller", "process"),
        (MIDDLE, 470, "clients", "outside"), (RIGHT, 470, "serving\nreplicas", "process"),
    ):  # fmt: skip
        draw.box(x, y, words, kind)
    for number, (words, kind) in enumerate((("process", "process"), ("state", "state"), ("outside", "outside"))):
        draw.swatch(LEFT + 130 * number, 538, words, kind)
    return draw.svg()


def record() -> str:
    draw = Drawing(
        420, "Ingest validates a record from the topic. It becomes a sample, a duplicate, or a quarantined record. "
        "A sample is trained on or held out for the gate, until it is corrected or deleted."
    )  # fmt: skip
    for path in (
        "M220 64V98",
        "M190 144V167H80V188",
        "M220 144V188",
        "M250 144V167H360V188",
        "M80 234V278",
        "M80 324V358",
    ):
        draw.path(path)
    draw.path("M420 212H430V42H282", "arrow dashed")
    draw.text(424, 34, "sent again", "label end")
    draw.text(228, 86, "one commit per batch", "label start")
    for x, y, words, kind in (
        (MIDDLE, 20, "record\non the topic", "state"), (MIDDLE, 100, "ingest\nvalidates", "process"),
        (LEFT, 190, "sample\n(stored)", "state"), (MIDDLE, 190, "duplicate\n(counted)", "state"),
        (RIGHT, 190, "quarantine\n(with reason)", "state"), (LEFT, 360, "corrected\nor deleted", "outside"),
    ):  # fmt: skip
        draw.box(x, y, words, kind)
    draw.box(LEFT, 280, "train, or fresh_eval: held out for the gate", "state", WIDTH - 2 * LEFT)
    draw.text(150, 379, "by a later record,", "label start")
    draw.text(150, 396, "a tombstone or an operator", "label start")
    return draw.svg()


def release() -> str:
    draw = Drawing(
        500, "A release: propose, prepare on every replica, commit to the ledger, announce to the ingress, stamp new "
        "requests, retire the release before the last."
    )  # fmt: skip
    lanes = {"updater or\noperator": 56, "release\ncontroller": 168, "replicas": 276, "ingress": 384}
    for words, x in lanes.items():
        draw.path(f"M{x} 64V484", "dashed")
        draw.box(x - 48, 20, words, "outside" if "operator" in words else "process", 96)
    asks, controller, replicas, ingress = lanes.values()
    for y, start, end, words, kind in (
        (100, asks, controller, "1 propose", "arrow"), (150, controller, replicas, "2 prepare", "arrow"),
        (190, replicas, controller, "digests", "arrow dashed"), (310, controller, ingress, "4 announce n+1", "arrow"),
        (460, controller, replicas, "retire n-1", "arrow"),
    ):  # fmt: skip
        draw.path(f"M{start} {y}H{end - math.copysign(3, end - start):g}", kind)
        draw.text((start + min(end, replicas)) / 2, y - 8, words, "label")
    draw.text(replicas + 8, 166, "load next to n, run", "label start")
    draw.text(replicas + 8, 183, "golden inputs", "label start")
    draw.box(controller - 104, 220, "3 commit n+1 to the ledger", "state", 208)
    draw.box(ingress - 120, 340, "5 new requests: n+1", "process", 168)
    draw.text(ingress + 48, 410, "requests in flight end on n", "label end")
    return draw.svg()


SUITES = (
    ("clip art", -0.3, -1.5, 0.8), ("emoji", 0.8, -1.2, 3.0), ("clothes", 0.0, -1.2, 1.2), ("flags", 5.6, 2.5, 9.0),
    ("game tiles", 0.6, -1.0, 2.4), ("photos", 0.0, -2.0, 2.0),
)  # fmt: skip
"""Change and interval in points on the demo's suites, of the default update (docs/benchmarks/README.md)."""
GAIN = ("3D emoji (new)", 11.5, 7.1, 16.7)


def verdict() -> str:
    draw = Drawing(
        450, "Each retention suite's change with its interval is right of the margin of -5 points; the gain on the new "
        "domain is above zero: passed."
    )  # fmt: skip

    def at(points: float) -> float:
        return 176 + points * 13.5

    zero, margin = at(0), at(-5)
    draw.text(LEFT, 34, "Retention: nothing may be lost", "strong start")
    for number, (name, value, low, high) in enumerate(SUITES):
        _interval(draw, 110 + 34 * number, name, at(value), at(low), at(high))
    draw.path(f"M{margin} 84V300", "margin")
    draw.text(margin - 20, 58, "margin -5: the whole line must be right of it", "label start")
    draw.path(f"M{margin} 64V80", "arrow")
    draw.text(LEFT, 334, "Gain: the new domain must improve", "strong start")
    _interval(draw, 366, GAIN[0], at(GAIN[1]), at(GAIN[2]), at(GAIN[3]))
    draw.path(f"M{zero} 84V300M{zero} 344V384", "")
    for points in (-5, 0, 5, 10, 15):
        draw.text(at(points), 404, f"{points:+d}" if points else "0", "label")
    draw.text(WIDTH / 2, 432, "points, candidate - incumbent; dot: estimate, line: interval", "label")
    return draw.svg()


def _interval(draw: Drawing, y: float, name: str, value: float, low: float, high: float) -> None:
    draw.text(LEFT, y + 5, name, "label start")
    draw.path(f"M{low:g} {y}H{high:g}", "interval")
    draw.dot(value, y)


METHODS = ("default", "wise-ft", "two-teachers", "zscl", "ema-merge", "vr-lwf", "codyra", "lwf", "full", "replay")


def learned() -> str:
    """Learned and kept by method, from the archived figures of ``ratchet bench continual``."""
    results = json.loads((DOCS / "benchmarks" / "continual" / "results.json").read_text())["methods"]
    draw = Drawing(
        112 + 34 * len(METHODS), "Points learned on new domains and kept on held-out ones, with 95% intervals."
    )  # fmt: skip
    last = 74 + 34 * len(METHODS)
    for title, key, zero in (("learned", "a_ka", 146), ("kept", "a_zs", 390)):
        draw.text(zero, 34, title, "strong")
        draw.path(f"M{zero} 46V{last - 16}", "")
        for number, name in enumerate(METHODS):
            found, y = results[name]["intervals"][key], 70 + 34 * number
            ends = [zero + 10.5 * found[end] for end in ("low", "high")]
            draw.path(f"M{ends[0]:g} {y}H{ends[1]:g}", "interval")
            draw.dot(zero + 10.5 * found["value"], y)
    for number, name in enumerate(METHODS):
        draw.text(12, 75 + 34 * number, name, "label start")
    for x, words in ((146, "0"), (198.5, "+5"), (251, "+10"), (390, "0"), (337.5, "-5"), (285, "-10")):
        draw.text(x, last + 4, words, "label")
    draw.text(WIDTH / 2, last + 24, "points against the untouched base", "label")
    return draw.svg()


def kubernetes() -> str:
    draw = Drawing(
        548, "In one namespace: a RayService with a head and workers answers clients; ingest, maintain, updater and "
        "console are Deployments; a Job migrates the ledger. PostgreSQL, object store and Kafka are yours."
    )  # fmt: skip
    draw.box(MIDDLE, 16, "clients", "outside")
    draw.path("M220 60V122")
    draw.text(228, 80, "ingress", "label start")
    draw.frame(10, 94, 420, 340, "namespace")
    draw.frame(LEFT, 124, 400, 124, "RayService (serving)")
    for x, words, width in ((30, "head", 120), (172, "worker", 112), (296, "worker", 112)):
        draw.box(x, 156, words, "process", width)
    draw.text(90, 218, "control, autoscaler", "label")
    draw.text(290, 218, "HTTP ingress, encoders, VLM,", "label")
    draw.text(290, 236, "catalog, release controller", "label")
    for column, row, words in (
        (0, 0, "ingest"), (1, 0, "maintain"), (2, 0, "updater"),
        (0, 1, "console"), (1, 1, "migration\n(Job)"), (2, 1, "training\n(optional)"),
    ):  # fmt: skip
        draw.box(30 + 130 * column, 264 + 58 * row, words, "process")
    draw.text(220, 392, "Pods keep no state that cannot be rebuilt;", "label")
    draw.text(220, 411, "NetworkPolicies close all other connections.", "label")
    draw.path("M220 434V476M80 488V478H360V488", "")
    draw.text(228, 462, "state, which you provide", "label start")
    for x, words in ((LEFT, "PostgreSQL\n(ledger)"), (MIDDLE, "object store"), (RIGHT, "Kafka")):
        draw.box(x, 488, words, "state")
    return draw.svg()


def logo() -> str:
    """A ratchet wheel with its pawl."""
    teeth, inner, outer = 12, 30.0, 40.0
    points = []
    for tooth in range(teeth):
        for angle, radius in ((tooth, inner), (tooth, outer), (tooth + 1, inner)):
            turn = 2 * math.pi * angle / teeth
            points.append(f"{48 + radius * math.sin(turn):.1f} {52 - radius * math.cos(turn):.1f}")
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 96 96" role="img" aria-label="Ratchet">'
        f'<path fill="#1d9a80" fill-rule="evenodd" d="M{"L".join(points)}zM48 38a14 14 0 1 0 .1 0z"/>'
        '<path fill="#d9a520" d="M58 2L88 8L70 26L64 22z"/></svg>\n'
    )


PICTURES: dict[str, Callable[[], str]] = {
    "architecture": architecture,
    "record": record,
    "release": release,
    "verdict": verdict,
    "kubernetes": kubernetes,
    "learned": learned,
    "logo": logo,
}


def main() -> None:
    for name, draw in PICTURES.items():
        (FOLDER / f"{name}.svg").write_text(draw())


if __name__ == "__main__":
    main()
