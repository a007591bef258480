"""The gate: zero-shot suites and statistics that let a candidate into service, or keep it out.

suites      what is asked: items, role (retention or gain), task, margin
score       asks a model, through the serving engine: one outcome per item
statistics  what may be concluded from paired outcomes
checks      engineering: finite, not collapsed, small drift, the same in trainer and server, not slower
decision    outcomes and checks -> results per suite and one outcome
verdict     the result, as plain data
run         all of it for one candidate -> Verdict
report      a Verdict as report.json and one self-contained HTML page
command     `ratchet gate run` and `ratchet gate report`
"""

from updater.gate.report import write_report
from updater.gate.run import run_gate
from updater.gate.suites import Suite, fresh_suite, fresh_suites, load_suites
from updater.gate.verdict import Check, SuiteResult, Verdict, Worse

__all__ = [
    "Check",
    "Suite",
    "SuiteResult",
    "Verdict",
    "Worse",
    "fresh_suite",
    "fresh_suites",
    "load_suites",
    "run_gate",
    "write_report",
]
