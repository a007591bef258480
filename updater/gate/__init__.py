"""The gate: zero-shot suites and statistics that let a candidate into service, or keep it out.

In the order of one gate run:

run               opens an evaluator, asks candidate, incumbent and base, and decides -> Verdict
suites            what is asked: role (retention or gain), task, margin; their items and grades are in suite_items
sample_suites     suites of held-out samples, new ones and those of what was learned before; the best release by each
clip, vlm         what differs between families of models; score ranks a CLIP's answers, checks finds what is broken
decision          answers and checks -> results per suite, the pooled gain and one outcome
statistics        what may be concluded from paired outcomes
interim_analyses  the items that a test needs, when a candidate is asked again, and what each look spends of alpha
verdict           the result, as plain data
diagnostics       rare concepts, pairs that look alike, shares of yes, shift of features
report            a Verdict as report.json and one self-contained HTML page with the drawings of plots
gate_command      `ratchet gate run`, `report` and `pairs`, and scores for `ratchet tune`
"""
