"""A candidate is compared with the best release so far, through the engine that judges it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from core.artifacts import Artifacts, directory_digest
from core.ledger import Ledger, UpdateRow
from core.settings import Settings
from serving.engines.clip_base import load_base
from tests.integration.updater.home import add_samples, commit, made_by, report_of
from tests.support.tiny import tiny_adapter
from updater.families import spaces_of
from updater.service.update_loop import UpdaterService

pytestmark = pytest.mark.integration


def release(settings: Settings, folder: Path, gain: float, seed: int) -> str:
    base = load_base(settings.home, "tiny")
    name = tiny_adapter(base, folder, seed=seed)
    ledger = Ledger.open(settings.ledger)
    Artifacts(settings.artifacts).put_directory(folder, f"adapters/{name}")
    ledger.register_adapter(name, "clip", base.digest, *spaces_of(base, folder), {}, digest=directory_digest(folder))
    ledger.begin_update(
        f"u-{seed}", family="clip", recipe={}, seed=0, store_version=1, data_from={}, data_to={}, incumbent=None
    )
    suites = {"things": {"role": "retention", "after": 0.2 + gain, "base": 0.2, "before": 0.2, "n": 30}}
    ledger.record_verdict(f"u-{seed}", name, "passed", "reports/x", {"suites": suites})
    ledger.advance_update(f"u-{seed}", "done", adapter=name)
    commit(ledger, clip=name)
    ledger.close()
    return name


def test_the_verdict_names_the_best_release_and_does_without_one_that_is_gone(
    settings: Settings, tmp_path: Path
) -> None:
    def suites_of(update: UpdateRow) -> Any:
        verdict = service.ledger.verdict_of(update.id)
        assert verdict is not None
        return verdict.summary["suites"]

    best, incumbent = (release(settings, tmp_path / str(seed), gain, seed) for seed, gain in ((1, 0.3), (2, 0.1)))
    add_samples(settings, 12)
    add_samples(settings, 12, split="fresh_eval")
    service = UpdaterService(settings)
    update = made_by(service)
    assert update.incumbent == incumbent
    suites = suites_of(update)
    compared = suites["things"]["best_release"]
    assert suites["things"]["best"] == best and -1 <= compared["ci_low"] <= compared["ci_high"] <= 1
    assert "best" not in suites["fresh.things"]

    shutil.rmtree(settings.home / "artifacts" / "adapters" / best)
    add_samples(settings, 12)
    later = made_by(service, now=True)
    assert later.id != update.id and "best" not in suites_of(later)["things"]
    assert list(report_of(settings, later)["meta"]["not_compared"]) == [best], "the report says so"
