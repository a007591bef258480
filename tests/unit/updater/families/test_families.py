from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, cast

import pytest

from core.errors import ConfigError
from core.loading import load_settings
from core.settings import Settings
from core.settings.serving import SHIPPED_VLM
from streams.publish.folders import FolderItem, write_folder
from streams.store.sample_store import SampleStore
from tests.support.tiny import tiny_base
from tests.support.tiny_vlm import tiny_vlm_base
from tests.unit.updater.builders import picture, recipe
from updater.bases import VLM_REFERENCE, families_with_a_base, reference_of
from updater.data.pools import Pair, Question, draw_pools
from updater.families import family_base
from updater.recipes import Family, family_recipe, load_recipe
from updater.service.update_loop import UpdaterService


def settings(home: Path, **overrides: Any) -> Settings:
    return load_settings(overrides={"home": home, **overrides}, environ={})


def folder(path: Path, kinds: list[str]) -> Path:
    """A question of each kind, and as many captions."""
    rows = [row for kind in kinds for row in ((kind, "", f"what {kind}?"), ("", "a thing", ""))]
    items = [
        FolderItem(Path(f"{i}.png"), text, label=kind, inline=picture(i), question=ask, answer=ask and str(i))
        for i, (kind, text, ask) in enumerate(rows)
    ]
    return write_folder(path, items)


def test_the_vlm_is_updated_where_its_base_is_registered(tmp_path: Path) -> None:
    tiny_base(tmp_path)
    named, none = (settings(tmp_path, **{"base.vlm": name}) for name in ("tiny-vlm", ""))
    assert families_with_a_base(named) == ("clip",)
    tiny_vlm_base(tmp_path)
    assert families_with_a_base(named) == ("clip", "vlm")
    assert families_with_a_base(settings(tmp_path, **{"base.vlm": "tiny"})) == families_with_a_base(none) == ("clip",)
    with pytest.raises(ConfigError, match="no VLM to update"):
        family_base(none, "vlm")


def test_a_setting_that_names_a_recipe_of_the_other_family_is_an_error(tmp_path: Path) -> None:
    assert family_recipe(settings(tmp_path), "clip").name == "default"
    assert family_recipe(settings(tmp_path), "vlm").name == "vlm-default"
    with pytest.raises(ConfigError, match=r"updater\.recipe is 'vlm-naive', which trains a VLM"):
        family_recipe(settings(tmp_path, **{"updater.recipe": "vlm-naive"}), "clip")
    with pytest.raises(ConfigError, match=r"updater\.vlm_recipe is 'naive', which trains a CLIP"):
        family_recipe(settings(tmp_path, **{"updater.vlm_recipe": "naive"}), "vlm")
    with pytest.raises(ConfigError, match="'vlm-naive' trains a VLM, not a CLIP"):
        UpdaterService(settings(tmp_path), load_recipe("vlm-naive"), family="clip")


def test_the_reference_pool_of_a_vlm_is_what_asks_something(tmp_path: Path) -> None:
    asking = folder(tmp_path / "asking", ["colour"])
    plain = write_folder(tmp_path / "plain", [FolderItem(Path("0.png"), "a thing", inline=picture(0))])

    def reference(family: Family, *folders: Path, vlm: str = "tiny-vlm") -> list[Path]:
        given = {"updater.reference": list(folders)} if folders else {}
        return reference_of(settings(tmp_path, **given, **{"base.vlm": vlm}), family)

    assert (reference("vlm", plain, asking), reference("clip", plain, asking)) == ([asking], [plain, asking])
    assert reference("vlm", plain) == reference("vlm", vlm=SHIPPED_VLM) == []
    with pytest.raises(ConfigError, match="does not exist"):
        reference("vlm", tmp_path / "gone")
    made = [folder(tmp_path / "data" / name, ["colour"]) for name in VLM_REFERENCE]
    assert made and reference("vlm", vlm=SHIPPED_VLM) == made, "the shipped one brings what it was trained on"


def test_reference_questions_are_drawn_from_each_kind_in_turn_and_pairs_beside_them(tmp_path: Path) -> None:
    mixed = folder(tmp_path / "mixed", ["name"] * 20 + ["colour"] * 5 + ["presence"] * 2)
    store = SampleStore(str(tmp_path / "lake"))
    asked = draw_pools(store, recipe("vlm-default", reference_limit=9), [mixed], 0, {}, seed=1).reference
    kinds = Counter(cast(Question, each).question for each in asked)
    assert kinds.pop("what presence?") == 2 and sorted(kinds.values()) == [3, 4]
    again = draw_pools(store, recipe("vlm-default", reference_limit=9), [mixed], 0, {}, seed=1).reference
    assert [each.id for each in again] == [each.id for each in asked]
    pairs = draw_pools(store, recipe(reference_limit=100), [mixed], 0, {}, seed=1).reference
    assert len(pairs) == 27 and all(type(each) is Pair and each.text == "a thing" for each in pairs)
