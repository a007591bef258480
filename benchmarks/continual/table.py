"""The results as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Method = dict[str, Any]
QUALITY = """\
Points against zero-shot after the last update, with 95% intervals of a paired bootstrap over items; one order, one
seed. A_KA: mean of the adaptation suites; A_ZS: of the held-out ones; GM: their geometric mean. Bold: clear of zero.
`≈` marks no significant difference from the default recipe in GM. `nearest-mean` answers the suites with classes by the
nearest class mean on the base's features, and all others as the base does. GM without: of the adaptation suites but the
one that the method gained most on."""
KINDS = """\
Points against zero-shot after the last update: of the adaptation suites by what they ask for; of the classes of
`fashion` and `digits` that no update has, among all classes; and of the held-out suites of domains that the reference
pool does not contain."""
TUNED = """\
Geometric mean of each trial on the tuning suites, and A_ZS there against the base, on a stream of other pairs of the
same domains, in an order that no other table reports. A trial is a factor on the rates of a method and one on the
weights of its terms after the first, or on the odds of its merge's weight. Bold: that with which the method runs above:
the best one, and of the default the best one whose loss of A_ZS is not clear of zero. Methods that are not here run at
the rates and weights of their papers."""
COSTLY = """\
Steps of an update: too few at this budget to say anything of the method, so it has no rank."""
BUDGETS = """\
After the last update of one chain, against zero-shot: learned (A_KA), kept (A_ZS) and, in brackets, steps of an update,
by multiples of the budget."""
NOISE = """\
After the last update of one chain, against zero-shot, with wrong captions in every update: learned (A_KA), kept (A_ZS),
and the default's lead in GM with its 95% interval over items, bold if it is clear of zero."""
LEAD = """\
Points by which the default leads in GM, a mean over bases of the mean over all chains that both have (orders, seeds),
with 95% intervals over items; without the suite by which it leads most; and without the suites whose classes were
trained on. Wide: intervals over items, suites, orders and seeds; bases are the same in all draws. Bold: clear of zero.
`zero-shot` is the untouched base."""
ALONE = """\
On this base alone, with {gflops:g} MAF an update. Zero-shot it scores {a_ka:.1f} and {a_zs:.1f}; geometric mean
{geometric_mean:.1f}. Columns as in the first table and as in the last one."""
NAMED = """\
X-TAIL-mini: suites with names are asked for theirs among the names of all of them at once. Transfer: before a suite's
own update, held-out suites always; Average: after all updates; Last: at the end. Zero-shot the base has {zero:.1f}."""
BLIND = """\
Score at the end on the adaptation and the held-out suites, and of the same questions with a grey picture for each."""
STREAM = """\
MTIL: score before a suite's own update (Transfer), over all updates (Avg), at the end (Last). TiC: on the update just
learned, on earlier ones, on later ones."""
CROSSING = """\
Points of text-to-image recall that new queries gain or lose. In the index of the version before, mean over updates: as
it is; with a backward map (Procrustes, fitted on a quarter of its images); with the map and half of it embedded again.
At the end and against the base: in the base's index, without a map and with one, and in a new index."""
COST = """\
All updates of one chain, on one core. Peak memory is counted: weights, gradients, moments and kept activations."""
REPEATED = """\
Mean and standard deviation over chains, one for each order and seed. GM − default: over the chains that both have, by a
bootstrap over items as above; `≈` marks no significant difference. By order: over its seeds, the first order is
that of the tables above. Lowest: the lowest GM of any chain at any point of its stream. Forgotten: share of what was
learned of a suite (3 points at least) that a later update of another one loses, by regression through the origin."""


def markdown(outcome: dict[str, Any]) -> str:
    """The report: the setup, three tables, and how to read them."""
    zero, methods = outcome["zero_shot"], outcome["methods"]
    where = {name: ", ".join(values) or "unknown" for name, values in outcome["origin"].items()}
    ranked = {name: m for name, m in methods.items() if m.get("affordable", True)}
    costly = {name: m for name, m in methods.items() if name not in ranked}
    several = [(name, m) for name, m in methods.items() if m["all"]["chains"] > 1]
    repeated = dict(sorted(several, key=lambda each: -each[1]["all"]["gm_delta"]))
    parts = [
        "# Learning on a stream",
        f"`ratchet bench continual`, {where['date']}, commit `{where['commit']}`, on {where['cpu']}, "
        f"torch {where['torch']}.",
        f"{outcome['updates']} updates of at most {outcome['protocol']['new']} pairs each, one after another, with "
        f"{outcome['protocol']['gflops']:g} memory-adjusted GFLOPs (MAF) each for every method, teacher passes "
        f"included. Zero-shot, the base scores {zero['a_ka']:.1f} on the adaptation suites "
        f"({', '.join(outcome['adaptation'])}) and {zero['a_zs']:.1f} on the held-out ones "
        f"({', '.join(outcome['held_out'])}); geometric mean {zero['geometric_mean']:.1f}.",
        *("## Learned and kept", QUALITY, _table(ranked | outcome["untrained"], _QUALITY)),
        *(("## Not affordable", COSTLY, _table(costly, _FEW)) if costly else ()),
        *_budgets_part(outcome.get("budgets", {})),
        *_noise_part(outcome.get("noise", {})),
        *_kinds_part(outcome, methods),
        *_lead_part(outcome.get("lead", {})),
        *_bases_part(outcome.get("bases", {})),
        *_tuned_part(outcome.get("tuned", {})),
        *_named_part(methods),
        *_blind_part(methods),
        *("## Along the stream", STREAM, _table(methods, _STREAM)),
        *_crossing_part(methods),
        *("## Cost", COST, _table(methods, _COST)),
    ]
    if repeated:
        parts += ["## Orders and seeds", REPEATED, _table(repeated, _REPEATED)]
    if outcome["failed"]:
        parts += ["## Not run", "\n".join(f"- `{name}`: {reason}" for name, reason in outcome["failed"].items())]
    return "\n\n".join(parts) + "\n"


