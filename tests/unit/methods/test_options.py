"""Options without a meaning are refused by the name of the method."""

from __future__ import annotations

import pytest

from core.errors import ConfigError
from tests.unit.updater.builders import recipe
from updater.methods import objectives, optimizers, regularizers
from updater.recipes import Optimizer, Term


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("compatible_momentum_contrast", {"queue": 0}, "queue is 0"),
        ("compatible_momentum_contrast", {"keep": 0.9, "new": 0.2}, "keep and new add up to 1.1"),
        ("contrastive_distillation", {"temperature": 0.0}, "temperature is 0"),
        ("topology_preservation", {"temperature": -1.0}, "temperature is -1"),
        ("random_text_distillation", {"count": 0}, "count is 0"),
        ("backward_compatible", {"teacher": "momentum"}, "teacher is 'momentum'"),
        ("contrastive_distillation", {"teacher": "momentum"}, "teacher is 'momentum'"),
        ("feature_distillation", {"replay": "momentum"}, "teacher is 'momentum'"),
        ("subcaptions", {"most": 0}, "at least 1"),
        ("language_guided", {"template": "a photo"}, "template"),
        ("self_distillation", {"keep": 1.1}, "keep is 1.1"),
    ],
)
def test_an_option_without_a_meaning_is_refused_by_name(
    name: str, options: dict[str, float | int | str | bool], said: str
) -> None:
    with pytest.raises(ConfigError, match=f"{name}.*{said}"):
        objectives.build([Term(name=name, options=options)], "vlm" if name == "self_distillation" else "clip")


@pytest.mark.parametrize(
    ("name", "option"), [("ewc", {"batches": 0}), ("si", {"xi": 0.0}), ("orthogonal", {"most": 0})]
)
def test_an_option_of_a_regularizer_without_a_meaning_is_refused(name: str, option: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(option))):
        regularizers.build(recipe("full", regularizers=[{"name": name, "options": option}]))


def test_a_rank_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="rank or every"):
        optimizers.make(Optimizer(kind="galore", options={"rank": 0}), [], 0.0)
