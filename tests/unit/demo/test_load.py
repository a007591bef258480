from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.swap import make_adapters
from core.ledger import Ledger
from core.loading import load_settings
from core.settings import Settings
from demo.load.answers import AnswerCheck, ExpectedVectors
from demo.load.probes import Probe, classify_probes, search_probes
from serving.engines.processor import Precision
from serving.http.classify import probabilities
from tests.support.inputs import pictures
from tests.support.tiny import tiny_base

IMAGES, TEXTS, IDS = pictures(3), ("a cat", "a map"), ("a", "b", "c")
CLASSIFY, SEARCH = classify_probes(IMAGES, TEXTS)[1], search_probes(IMAGES, TEXTS)[1]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Release 1 is the base, 2 an adapter."""
    home = tmp_path_factory.mktemp("home")
    tiny_base(home)
    settings = load_settings(overrides={"home": home, "base.clip": "tiny"}, environ={})
    [name] = make_adapters(settings, 1)
    ledger = Ledger.open(settings.ledger)
    for number, clip in ((1, None), (2, name)):
        ledger.commit_release(number, clip=clip, vlm=None, actor="test", reason="test", proposal_id=None)
    return settings


@pytest.fixture(scope="module")
def expected(settings: Settings) -> ExpectedVectors:
    return ExpectedVectors(settings, IMAGES, TEXTS)


def answer(settings: Settings, expected: ExpectedVectors, probe: Probe, release: int, stamped: int) -> dict[str, Any]:
    """The generator's line for a server that answers with ``release`` and states ``stamped``."""
    names = {row.number: row.clip or "base" for row in Ledger.open(settings.ledger).releases()}
    vectors = expected.of(names[release])
    images, texts = vectors[:3], vectors[3:]
    value: Any = [[each, float(images[n] @ vectors[probe.items[0]])] for n, each in enumerate(IDS)]
    if probe.kind == "classify":
        value = probabilities(images[list(probe.items)], texts, 1, expected.engine.logit_scale).tolist()
    return {"p": 0, "c": 200, "r": stamped, "a": names[stamped], "y": value}


@pytest.mark.parametrize("probe", [CLASSIFY, SEARCH], ids=["classify", "search"])
def test_the_answer_of_a_release_is_its_own_and_that_of_another_is_not(
    settings: Settings, expected: ExpectedVectors, probe: Probe
) -> None:
    own, mixed = (answer(settings, expected, probe, 2, stamped) for stamped in (2, 1))
    check = AnswerCheck(settings, [probe], IMAGES, TEXTS, (), IDS, [own, mixed])
    assert check.difference(own) == ""
    assert "release 1 (base): differs by" in check.difference(mixed)
    if probe is SEARCH:
        own["y"] = [own["y"][0], own["y"][0], own["y"][2]]
        assert "3 hits with 2 different ids; 3 exist" in check.difference(own)


@pytest.mark.parametrize(
    ("precision", "apart", "problem"),
    [("float32", 0.0018, "differs"), ("bfloat16", 0.0018, ""), ("bfloat16", 0.064, "differs")],
)
def test_rounding_of_half_precision_is_no_other_release(precision: Precision, apart: float, problem: str) -> None:
    """Batching changed ViT-B-32 by at most 0.0018, random adapters by at least 0.064."""
    check = AnswerCheck.__new__(AnswerCheck)
    check.vectors = SimpleNamespace(engine=SimpleNamespace(precision=precision))
    assert check._apart("release 1", np.zeros((1, 4)), np.full((1, 4), apart)).count("differs") == bool(problem)