def _lead_part(leads: dict[str, Method]) -> list[str]:
    return ["## The default's lead", LEAD, _table(leads, _LEAD)] if leads else []


def _bases_part(bases: dict[str, Method]) -> list[str]:
    """The results of each base, if there are several."""
    parts = []
    for name, base in bases.items() if len(bases) > 1 else ():
        about = ALONE.format(gflops=base["protocol"]["gflops"], **base["zero_shot"])
        parts += [f"## On the base `{name}`", about, _table(base["methods"] | base["untrained"], _QUALITY)]
        parts += [_table(base["lead"], _LEAD)] if base["lead"] else []
    return parts


def _budgets_part(budgets: dict[str, Method]) -> list[str]:
    if len(budgets) < 2:
        return []
    several = sorted({name for methods in list(budgets.values())[1:] for name in methods})
    rows = {name: {budget: methods.get(name) for budget, methods in budgets.items()} for name in several}
    return ["## Larger budgets", BUDGETS, _table(rows, [(f"× {budget}", _end(budget)) for budget in budgets])]


def _end(budget: str) -> Callable[[Method], str]:
    shown = "{a_ka:+.1f}, {a_zs:+.1f} ({steps:g})"
    return lambda row: shown.format(**row[budget]) if row[budget] else "–"


def _noise_part(noise: dict[str, dict[str, Any]]) -> list[str]:
    if not noise:
        return []
    under_noise = {name for each in list(noise.values())[1:] for name in each["ends"]}
    rows = {
        name: {label: (each["ends"].get(name), each["lead"].get(name)) for label, each in noise.items()}
        for name in sorted(under_noise)
    }
    return ["## Wrong captions", NOISE, _table(rows, [(label, _under(label)) for label in noise])]


def _under(label: str) -> Callable[[Method], str]:
    def cell(row: Method) -> str:
        end, lead = row[label]
        shown = "{a_ka:+.1f}, {a_zs:+.1f}".format(**end) if end else "–"
        return f"{shown}; {_shown(lead['gm'])}" if lead else shown

    return cell


def _tuned_part(tuned: dict[str, list[dict[str, Any]]]) -> list[str]:
    if not tuned:
        return []
    lines = ["| method | trials: rates, weights |", "|---|---|"]
    for name, tried in tuned.items():
        cells = (f"**{_trial(t)}**" if t["chosen"] else _trial(t) for t in tried)
        lines.append(f"| `{name}` | {'; '.join(cells)} |")
    return ["## Rates and weights", TUNED, "\n".join(lines)]


def _trial(trial: dict[str, Any]) -> str:
    return "× {rate:g}, × {second:g}: {gm:.1f} ({a_zs:+.1f})".format(**trial)


def _kinds_part(outcome: dict[str, Any], methods: dict[str, Method]) -> list[str]:
    if not outcome["classes"]:
        return []
    return ["## Retrieval, classes, and what the reference does not contain", KINDS, _table(methods, _KINDS)]


def _blind_part(methods: dict[str, Method]) -> list[str]:
    with_blind = {name: method for name, method in methods.items() if "blind" in method}
    return ["## Without the pictures", BLIND, _table(with_blind, _BLIND)] if with_blind else []


def _crossing_part(methods: dict[str, Method]) -> list[str]:
    if not all("cross_version" in method for method in methods.values()):
        return []
    return ["## Searches that cross versions", CROSSING, _table(methods, _CROSSING)]


def _named_part(methods: dict[str, Method]) -> list[str]:
    with_names = {name: method for name, method in methods.items() if "xtail" in method}
    if not with_names:
        return []
    zero = next(iter(with_names.values()))["xtail"]["zero_shot"]
    return ["## One label set over all domains", NAMED.format(zero=zero), _table(with_names, _NAMED)]


def _table(methods: dict[str, Method], columns: Sequence[tuple[str, Callable[[Method], str]]]) -> str:
    names = ["method", *(title for title, _ in columns)]
    lines = ["| " + " | ".join(names) + " |", "|---" + "|---:" * len(columns) + "|"]
    for name, method in methods.items():
        lines.append(f"| `{name}` | " + " | ".join(cell(method) for _, cell in columns) + " |")
    return "\n".join(lines)


