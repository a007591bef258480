"""The gate: zero-shot suites and statistics that let a candidate into service, or keep it out.

suites            what is asked: items (suite_items), role (retention or gain), task, margin; sample_suites makes them
                  from held-out samples, new ones and those of what was learned before (held_out reads them)
evaluator         what differs between families of models: clip asks a CLIP (score by ranking, checks), vlm a VLM
                  (answers, vlm_checks); regressions shows what became worse
statistics        what may be concluded from paired outcomes (resampling: the bootstrap behind some of it)
interim_analyses  the items that a test needs, when a candidate is asked again, and what each look spends of alpha
decision          outcomes and checks -> results per suite, the pooled gain and one outcome
best_releases     the adapters that a candidate is compared with besides incumbent and base
verdict           the result, as plain data
diagnostics       what a verdict tells beside: rare concepts, pairs that look alike, shares of yes, shift of features
run               opens an evaluator, and does all of it for one candidate -> Verdict
report            a Verdict as report.json and one self-contained HTML page, and the samples that it names
gate_command      what the command line asks: `ratchet gate run`, `report` and `pairs`, scores for `ratchet tune`
"""
