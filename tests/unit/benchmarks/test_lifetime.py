from __future__ import annotations

import io
import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.continual.chain import Unit, chain_name
from benchmarks.continual.outcomes import read_course, read_reference
from benchmarks.continual.repeated import repeated
from benchmarks.gate.plans import NEW
from benchmarks.gate.trial import fresh_name
from benchmarks.lifetime.audits import Audited, audit, truly_lost
from benchmarks.lifetime.churn import churn_of_chain
from benchmarks.lifetime.evaluation import samples_of, static_suites
from benchmarks.lifetime.outcomes import Source, read_sources
from benchmarks.lifetime.report import row_of
from benchmarks.lifetime.run_lifetime import Task, run
from benchmarks.lifetime.schedule import PATIENCE, Schedule
from benchmarks.lifetime.stream import GAIN3, SEAL, Course, Ended, Lesson, Rules, Stream
from benchmarks.lifetime.world import FORGOTTEN, World, make_world
from core.errors import ConfigError
from core.ledger import VerdictRow
from core.ledger.rows import GateOutcome
from core.settings import Settings
from core.settings.updates import Gate
from updater.gate.suite_items import Part
from updater.gate.suites import load_suites

ROOT = Path(__file__).parents[3]
N = 400
PARTS: tuple[Part, Part] = ("judged", "sealed")
SETTINGS = Gate()


def ranks(seed: int, views: int) -> np.ndarray:
    return np.random.default_rng(seed).geometric(0.12, (N, views)).astype(np.int32) - 1


