"""The page of the metrics: every one with its type, labels and meaning, from :mod:`core.metrics.declared`."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from core.metrics import declared

HEAD = """# Metrics

Names end with their base unit: seconds, bytes, flops, or `_ratio` for a share from 0 to 1; counters end with `_total`.
Where each process exports them: [Metrics](../operator/incidents.md#metrics-and-dashboards).
"""


def page() -> str:
    """The page."""
    metrics = [each for each in vars(declared).values() if isinstance(each, Counter | Gauge | Histogram)]
    lines = [HEAD, "| metric | type | labels | |", "|---|---|---|---|"]
    lines += [_row(each) for each in sorted(metrics, key=lambda each: str(each._name))]
    lines += ["\n## Labels\n", "| label | values |", "|---|---|"]
    return "\n".join([*lines, *(f"| `{name}` | {_cell(values)} |" for name, values in declared.LABELS.items())])


def _row(metric: Counter | Gauge | Histogram) -> str:
    kind = type(metric).__name__.lower()
    name = f"{metric._name}_total" if isinstance(metric, Counter) else metric._name
    labels = ", ".join(f"`{label}`" for label in metric._labelnames)
    return f"| `{name}` | {kind} | {labels} | {_cell(metric._documentation)} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
