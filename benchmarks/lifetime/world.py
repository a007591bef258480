"""The world of a simulated stream: suites and domains with all their items, and models that answer them.

Its truth is known: a model's score is its share of hits over all items of a domain, of which the gate sees a few. What
is not drawn from committed outcomes is calibrated on the held-out domains of the chains of
``docs/benchmarks/continual`` (recipe ``default``, five chains of eight updates): see the constants.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from benchmarks.gate.stock import Ranks
from benchmarks.lifetime.moves import Generator, Moves
from benchmarks.lifetime.outcomes import Source
from updater.gate.suites import Suite

ITEMS = 3000
"""Of a suite or domain: a share of hits moves in steps of a sixtieth of a point."""
HELD_OUT = {
    "clipart_retrieval": 822, "emoji_retrieval": 284, "fashion_classes": 1000, "flags_retrieval": 239,
    "pixel_classes": 625, "pixel_retrieval": 625, "stamp_classes": 569,
}  # fmt: skip
"""Items of the shipped suites in service."""
DOMAINS = 8
"""Domains of the stream, each in many updates; they take turns among the kinds with committed outcomes."""
BACK = 0.2
"""Share of the items of a static suite that return to the base's answer with an update that did not learn them."""
CHURN = {"clipart_retrieval": 1.4, "emoji_retrieval": 4.0, "flags_retrieval": 0.9, "pixel_retrieval": 0.8}
OTHER_CHURN, STREAM_CHURN = 1.0, 0.35
"""Moves of an item with such an update, on average, in a static suite and in a domain of the stream. A move is that of
a donor, whose training was short. Answers then differ from the predecessor's and from the base's in as many cases as in
the chains: of retrieval suites from the base's in 3.7% after one update and in 7.3% after eight (module churn)."""
REVERSION, SPREAD = 0.24, 0.005
"""An update brings a suite that is not learned this much nearer to the base's score, and also moves it: the chains'
regression of change on level, and its deviation without that of 64 items."""
FORGOTTEN, FORGOTTEN_SPREAD = 0.003, 0.005
"""Share of a domain's gain that an update of another one loses, and the deviation.

The first is ``forgotten_without_largest`` of `ratchet bench continual` over the two chains in
``docs/benchmarks/lifetime`` (of the default as it was until commit bf0544b), in which an update has the memory that the
recipe asks for: 1,500 pairs of earlier updates and as many of the base's domains. With 96 of each, as in the comparison
of methods, it is 0.054. The second is the deviation of changes of a domain that the incumbent had learned, in the
gate's outcomes (700 to 2,000 items), without the part that is proportional to the level and without the items' own
deviation."""
Model = Mapping[str, Ranks]


@dataclass(frozen=True, slots=True)
class Domain:
    """All items of one kind."""

    name: str
    suite: Suite
    """A static suite of them; of a domain of the stream its task and metric."""
    moves: Moves
    suite_items: int
    """Number of leading items in the static suite. 0: the domain comes with the stream."""
    churn: float = STREAM_CHURN

    def score(self, model: Model) -> float:
        return self.moves.share(model[self.name])


@dataclass(frozen=True, slots=True)
class World:
    """All domains, and the base."""

    domains: Mapping[str, Domain]
    base: Model

    @property
    def streamed(self) -> list[Domain]:
        return [domain for domain in self.domains.values() if not domain.suite_items]

    @property
    def static(self) -> list[Domain]:
        return [domain for domain in self.domains.values() if domain.suite_items]

    def learned(self, domain: Domain, model: Model) -> float:
        """True points (as a share) that a model is above the base."""
        return domain.score(model) - domain.score(self.base)

    def candidate(
        self, incumbent: Model, gains: Mapping[str, float], harm: Mapping[str, float], forgotten: float, rng: Generator
    ) -> Model:
        """A model that an update makes of the incumbent.

        Args:
            gains: true gain on the domains that it learned, by name.
            harm: further losses by name, where nothing was learned.
            forgotten: mean share of the gain on other domains that it loses.
        """
        after: dict[str, Ranks] = {}
        for name, domain in self.domains.items():
            ranks, level = incumbent[name], self.learned(domain, incumbent)
            if name in gains:
                after[name] = domain.moves.learned(ranks, gains[name], rng)
            elif domain.suite_items:
                change = -REVERSION * level + rng.normal(0.0, SPREAD) - harm.get(name, 0.0)
                after[name] = domain.moves.changed(
                    ranks, change, rng, base=self.base[name], back=BACK, churn=domain.churn
                )
            elif ranks is self.base[name]:
                after[name] = ranks  # not yet learned, and not asked
            else:
                change = -forgotten * level + rng.normal(0.0, FORGOTTEN_SPREAD) - harm.get(name, 0.0)
                after[name] = domain.moves.changed(
                    ranks, change, rng, base=self.base[name], back=forgotten, churn=domain.churn
                )
        return after


def make_world(sources: Mapping[str, Source], rng: Generator) -> World:
    domains: dict[str, Domain] = {}
    base: dict[str, Ranks] = {}
    for domain, source in _domains(sources.values()):
        rows = rng.integers(len(source.base), size=ITEMS)
        domains[domain.name], base[domain.name] = domain, source.base[rows]
    return World(domains, base)


def _domains(sources: Iterable[Source]) -> Iterable[tuple[Domain, Source]]:
    new = []
    for source in sources:
        if source.suite.role == "retention":
            churn = CHURN.get(source.suite.name, OTHER_CHURN)
            yield Domain(source.suite.name, source.suite, Moves.of(source), _held_out(source), churn), source
        else:
            new.append((source, Moves.of(source)))
    for number in range(DOMAINS):
        source, moves = new[number % len(new)]
        yield Domain(f"domain-{number}", source.suite, moves, 0), source


def _held_out(source: Source) -> int:
    return min(HELD_OUT.get(source.suite.name, ITEMS), len(source.base))
