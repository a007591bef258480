"""Suites: YAML with errors that name the fix, stable draws and halves, fresh rows."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from ops.errors import GateError
from tests.unit.gate.builders import folder_dataset, picture, sample_rows
from updater.gate.fresh import fresh_suite, fresh_suites
from updater.gate.suites import BUILTIN, Suite, load_suites


def _suite(home: Path, text: str, name: str = "things") -> Suite:
    file = home / f"{name}.yaml"
    file.write_text(text)
    return load_suites([file], home)[0]


def test_a_suite_is_two_lines_over_a_folder(tmp_path: Path) -> None:
    folder_dataset(tmp_path / "data" / "things")
    suite = _suite(tmp_path, "task: retrieval\ndata: ${home}/data/things\n")
    assert (suite.name, suite.role, suite.metric, suite.k, len(suite.items())) == (
        "things",
        "retention",
        "recall@5",
        5,
        40,
    )
    assert {item.text for item in suite.items()} == {f"thing number {i}" for i in range(40)}
    assert suite.cache == tmp_path / "cache" / "gate"


def test_classification_takes_the_label_column_and_needs_two_of_a_class(tmp_path: Path) -> None:
    folder = folder_dataset(tmp_path / "data" / "things", count=9, classes=4)  # kind_0 three times, others twice
    with (folder / "data.csv").open("a") as file:
        file.write("0.png,lonely,alone,lonely,\n")
    suite = _suite(tmp_path, "task: classification\ndata: ${home}/data/things\n")
    assert {item.text for item in suite.items()} == {"kind_0", "kind_1", "kind_2", "kind_3"}
    assert suite.metric == "accuracy"


def test_the_draw_depends_on_the_seed_and_not_on_the_order_of_rows(tmp_path: Path) -> None:
    folder = folder_dataset(tmp_path / "data" / "things")
    text = "task: retrieval\ndata: ${home}/data/things\nlimit: 10\n"
    first = [item.id for item in _suite(tmp_path, text).items()]
    head, *lines = (folder / "data.csv").read_text().splitlines()
    (folder / "data.csv").write_text("\n".join([head, *reversed(lines)]) + "\n")
    assert [item.id for item in _suite(tmp_path, text).items()] == first
    assert [item.id for item in _suite(tmp_path, text + "seed: 1\n").items()] != first


def test_two_suites_over_one_folder_draw_the_same_images_and_ids_survive_a_move(tmp_path: Path) -> None:
    folder_dataset(tmp_path / "data" / "things", count=60)
    text = "data: ${home}/data/things\nlimit: 20\n"
    retrieval = _suite(tmp_path, "task: retrieval\n" + text, "r").items()
    classes = _suite(tmp_path, "task: classification\n" + text, "c").items()
    assert {item.source for item in retrieval} == {item.source for item in classes}
    moved = tmp_path / "moved"
    moved.mkdir()
    (tmp_path / "data").rename(moved / "data")
    again = _suite(moved, "task: retrieval\n" + text, "r").items()
    assert [item.id for item in again] == [item.id for item in retrieval]


def test_halves_split_the_items_and_keep_a_concept_together(tmp_path: Path) -> None:
    folder = folder_dataset(tmp_path / "data" / "things", count=60)
    rows = (folder / "data.csv").read_text().splitlines()
    (folder / "data.csv").write_text("\n".join([rows[0], *(r.replace("concept ", "concept 1") for r in rows[1:])]))
    suite = _suite(tmp_path, "task: retrieval\ndata: ${home}/data/things\n")
    tuning, hidden = suite.half("tuning"), suite.half("hidden")
    assert {i.id for i in tuning.items()} | {i.id for i in hidden.items()} == {i.id for i in suite.items()}
    assert not {i.key for i in tuning.items()} & {i.key for i in hidden.items()}
    assert len(tuning.items()) > 10 and len(hidden.items()) > 10
    assert len({suite.digest(), tuning.digest(), hidden.digest()}) == 3


def test_the_digest_follows_the_question_and_not_the_margin(tmp_path: Path) -> None:
    folder = folder_dataset(tmp_path / "data" / "things")
    text = "task: retrieval\ndata: ${home}/data/things\n"
    digest = _suite(tmp_path, text).digest()
    assert _suite(tmp_path, text + "margin: 0.2\n").digest() == digest
    assert _suite(tmp_path, text + "limit: 39\n").digest() != digest
    (folder / "0.png").write_bytes(picture(12345))
    assert _suite(tmp_path, text).digest() != digest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: retrieval\n", "names no data"),
        ("task: retrieval\ndata: x\nmargins: 0.1\n", "margins"),
        ("task: retrieval\ndata: x\nmetric: accuracy\n", "does not go with"),
        ("task: classification\ndata: x\ntemplates: [a photo]\n", "{}"),
        ("task: retrieval\ndata: x\nrole: gain\nmargin: 0.1\n", "gain suite has no margin"),
        ("- a\n- b\n", "not a mapping"),
        ("task: [\n", "cannot be read"),
    ],
)
def test_a_wrong_suite_says_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(GateError) as error:
        _suite(tmp_path, text)
    assert message in str(error.value)
    assert "things.yaml" in error.value.message
    assert error.value.fix


def test_missing_data_and_equal_names_are_errors(tmp_path: Path) -> None:
    with pytest.raises(GateError, match="does not exist"):
        _suite(tmp_path, "task: retrieval\ndata: ${home}/nowhere\n").items()
    (tmp_path / "empty").mkdir()
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.yaml").write_text("task: retrieval\ndata: x\n")
    with pytest.raises(GateError, match="2 suites are named 'same'"):
        load_suites([tmp_path / "a", tmp_path / "b"], tmp_path)
    with pytest.raises(GateError, match="holds no suite"):
        load_suites([tmp_path / "empty"], tmp_path)


def test_the_built_in_suites_are_valid_and_protect_more_than_they_allow() -> None:
    suites = load_suites(home=Path("/home"), family=None)
    assert len(suites) == len(list(BUILTIN.glob("*.yaml"))) >= 10
    assert {suite.role for suite in suites} == {"retention"}
    assert {suite.task for suite in suites} == {"classification", "retrieval", "vqa"}
    for suite in suites:
        assert suite.margin is not None and suite.margin <= 0.08
        assert suite.description and str(suite.folder).startswith("/home/data/")


def test_fresh_rows_become_gain_suites_by_domain() -> None:
    rows = pa.concat_tables([sample_rows(30, "fluent3d"), sample_rows(12, "flags"), sample_rows(3, "odd")])
    suites = fresh_suites(rows, min_items=10)
    assert [(s.name, s.role, len(s.items())) for s in suites] == [
        ("fresh.fluent3d", "gain", 30),
        ("fresh.flags", "gain", 12),
    ]
    pooled = fresh_suites(rows, min_items=100)
    assert [(s.name, len(s.items())) for s in pooled] == [("fresh", 45)]
    assert fresh_suites(rows.slice(0, 0)) == []


def test_fresh_rows_without_a_text_are_left_out_and_the_limit_holds() -> None:
    rows = sample_rows(20, texts=["", " ", *[f"t{i}" for i in range(18)]])
    assert len(fresh_suite(rows).items()) == 18
    assert len(fresh_suite(rows, limit=7).items()) == 7
    assert fresh_suite(rows, "other").name == "fresh.other"


def test_a_domain_from_outside_cannot_make_a_bad_name() -> None:
    assert fresh_suite(sample_rows(3, "Weird/../Domain <x>"), "Weird/../Domain <x>").name == "fresh.weird-..-domain--x-"