def moved(before: np.ndarray, seed: int, up: float) -> np.ndarray:
    rng = np.random.default_rng(seed)
    other = np.where(rng.random(before.shape) < up, before // 2, 2 * before + 1)
    return np.where(rng.random(before.shape) < 0.2, other, before)


def write(folder: Path, dtype: type = np.int32) -> Path:
    """Outcomes of the base and of three candidates, each of which learns the three domains."""
    suites = {s.name: len(s.views) for s in load_suites([], None, "clip") if s.role == "retention"}
    suites |= {fresh_name(domain): 2 for domain in NEW}
    base = {name: ranks(number, views) for number, (name, views) in enumerate(suites.items())}
    trials = {"base": base}
    for number in range(3):
        trials[f"first-{number:02d}"] = {
            name: moved(own, 50 + number, 0.8 if name.startswith("fresh") else 0.5) for name, own in base.items()
        }
    folder.mkdir()
    for name, arrays in trials.items():
        np.savez(folder / f"{name}.npz", about=np.array("{}"), **{k: v.astype(dtype) for k, v in arrays.items()})
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    return read_sources(write(tmp_path_factory.mktemp("outcomes") / "o"))


@pytest.fixture(scope="module")
def world(sources: dict[str, Source]) -> World:
    return make_world(sources, np.random.default_rng(0))


def test_outcomes_have_ranks_a_base_and_candidates_of_each_domain(sources: dict[str, Source], tmp_path: Path) -> None:
    write(tmp_path / "hits", np.uint8)
    refused = {"hits": "hits alone", "": "no outcomes of the base", "none.tar.xz": "cannot be read"}
    for place, words in refused.items():
        with pytest.raises(ConfigError, match=words):
            read_sources(tmp_path / place)
    assert len(sources["flags_retrieval"].before) == 3 * N
    assert all(len(sources[fresh_name(domain)].before) == N for domain in NEW)


def test_a_model_forgets_a_part_of_what_it_learned_and_drifts_no_further_from_the_base(world: World) -> None:
    rng = np.random.default_rng(3)
    domain, still = world.domains["domain-0"], world.domains["clipart_retrieval"]
    learned = world.candidate(world.base, {domain.name: 0.1}, {}, 0.5, rng)
    assert world.learned(domain, learned) == pytest.approx(0.1, abs=0.001)
    later = world.candidate(learned, {"domain-1": 0.03}, {}, 0.5, rng)
    assert 0.0 < world.learned(domain, later) < 0.09
    harmed = world.candidate(learned, {}, {"flags_retrieval": 0.1}, 0.0, rng)
    assert world.learned(world.domains["flags_retrieval"], harmed) < -0.08
    model, apart = world.base, []
    for _ in range(12):
        model = world.candidate(model, {}, {}, 0.1, rng)
        apart.append(float((model[still.name] != world.base[still.name]).mean()))
    assert apart[-1] < 3 * apart[0] and abs(world.learned(still, model)) < 0.03


def test_an_updater_waits_for_the_items_that_a_gain_needs_but_not_for_ever_also_after_failures() -> None:
    schedule = Schedule(SETTINGS, waiting=True)
    needed = schedule.plan().needed
    assert needed > 400 and schedule.triggered(100) is None
    first = schedule.triggered(needed)
    assert first is not None and first.level == pytest.approx(first.alpha) and first.next is None
    assert [schedule.triggered(9 * (i + 1)) is None for i in range(PATIENCE)] == [True] * (PATIENCE - 1) + [False]
    look = Schedule(SETTINGS, waiting=True, candidates=30).plan().look(5000)
    assert look.level < 1e-4 and look.loss_level == pytest.approx(SETTINGS.alpha), "losses are tested as at first"


def test_a_large_gain_is_released_and_a_harmful_one_not(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_with(harmful: float) -> Stream:
        for name, value in {"HARMFUL": harmful, "HARM": 0.03, "TRIGGERS": 5}.items():
            monkeypatch.setattr(f"benchmarks.lifetime.stream.{name}", value)
        stream = Stream(world, Rules(waiting=False), SETTINGS, np.random.default_rng(4), 0.0)
        stream.run([Lesson("domain-0", 0.15)])
        return stream

    good, harmful = run_with(0.0).course, run_with(1.0).course
    (ended,) = good.lessons
    assert ended.released and ended.outcomes[-1] == "passed" and good.retained == 1.0
    assert harmful.harmful >= 3 and harmful.harmful_released <= 1


@pytest.mark.long
def test_a_stream_is_the_same_again_and_ends_with_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.lifetime.stream.TRIGGERS", 2)
    settings = Settings(home=tmp_path)
    folder = write(tmp_path / "outcomes")
    rules = (Rules(waiting=False), Rules("without memory", memory=False, waiting=False))
    figures = run(settings, updates=2, streams=1, rules=rules, outcomes=folder, workers=1)
    assert 0.0 <= figures["released_within_12_triggers_gain3"] <= 1.0
    assert [row["rules"] for row in figures["rules"]] == ["as it is", "without memory", "no update gains"]
    task = Task(rules[0], (0.03, 0.1), 2, 0, 0.1, settings.gate)
    sources = read_sources(folder)
    first, second = (task.run(sources) for _ in range(2))
    assert [e.outcomes for e in first.lessons] == [e.outcomes for e in second.lessons]
    other = replace(task, seed=1).run(sources)
    assert [e.lesson for e in other.lessons] != [e.lesson for e in first.lessons]


def test_what_a_stream_forgets_is_what_committed_chains_of_the_default_recipe_forgot(tmp_path: Path) -> None:
    """Of the default recipe as it was until commit bf0544b."""
    shutil.unpack_archive(ROOT / "docs" / "benchmarks" / "lifetime" / "chains.tar.xz", tmp_path)
    units = [Unit("default", order) for order in (0, 2)]
    for unit in units:
        for path in unit.folder(tmp_path).glob("update-*.json"):
            path.write_text(json.dumps(json.loads(path.read_text()) | {"chain": chain_name(unit.recipe, unit)}))
    reference = read_reference(tmp_path)
    courses = [course for unit in units if (course := read_course(tmp_path, unit, 8, reference))]
    assert len(courses) == 2
    figures = repeated(courses, reference)
    assert figures["forgotten_per_update"] <= figures["forgotten_without_largest"] == FORGOTTEN


def test_answers_differ_from_the_bases_in_about_as_many_cases_as_in_committed_chains() -> None:
    results = ROOT / "docs" / "benchmarks" / "continual" / "outcomes.tar.xz"
    with tarfile.open(results) as archive:
        files = {m.name: json.load(archive.extractfile(m) or io.BytesIO()) for m in archive if m.name.endswith(".json")}
    base = next(content for name, content in files.items() if name.endswith("zero-shot.json"))
    held_out = [name for name, role in base["roles"].items() if role == "held-out"]
    simulated = churn_of_chain(make_world(read_sources(), np.random.default_rng(0)), 8, np.random.default_rng(1))
    for updates in (1, 8):
        chains = [
            c["hits"] for name, c in files.items() if "/default/" in name and name.endswith(f"-{updates:02d}.json")
        ]
        differing = [
            np.mean(
                [np.array(list(a)) != np.array(list(b)) for a, b in zip(hits[name], base["hits"][name], strict=True)]
            )
            for hits in chains
            for name in held_out
        ]
        assert simulated[updates - 1] == pytest.approx(np.mean(differing), abs=0.01)


def test_a_sealed_sample_is_judged_on_after_an_audit_and_not_before(world: World) -> None:
    stream = Stream(world, Rules(), SETTINGS, np.random.default_rng(4))
    stream._arrive("domain-0")
    judged, sealed = set(stream._fresh), set(stream._sealed)
    assert sealed and not judged & sealed and all(SEAL.holds(f"domain-0/{item}") for _, item in sealed)
    parts = [{i for each in static_suites(world, part, SEAL) for i in each.suite.items()} for part in PARTS]
    assert parts[0] and parts[1] and not parts[0] & parts[1]
    stream._audit()
    assert not stream._sealed and sealed <= {*stream._opened, *stream._fresh}


def test_an_audit_finds_a_loss_and_passes_what_has_none(world: World) -> None:
    rng = np.random.default_rng(5)
    sealed = [*static_suites(world, "sealed", SEAL), *samples_of([("domain-0", i) for i in range(200)], "samples")]
    kept = world.candidate(world.base, {"domain-0": 0.1}, {}, 0.0, rng)
    harmed = world.candidate(kept, {}, {domain.name: 0.2 for domain in world.static}, 0.0, rng)
    assert audit(sealed, world, None, kept, SETTINGS).passed
    found = audit(sealed, world, kept, harmed, SETTINGS)
    assert not found.passed and not found.wrong


def test_many_small_losses_are_harmful_by_their_mean(world: World) -> None:
    rng = np.random.default_rng(6)
    small = world.candidate(world.base, {}, {domain.name: 0.03 for domain in world.static}, 0.0, rng)
    judged = static_suites(world, "judged", SEAL)
    assert truly_lost(judged, world, world.base, small, SETTINGS)
    assert not truly_lost(judged, world, world.base, small, SETTINGS.model_copy(update={"mean_margin": 0.05}))


def test_a_failed_audit_takes_releases_back_and_they_are_learned_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.lifetime.stream.audit", lambda *_: Audited(passed=False, wrong=True))
    stream = Stream(
        world, Rules(waiting=False), SETTINGS.model_copy(update={"audit_every": 1}), np.random.default_rng(4)
    )
    stream._pending = {"domain-0": 0.1}
    stream._arrive("domain-0")
    arrived = {*stream._fresh, *stream._sealed}
    stream._release(world.base, verdict("passed"))
    assert stream.live.model is world.base and not stream.live.releases
    assert stream._pending == {"domain-0": 0.1} and set(stream._fresh) == arrived
    assert (stream.course.audits, stream.course.audits_failed, stream.course.audits_failed_wrongly) == (1, 1, 1)


def test_intervals_are_by_stream_where_there_are_enough_of_them() -> None:
    lesson = Lesson("domain-0", GAIN3)

    def course(released: bool) -> Course:
        return Course([Ended(lesson, 3, released, 1, ())] * 10)

    alike, unlike = (row_of("", [course(i < good) for i in range(5)])["gain3"] for good in (5, 3))
    assert (alike["low"], alike["high"], unlike["rate"]) == (1.0, 1.0, 0.6)
    assert unlike["high"] - unlike["low"] > 0.5, "streams differ, and fifty lessons say no more than five"
    few = row_of("", [course(True), course(False)])["gain3"]
    assert few["by"] == "lesson" and unlike["by"] == "stream"


def verdict(outcome: GateOutcome) -> VerdictRow:
    return VerdictRow(update_id="u", adapter="clip-1", outcome=outcome, report_key="", summary={})


def test_a_kept_candidate_is_asked_again_and_counts_once() -> None:
    schedule = Schedule(SETTINGS, waiting=True)
    early = [schedule.triggered(200) for _ in range(PATIENCE)][-1]
    assert early is not None and early.next is not None
    schedule.looked(early, verdict("inconclusive"), tested=True)
    assert schedule.candidates == 1 and schedule.triggered(early.next - 1) is None
    second = schedule.triggered(early.next)
    assert second is not None and second.number == 2
    schedule.looked(second, verdict("rejected"), tested=True)
    assert schedule.due is None and schedule.candidates == 1 and schedule.spent == pytest.approx(second.spent)
    hasty = Schedule(SETTINGS, waiting=False)
    single = hasty.triggered(10)
    assert single is not None and single.items == 10 and single.next is None
    hasty.looked(single, verdict("passed"), tested=True)
    assert hasty.candidates == 0 and hasty.history == [pytest.approx(single.alpha)]
