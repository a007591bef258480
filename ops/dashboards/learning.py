"""Gain and forgetting over releases, the gate suite by suite, training and its budget."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard as make

from ops.dashboards import panels
from ops.dashboards.panels import BLUE, GREEN, GREY, ORANGE, RED, bars, lines, number, row, states
from ops.dashboards.queries import GAIN, mean

RATE = "[$__rate_interval]"
FORGETTING = "max by (family) (ratchet_release_forgetting_ratio)"

STATE = " + ".join(
    f'{code} * max by (family) (ratchet_update_state{{state="{state}"}})'
    for code, state in enumerate(("training", "judging", "proposing"), 1)
)
WORDS = {"0": ("waiting", GREY), "1": ("training", BLUE), "2": ("judging", ORANGE), "3": ("proposing", GREEN)}


def dashboard() -> make.Dashboard:
    """What updates bring, what they cost, and why the gate said what it said."""
    board = panels.dashboard("learning", "Learning", "What updates bring, what the gate says of them, what they cost.")
    row(
        board,
        "At a glance",
        number(
            "Gained", "Mean gain of the live adapters over the base on new data that was never trained on.",
            "percentunit", (GAIN, "{{family}}"), decimals=1, trend=False, nothing="never judged",
            steps=[(None, RED), (-0.001, GREY), (0.001, GREEN)],
        ),
        number(
            "Forgotten", "Mean loss of the live adapters to the base on the retention suites; negative is better than "
            "the base.", "percentunit", (FORGETTING, "{{family}}"), decimals=1, trend=False, nothing="never judged",
            steps=[(None, GREEN), (0.02, ORANGE), (0.05, RED)],
        ),
        number(
            "Least margin left", "Of the suite that came closest to its margin at the last verdict. Below 0 it did not "
            "pass. Small: the next update may be refused; look at the report.", "percentunit",
            ("min by (family) (ratchet_gate_margin_left_ratio)", "{{family}}"), decimals=1, trend=False,
            steps=[(None, RED), (0, ORANGE), (0.01, GREEN)], nothing="no verdict yet",
        ),
        number(
            "Last verdict", "How long ago a verdict fell, by its outcome. When `passed` grows old while others fall, "
            "the gate rejects for long: see its reports (`ratchet gate report`).", "s",
            ("min by (outcome) (time() - ratchet_gate_last_verdict_timestamp_seconds)", "{{outcome}}"), trend=False,
            nothing="no verdict yet",
        ),
        number(
            "Updates of a day", "Updates that ended in the last 24 hours. `failed` ones say why in "
            "`ratchet status`.", "none", ("round(sum by (state) (increase(ratchet_updates_total[1d])))", "{{state}}"),
            trend=False,
        ),
        number(
            "New samples", "Samples that no update has learned or tried.", "short",
            ("max by (family) (ratchet_update_new_samples)", "{{family}}"),
        ),
    )  # fmt: skip
    row(
        board,
        "Before the gate",
        lines(
            "Fresh items", "Independent samples that were kept out of training, since the live release's data, and "
            "those that the gate needs to show a gain of `gate.detect`. An update, or a candidate that was "
            "inconclusive, waits for them.", "short",
            ("max by (family) (ratchet_update_fresh_items)", "there {{family}}"),
            ("max by (family) (ratchet_update_needed_items)", "needed {{family}}"), stairs=True, least=0,
            width=24,
        ),
    )  # fmt: skip
    row(
        board,
        "Over releases",
        lines(
            "Gain of the live release", "Stairs that go up: each release knows more of the new data than the base. The "
            "blue marks are releases; a rollback goes back down.", "percentunit", (GAIN, "{{family}}"), stairs=True,
            least=0, width=8,
        ),
        lines(
            "Forgetting of the live release", "It stays near 0. Stairs that go up are small losses that add up: the "
            "gate compares with the base as well, and will refuse.", "percentunit", (FORGETTING, "{{family}}"),
            stairs=True, least=0, most=0.05, width=8, steps=[(None, GREEN), (0.05, RED)],
        ),
        lines(
            "Verdicts", "Verdicts of the gate in each hour.", "none",
            ("sum by (outcome) (increase(ratchet_gate_verdicts_total[1h]))", "{{outcome}}"), stacked=True, width=8,
        ),
    )  # fmt: skip
    row(
        board,
        "The last verdict",
        bars(
            "Scores of the suites", "Base, incumbent and candidate on the same items. Gain suites (`fresh.`) should "
            "grow from left to right; retention suites should stay.", "percentunit",
            ('max by (family, suite, model) (ratchet_gate_suite_score_ratio)', "{{family}} {{suite}}: {{model}}"),
            most=1, height=12,
        ),
        bars(
            "Margin left", "What the lower bound of each retention suite leaves of its margin, against the worse of "
            "base and incumbent. Red: not proven to be kept.", "percentunit",
            ("max by (family, suite) (ratchet_gate_margin_left_ratio)", "{{family}} {{suite}}"), least=-0.05, most=0.1,
            steps=[(None, RED), (0, ORANGE), (0.01, GREEN)], height=12,
        ),
        lines(
            "Shift of features", "How far the candidate's features of retention items are from the incumbent's and the "
            "base's, by tower, as 1 - cosine; 0: not moved. From the base it grows with each release; if one tower "
            "moves alone, or an update moves much more than those before, look at what it lost.", "none",
            ("max by (family, tower, model) (ratchet_gate_feature_shift_ratio)",
            "{{family}} {{tower}}, from the {{model}}"), stairs=True, least=0, width=24,
        ),
    )  # fmt: skip
    row(
        board,
        "Training",
        states(
            "The trainer", "What it does for each model. It waits for new samples, for the budget, or for a release.",
            "none", (STATE, "{{family}}"), words=WORDS, width=8,
        ),
        lines(
            "Loss", "Weighted sum of the terms at the last step. It falls within an update, and starts anew with the "
            "next.", "none", ('max by (family) (ratchet_update_loss{term="loss"})', "{{family}}"), width=8,
        ),
        lines(
            "Loss by term", "Terms of the objective at the last step, unweighted. A distillation term that grows is "
            "forgetting in the making.", "none",
            ('max by (family, term) (ratchet_update_loss{term!="loss"})', "{{family}} {{term}}"), width=8,
        ),
        lines(
            "Steps", "Training steps a minute. It falls while serving needs the CPU.", "none",
            (f"60 * sum by (family) (rate(ratchet_update_steps_total{RATE}))", "{{family}}"), width=8,
        ),
        lines(
            "Time of an update", "Mean time to train and to judge, over a day.", "s",
            (mean("ratchet_update_seconds", "family", "[1d]"), "train {{family}}"),
            (mean("ratchet_gate_seconds", "family", "[1d]"), "gate {{family}}"), width=8,
        ),
        lines(
            "New samples over time", "Those that wait: more with the stream, fewer when an update has ended. Of a day: "
            "those that updates visited, those that their budget did not pay for (`budget.gflops_per_update`), and "
            "those that could not be prepared. `unjudged` is 1 while suites or the reference pool are missing.",
            "short", ("max by (family) (ratchet_update_new_samples)", "waiting {{family}}"),
            ("sum by (family) (increase(ratchet_update_visited_total[1d]))", "visited {{family}}"),
            ("sum by (family) (increase(ratchet_update_passed_over_total[1d]))", "passed over {{family}}"),
            ("sum by (family) (increase(ratchet_update_left_out_total[1d]))", "left out {{family}}"),
            ("max by (family) (ratchet_update_unjudged)", "unjudged {{family}}"),
            stairs=True, width=8,
        ),
    )  # fmt: skip
    row(
        board,
        "Budget",
        lines(
            "Token bucket", "Memory-adjusted FLOPs that are left; below the line there is not enough for an update.",
            "si:FLOP", ("max(ratchet_budget_level_flops)", "left"), ("max(ratchet_budget_update_flops)",
            "for one update"), ("max(ratchet_budget_size_flops)", "size"), least=0, width=8,
        ),
        lines(
            "Spent", "Memory-adjusted FLOPs spent in each hour, by purpose.", "si:FLOP",
            ("sum by (purpose) (increase(ratchet_budget_spent_flops_total[1h]))", "{{purpose}}"), stacked=True, width=8,
        ),
        lines(
            "Planned and spent by an update", "Memory-adjusted FLOPs of the last update of each model. Less spent than "
            "planned: its wall-clock bound ended it, or the recipe's most steps.", "si:FLOP",
            ("max by (family) (ratchet_update_planned_flops)", "planned {{family}}"),
            ("max by (family) (ratchet_update_spent_flops)", "spent {{family}}"), stairs=True, least=0, width=8,
        ),
    )  # fmt: skip
    return board
