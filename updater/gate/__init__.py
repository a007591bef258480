"""The gate: zero-shot suites and statistical tests that a candidate must pass before it is served.

In the order of one run:

run               opens an evaluator, asks candidate, incumbent and base, and decides -> Verdict
suites            questions: role (retention or gain), task, margin; suite_items has their items and grades
sample_suites     suites of held-out samples, new and earlier ones; the best release by each
clip, vlm         evaluators of each family; score ranks a CLIP's answers, checks finds broken candidates
decision          answers and checks -> results per suite, the pooled gain and one outcome
statistics        tests of paired outcomes
interim_analyses  items that a test needs, repeated looks at a candidate, and the alpha that each look spends
verdict           the result, as plain data
diagnostics       rare concepts, pairs that look alike, shares of yes, shift of features
report            a Verdict as report.json and one self-contained HTML page; plots draws its figures
gate_command      `ratchet gate run`, `report` and `pairs`, and scores for `ratchet tune`
"""
