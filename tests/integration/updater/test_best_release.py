"""A candidate is compared with the best release so far, through the engine that judges it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from core.artifacts import Artifacts, directory_digest
from core.ledger import Ledger
from core.settings import Settings
from serving.engines.clip_base import load_base
from tests.integration.updater.home import add_samples, commit, made_by, make_home, report_of
from tests.support.tiny import tiny_adapter
from updater.families import spaces_of
from updater.service.update_loop import UpdaterService

pytestmark = pytest.mark.integration


def release(settings: Settings, folder: Path, number: int, seed: int, gain: float) -> str:
    base = load_base(settings.home, "tiny")
    name = tiny_adapter(base, folder / str(number), seed=seed)
    ledger = Ledger.open(settings.ledger)
    Artifacts(settings.artifacts).put_directory(folder / str(number), f"adapters/{name}")
    digest = directory_digest(folder / str(number))
    ledger.register_adapter(name, "clip", base.digest, *spaces_of(base, folder / str(number)), {}, digest=digest)
    ledger.begin_update(
        f"u-{number}", family="clip", recipe={}, seed=0, store_version=1, data_from={}, data_to={}, incumbent=None
    )
    suites = {"things": {"role": "retention", "after": 0.2 + gain, "base": 0.2, "before": 0.2, "n": 30}}
    ledger.record_verdict(f"u-{number}", name, "passed", "reports/x", {"suites": suites})
    ledger.advance_update(f"u-{number}", "done", adapter=name)
    commit(ledger, clip=name)
    ledger.close()
    return name


def test_the_verdict_names_the_best_release_and_does_without_one_that_is_gone(tmp_path: Path) -> None:
    settings = make_home(tmp_path / "home")
    best = release(settings, tmp_path, 1, seed=1, gain=0.3)
    incumbent = release(settings, tmp_path, 2, seed=2, gain=0.1)
    add_samples(settings, 12)
    add_samples(settings, 12, split="fresh_eval")
    service = UpdaterService(settings)
    update = made_by(service)
    assert update.incumbent == incumbent
    verdict = service.ledger.verdict_of(update.id)
    assert verdict is not None
    things = verdict.summary["suites"]["things"]
    assert things["best"] == best and -1 <= things["best_release"]["ci_low"] <= things["best_release"]["ci_high"] <= 1
    assert "best" not in verdict.summary["suites"]["fresh.things"]

    shutil.rmtree(tmp_path / "home" / "artifacts" / "adapters" / best)
    add_samples(settings, 12)
    later = made_by(service, now=True)
    assert later.id != update.id
    verdict = service.ledger.verdict_of(later.id)
    assert verdict is not None and "best" not in verdict.summary["suites"]["things"]
    report = report_of(settings, later)
    assert list(report["meta"]["not_compared"]) == [best], "the report says so"
