"""The gate: zero-shot suites and statistics that let a candidate into service, or keep it out.

suites            what is asked: items (suite_items), role (retention or gain), task, margin; sample_suites makes them
from held-out samples, new ones and those of what was learned before (held_out reads them) evaluator         what
differs between families of models: clip asks a CLIP (score by ranking, checks), vlm a VLM (answers, vlm_checks);
regressions shows what became worse statistics        what may be concluded from paired outcomes (resampling: the
bootstrap behind some of it) interim_analyses  the items that a test needs, when a candidate is asked again, and what
each look spends of alpha decision          outcomes and checks -> results per suite, the pooled gain and one outcome
best_releases     the adapters that a candidate is compared with besides incumbent and base verdict           the
result, as plain data diagnostics       what a verdict tells beside: rare concepts, pairs that look alike, shares of
yes, shift of features run               opens an evaluator, and does all of it for one candidate -> Verdict report
a Verdict as report.json and one self-contained HTML page, and the samples that it names gate_command      what the
command line asks: `ratchet gate run`, `gate report`, `gate pairs`, and scores for `ratchet tune`

The names below are imported when they are first used: who only draws a report (the console) does without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from updater.gate.clip import ClipEvaluator
    from updater.gate.report import write_report
    from updater.gate.run import run_gate
    from updater.gate.sample_suites import fresh_suite, fresh_suites
    from updater.gate.suites import Suite, load_suites
    from updater.gate.verdict import Check, Regression, SuiteResult, Verdict

_MODULES = {
    "Check": "verdict",
    "ClipEvaluator": "clip",
    "Suite": "suites",
    "SuiteResult": "verdict",
    "Verdict": "verdict",
    "Regression": "verdict",
    "fresh_suite": "sample_suites",
    "fresh_suites": "sample_suites",
    "load_suites": "suites",
    "run_gate": "run",
    "write_report": "report",
}

__all__ = [
    "Check",
    "ClipEvaluator",
    "Regression",
    "Suite",
    "SuiteResult",
    "Verdict",
    "fresh_suite",
    "fresh_suites",
    "load_suites",
    "run_gate",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
