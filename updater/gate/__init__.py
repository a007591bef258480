"""The gate: zero-shot suites and statistics that let a candidate into service, or keep it out.

suites      what is asked: items, role (retention or gain), task, margin; fresh makes them from new samples
asker       what differs between families of models: clip asks a CLIP (score, checks), vlm a VLM (answers, vlm_checks)
statistics  what may be concluded from paired outcomes (resampling: the bootstrap behind some of it)
decision    outcomes and checks -> results per suite and one outcome
verdict     the result, as plain data
run         all of it for one candidate -> Verdict
report      a Verdict as report.json and one self-contained HTML page
command     `ratchet gate run` and `ratchet gate report`
"""

from updater.gate.clip import ClipAsker
from updater.gate.fresh import fresh_suite, fresh_suites
from updater.gate.report import write_report
from updater.gate.run import run_gate
from updater.gate.suites import Suite, load_suites
from updater.gate.verdict import Check, SuiteResult, Verdict, Worse

__all__ = [
    "Check",
    "ClipAsker",
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