def _interval(key: str) -> Callable[[Method], str]:
    return lambda method: _shown(method["intervals"].get(key))


def _lead(key: str) -> Callable[[Method], str]:
    return lambda method: _shown(method.get(key))


def _wide(key: str) -> Callable[[Method], str]:
    return lambda method: _shown(method.get("wide", {}).get(key))


def _shown(interval: dict[str, Any] | None) -> str:
    if interval is None:
        return "–"
    shown = f"{interval['value']:+.1f} ({interval['low']:+.1f} to {interval['high']:+.1f})"
    return f"**{shown}**" if interval["clear"] else shown


def _like_default(figures: dict[str, Any]) -> str:
    interval = figures["against_default"]
    if not interval:
        return "–"
    return f"{interval['value']:+.1f}" if interval["clear"] else f"≈ {interval['value']:+.1f}"


def _within(group: str, key: str) -> Callable[[Method], str]:
    return lambda method: f"{method[group][key]:.1f}" if group in method else "–"


def _signed(group: str, key: str) -> Callable[[Method], str]:
    return lambda method: f"{method[group][key]:+.1f}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _by_order(key: str) -> Callable[[Method], str]:
    return _each_order(lambda order: f"{order[key]:+.1f}")


def _each_order(cell: Callable[[dict[str, Any]], str]) -> Callable[[Method], str]:
    return lambda method: ", ".join(cell(order) for order in method["all"]["by_order"].values())


def _spread(key: str) -> Callable[[Method], str]:
    return lambda method: f"{method['all'][f'{key}_delta']:+.1f} ± {method['all'][f'{key}_sd']:.1f}"


_QUALITY = (
    ("A_KA", _interval("a_ka")),
    ("A_ZS", _interval("a_zs")),
    ("GM", _interval("gm")),
    ("GM without", _interval("gm_without_largest")),
    ("GM − default", _like_default),
)
_FEW = (("steps", lambda m: f"{m['steps']}"), ("GM", _interval("gm")))
_KINDS = (
    ("retrieval", _interval("retrieval")),
    ("classes", _interval("classes")),
    ("classes that no update has", _interval("unseen")),
    ("outside of the reference", _interval("outside")),
)
_LEAD = (
    ("GM", _lead("gm")),
    ("wide", _wide("gm")),
    ("without the largest suite", _lead("gm_without_largest")),
    ("without seen classes", _lead("gm_without_seen")),
    ("wide", _wide("gm_without_seen")),
    ("A_KA", _lead("a_ka")),
    ("A_ZS", _lead("a_zs")),
    ("outside of the reference", _lead("outside")),
    ("chains", lambda m: f"{m['chains']}"),
)
_NAMED = (
    ("Transfer", _within("xtail", "transfer")),
    ("Average", _within("xtail", "average")),
    ("Last", _within("xtail", "last")),
)
_BLIND = (
    ("learned", _within("blind", "learned")),
    ("blind", _within("blind", "learned_blind")),
    ("kept", _within("blind", "kept")),
    ("blind", _within("blind", "kept_blind")),
)
_STREAM = (
    ("Transfer", _within("mtil", "transfer")),
    ("Avg", _within("mtil", "average")),
    ("Last", _within("mtil", "last")),
    ("in-domain", _within("tic", "in_domain")),
    ("backward", _within("tic", "backward")),
    ("forward", _within("tic", "forward")),
)
_CROSSING = (
    ("old index", _signed("cross_version", "new_at_0")),
    ("with a map", _signed("cross_version", "mapped_at_0")),
    ("half of it new", _signed("cross_version", "mapped_at_0.5")),
    ("base's index", _signed("cross_version", "new_base")),
    ("with a map", _signed("cross_version", "mapped_base")),
    ("new index", _signed("cross_version", "new_new")),
)
_COST = (
    ("MAF", lambda m: f"{m['maf']:,.0f}"),
    ("of it before steps", lambda m: f"{m['maf_prepare']:,.0f}"),
    ("steps", lambda m: f"{m['steps']}"),
    ("seconds", lambda m: f"{m['seconds']:.0f}"),
    ("CPU seconds", lambda m: f"{m['cpu_seconds']:.0f}"),
    ("peak MiB", lambda m: f"{m['peak_mib']:.0f}"),
    ("of full fine-tuning's", lambda m: f"{m['memory_ratio']:.0%}"),
)
_REPEATED = (
    ("chains", lambda m: f"{m['all']['chains']}"),
    ("A_KA", _spread("a_ka")),
    ("A_ZS", _spread("a_zs")),
    ("GM", _spread("gm")),
    ("GM − default", lambda m: _like_default(m["all"])),
    ("A_ZS by order", _by_order("a_zs")),
    ("GM by order", _by_order("gm")),
    ("GM − default by order", _each_order(_like_default)),
    ("lowest GM", _signed("all", "gm_lowest")),
    ("forgotten", lambda m: _share(m["all"]["forgotten_per_update"])),
    ("without the largest suite", lambda m: _share(m["all"]["forgotten_without_largest"])),
)
