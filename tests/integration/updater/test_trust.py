"""Sources that the updater learns to do without, over a real store, ledger and gate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.settings import Settings
from serving.engines.clip_base import ClipBase, load_base
from streams.publish.folders import FolderItem, write_folder
from streams.store.sample_queries import trace
from streams.store.sample_store import SampleStore
from tests.integration.updater.home import TOPIC, add_samples, changed, judged_as, made_by, release, report_of
from tests.support.colour_squares import colour_of, encoded_square
from tests.unit.updater.builders import recipe
from updater.data.pools import draw_pools
from updater.gate.clip import ClipEvaluator
from updater.gate.run import open_evaluator
from updater.gate.suites import Suite
from updater.gate.verdict import Blame, Suspect
from updater.service import gate_update, screening
from updater.service.blame import blame
from updater.service.update_loop import UpdaterService

SOURCES = ("a", "b", "evil")
BLAMED = Blame(7, (Suspect("evil", 8, 3.0), Suspect("a", 8, 0.1)), "evil")


@pytest.fixture
def verdict(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return judged_as("rejected", monkeypatch)


@pytest.fixture
def service(settings: Settings, verdict: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> UpdaterService:
    """An updater with samples of three sources, whose gate blames `evil`."""
    monkeypatch.setattr(gate_update, "_blame", lambda *_: BLAMED)
    settings = changed(settings, "trust", hold_below=0.0)
    for split, count in (("train", 24), ("fresh_eval", 9)):
        add_samples(settings, count, split, words=lambda offset: {"source": SOURCES[offset % 3]})
    return UpdaterService(settings)


def test_a_rejected_update_is_tried_once_more_without_the_source_that_is_blamed(
    service: UpdaterService, verdict: dict[str, Any]
) -> None:
    first = made_by(service)
    assert "without" not in first.cost and first.cost["pending"] == 24
    assert report_of(service.settings, first)["blame"]["source"] == "evil"
    verdict["outcome"] = "passed"
    again = made_by(service)
    assert again.cost["trigger"] == f"blame: {first.id} failed with evil"
    assert again.cost["without"] == ["evil"] and again.cost["pending"] == 16 and again.data_to == first.data_to
    (fresh,) = [each for each in report_of(service.settings, again)["suites"] if each["name"] == "fresh.things"]
    assert fresh["n"] <= 6
    (row,) = service.ledger.distrusted()
    assert (row.source, row.update_id, row.actor) == ("evil", again.id, "updater")

    release(service.ledger)
    add_samples(service.settings, 20, words=lambda _: {"source": "evil"})
    assert service.step().reason == "there are no new samples"
    add_samples(service.settings, 12, words=lambda _: {"source": "b"})
    later = made_by(service)
    assert later.cost["without"] == ["evil"] and later.cost["pending"] == 12
    assert later.cost["samples_replay"] <= 16, "what is distrusted is not replayed, either"
    service.ledger.trust("evil", actor="ana", reason="mended")
    assert service.ledger.distrusted() == []


def test_a_source_stays_trusted_if_the_update_fails_without_it_too(service: UpdaterService) -> None:
    made_by(service)
    again = made_by(service)
    assert again.cost["blamed"] == "evil"
    assert service.ledger.distrusted() == []
    assert service.step().reason == "there are no new samples", "it is tried once"


def test_nothing_is_tried_again_where_that_is_off(service: UpdaterService) -> None:
    off = changed(service.settings, "trust", retry_without=False)
    made_by(UpdaterService(off))
    assert UpdaterService(off).step().reason == "there are no new samples"


def test_screening_holds_what_agrees_less_under_base_and_incumbent(
    settings: Settings, verdict: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    add_samples(settings, 240, words=lambda offset: {"source": SOURCES[offset % 3]})
    low = {3, 5}
    asked: list[list[str]] = []

    def agreed(engine: Any, store: SampleStore, version: int, addresses: Any, models: Any, stop: Any) -> Any:
        rows = store.rows_at(addresses, ["offset"], version)
        asked.append(list(models))
        values = np.array([0.0 if row["offset"] in low else 0.3 + row["offset"] % 7 / 100 for row in rows])
        values[7] = np.nan  # cannot be read
        return dict.fromkeys(models, values)

    monkeypatch.setattr(screening, "_agreed", agreed)
    service = UpdaterService(changed(settings, "gate", trusted_sources=["a"]))  # offset 3
    assert service.step().reason == "samples are held"
    (receipt,) = trace(service.store, (TOPIC, 0, 5))
    assert (receipt.outcome, receipt.reason) == ("held", "held_agreement") and "agree by 0.000" in receipt.detail
    assert trace(service.store, (TOPIC, 0, 3))[0].outcome == "stored", "an operator trusts its source"
    verdict["outcome"] = "passed"
    update = made_by(service)
    assert update.cost["pending"] == 239 and len(asked) == 1, "each sample is asked once"
    release(service.ledger)
    low.add(245)
    add_samples(settings, 12, words=lambda offset: {"source": SOURCES[offset % 3]})
    assert service.step().reason == "samples are held"
    assert len(asked[-1]) == 2 and asked[-1][1] == update.adapter
    counts = Counter(row["split"] for row in service.store.select("kind = 'sample'", ["split"]))
    assert counts == {"train": 250, "held_train": 2}
    low.add(257)
    add_samples(settings, 12, words=lambda offset: {"source": SOURCES[offset % 3]})
    asked_for = service.step(now=True).update
    assert asked_for is not None and asked_for.cost["pending"] == 22, "an update that is asked for goes on without them"


def test_samples_are_asked_by_the_serving_engine(settings: Settings, verdict: dict[str, Any]) -> None:
    add_samples(settings, 70)
    add_samples(settings, 1, words=lambda _: {"image": b"none", "id": "f" * 64})  # type: ignore[dict-item]
    service = UpdaterService(settings)
    base = load_base(settings.home, settings.base.clip)
    held = screening.screen(settings, service.ledger, service.artifacts, service.store, base, None)
    row = service.ledger.screening("clip")
    assert row is not None and row.offsets == service.store.offsets()
    (rows,) = row.counts.values()
    assert sum(sum(counts) for *_, counts in rows) == 70
    assert held == service.store.tally()["held_train"]
    assert screening.screen(settings, service.ledger, service.artifacts, service.store, base, None) == 0


def test_the_source_whose_samples_alone_bring_the_regression_is_blamed(
    settings: Settings, verdict: dict[str, Any]
) -> None:
    """Three sources name the colours of squares; later a fourth calls each by the name of another."""
    wrong = {"red": "green", "green": "blue", "blue": "white", "white": "red"}

    def words(sources: tuple[str, ...]) -> Callable[[int], dict[str, Any]]:
        def of(offset: int) -> dict[str, Any]:
            source, colour = sources[offset // 4 % len(sources)], colour_of(offset)
            named = wrong[colour] if source == "evil" else colour
            square = encoded_square(offset)
            return {"source": source, "text": f"a {named} square", "image": square, "id": f"{offset:064x}"}

        return of

    shown = [
        FolderItem(Path(f"{number}.png"), colour_of(number), label=colour_of(number), inline=encoded_square(number))
        for number in range(1000, 1080)
    ]
    write_folder(settings.home / "data" / "squares", shown)
    plan = recipe("default", max_steps=40, batch_size=32, mixture={"new": 1.0, "reference": 0.0, "replay": 0.0})
    (settings.home / "default.yaml").write_text(plan.to_yaml())
    service = UpdaterService(changed(settings, "trust", hold_below=0.0))
    add_samples(settings, 192, words=words(("a", "b", "c")))
    verdict["outcome"] = "passed"
    incumbent = made_by(service)
    release(service.ledger)
    add_samples(settings, 192, words=words(("a", "b", "c", "evil")))
    update = made_by(service)
    assert update.incumbent == incumbent.adapter

    suite = Suite(
        name="squares", task="classification", data=str(settings.home / "data" / "squares"), templates=["a {} square"]
    )
    base = load_base(settings.home, settings.base.clip)
    assert isinstance(base, ClipBase)
    folders = {name: service.artifacts.fetch(f"adapters/{name}") for name in (update.incumbent, update.adapter)}
    pools = draw_pools(service.store, plan, (), update.store_version, update.data_from, update.seed)
    with open_evaluator(settings, base) as evaluator:
        assert isinstance(evaluator, ClipEvaluator)
        for name, folder in folders.items():
            evaluator.load(str(name), folder)
        asked = (base, plan, folders[update.incumbent], update, service.store)
        found = blame(*asked, pools, evaluator, [suite])
        assert found is not None and (found.source, found.suspects[0].source) == ("evil", "evil")
        assert found.suspects[0].harm > 0.2 > found.suspects[1].harm
        pools = draw_pools(
            service.store, plan, (), update.store_version, update.data_from, update.seed, without=["a", "b", "c"]
        )
        assert blame(*asked, pools, evaluator, [suite]) is None
