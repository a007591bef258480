from __future__ import annotations

from pathlib import Path

import pytest

from core.errors import GateError
from core.settings.updates import Gate
from tests.unit.updater.gate.builders import folder_dataset, fresh_suite, fresh_suites, picture, sample_rows
from updater.gate.suite_items import Seal, grade, majority, normalise
from updater.gate.suites import BUILTIN, Suite, load_suites


def _suite(home: Path, text: str, name: str = "things", data: str = "things") -> Suite:
    """The suite of this text over a folder of data."""
    file = home / f"{name}.yaml"
    file.write_text(f"{text}data: ${{home}}/data/{data}\n" if data else text)
    return load_suites([file], home, family=None)[0]


def _ids(suite: Suite) -> list[str]:
    return [item.id for item in suite.items()]


def test_a_suite_is_two_lines_over_a_folder(tmp_path: Path) -> None:
    folder = folder_dataset(tmp_path / "data" / "things", count=9)  # kind_0 three times, others twice
    with (folder / "data.csv").open("a") as file:
        file.write("0.png,lonely,alone,lonely,\n")
    suite = _suite(tmp_path, "task: retrieval\n")
    assert (suite.name, suite.role, suite.metric, suite.k) == ("things", "retention", "recall@5", 5)
    assert {item.text for item in suite.items()} == {"lonely", *(f"thing number {i}" for i in range(9))}
    assert suite.cache == tmp_path / "cache" / "gate"
    classes = _suite(tmp_path, "task: classification\n")
    assert classes.metric == "accuracy"
    assert {item.text for item in classes.items()} == {f"kind_{i}" for i in range(4)}, "two of a class are needed"


def test_the_draw_depends_on_the_seed_and_not_on_the_order_of_rows_the_task_or_the_place(tmp_path: Path) -> None:
    folder = folder_dataset(tmp_path / "data" / "things")
    text = "task: retrieval\nlimit: 10\n"
    first, classes = _suite(tmp_path, text), _suite(tmp_path, "task: classification\nlimit: 10\n", "c")
    assert {item.source for item in first.items()} == {item.source for item in classes.items()}
    head, *lines = (folder / "data.csv").read_text().splitlines()
    (folder / "data.csv").write_text("\n".join([head, *reversed(lines)]) + "\n")
    assert _ids(_suite(tmp_path, text)) == _ids(first) != _ids(_suite(tmp_path, text + "seed: 1\n"))
    moved = tmp_path / "moved"
    moved.mkdir()
    (tmp_path / "data").rename(moved / "data")
    assert _ids(_suite(moved, text)) == _ids(first)


@pytest.mark.usefixtures("sealed")
def test_a_quarter_of_a_suite_is_sealed_by_a_key_and_keeps_a_concept_together(tmp_path: Path) -> None:
    folder_dataset(tmp_path / "data" / "things", count=240)
    suite = _suite(tmp_path, "task: retrieval\n")
    judged, sealed = (suite.part(part, Seal(b"one")) for part in ("judged", "sealed"))
    assert sorted(_ids(judged) + _ids(sealed)) == sorted(_ids(suite))
    assert 36 <= len(sealed.items()) <= 84
    assert not {i.key for i in judged.items()} & {i.key for i in sealed.items()}
    assert _ids(_suite(tmp_path, "task: retrieval\n").part("sealed", Seal(b"one"))) == _ids(sealed)
    assert _ids(suite.part("sealed", Seal(b"two"))) != _ids(sealed)
    assert judged.digest() != suite.digest()
    half = judged.half("hidden")
    assert set(_ids(half)) == set(_ids(judged)) & set(_ids(suite.half("hidden")))


def test_halves_split_the_items_and_keep_a_concept_together(tmp_path: Path) -> None:
    folder = folder_dataset(tmp_path / "data" / "things", count=60)
    rows = (folder / "data.csv").read_text().splitlines()
    (folder / "data.csv").write_text("\n".join([rows[0], *(r.replace("concept ", "concept 1") for r in rows[1:])]))
    suite = _suite(tmp_path, "task: retrieval\n")
    tuning, hidden = suite.half("tuning"), suite.half("hidden")
    assert sorted(_ids(tuning) + _ids(hidden)) == sorted(_ids(suite))
    assert not {i.key for i in tuning.items()} & {i.key for i in hidden.items()}
    assert len(tuning.items()) > 10 and len(hidden.items()) > 10
    assert len({suite.digest(), tuning.digest(), hidden.digest()}) == 3


def test_the_digest_follows_the_question_and_its_references_and_not_the_margin(tmp_path: Path) -> None:
    folder = folder_dataset(tmp_path / "data" / "things")
    text = "task: retrieval\n"
    digest = _suite(tmp_path, text).digest()
    assert _suite(tmp_path, text + "margin: 0.2\n").digest() == digest
    assert _suite(tmp_path, text + "limit: 39\n").digest() != digest
    (folder / "0.png").write_bytes(picture(12345))
    assert _suite(tmp_path, text).digest() != digest
    file = _questions(tmp_path) / "data.csv"
    asked = _suite(tmp_path, "task: vqa\n", data="asked").digest()
    file.write_text(file.read_text().replace("crimson", "scarlet"))
    assert _suite(tmp_path, "task: vqa\n", data="asked").digest() != asked


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: retrieval\n", "names no data"),
        ("task: retrieval\ndata: x\nmargins: 0.1\n", "margins"),
        ("task: retrieval\ndata: x\nmetric: accuracy\n", "does not go with"),
        ("task: classification\ndata: x\ntemplates: [a photo]\n", "{}"),
        ("task: retrieval\ndata: x\nrole: gain\nmargin: 0.1\n", "gain suite has no margin"),
        ("task: retrieval\ndata: x\nkinds: [colour]\n", "do not go with task retrieval"),
        ("task: vqa\ndata: x\nmetric: bleu\n", "metric"),
        ("- a\n- b\n", "not a mapping"),
        ("task: [\n", "cannot be read"),
    ],
)
def test_a_wrong_suite_says_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(GateError) as error:
        _suite(tmp_path, text, data="")
    assert message in str(error.value)
    assert "things.yaml" in error.value.message
    assert error.value.fix


def test_a_suite_asks_all_its_items_up_to_the_bound_of_the_settings_or_its_own(tmp_path: Path) -> None:
    folder_dataset(tmp_path / "data" / "things", count=60)
    for name, limit in (("open", ""), ("own", "limit: 30\n")):
        _suite(tmp_path, f"task: retrieval\n{limit}", name)
    for most, asked in ((Gate().max_items, 60), (50, 50)):
        suites = load_suites([tmp_path], tmp_path, "clip", most)
        assert {suite.name: len(suite.items()) for suite in suites} == {"open": asked, "own": 30}
    rows = sample_rows(500, "flags")
    assert len(fresh_suite(rows).items()) == 500, "four hundred show 3 points, and nothing smaller"
    assert [len(suite.items()) for suite in fresh_suites(rows, limit=450)] == [450]


def test_missing_data_and_equal_names_are_errors(tmp_path: Path) -> None:
    with pytest.raises(GateError, match="does not exist") as missing:
        _suite(tmp_path, "task: retrieval\n", data="nowhere").items()
    assert "ratchet demo data prepare nowhere" in missing.value.fix
    (tmp_path / "data" / "bare").mkdir(parents=True)
    with pytest.raises(GateError, match=r"suite things: .*no data.csv"):
        _suite(tmp_path, "task: vqa\n", data="bare").items()
    (tmp_path / "empty").mkdir()
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        _suite(tmp_path / folder, "task: retrieval\n", "same")
    with pytest.raises(GateError, match="2 suites are named 'same'"):
        load_suites([tmp_path / "a", tmp_path / "b"], tmp_path)
    with pytest.raises(GateError, match="holds no suite"):
        load_suites([tmp_path / "empty"], tmp_path)


def test_the_built_in_suites_are_valid_and_protect_more_than_they_allow() -> None:
    suites = load_suites(home=Path("/home"), family=None)
    assert len(suites) == len(list(BUILTIN.glob("*.yaml"))) >= 10
    assert {suite.role for suite in suites} == {"retention"}
    asked = {suite.name for suite in suites if suite.family == "vlm"}
    assert asked == {f"vqa_{kind}" for kind in ("name", "colour", "presence", "category")}
    assert {suite.task for suite in suites} == {"classification", "retrieval", "vqa"}
    for suite in suites:
        assert suite.margin is not None and suite.margin <= 0.08
        assert suite.description and str(suite.folder).startswith("/home/data/")


QUESTIONS = [
    ("0.png", "colour", "which colour?", "red", "red;crimson"),
    ("0.png", "presence", "is it red?", "yes", ""),
    ("1.png", "colour", "which colour?", "blue", "blue"),
    ("1.png", "presence", "is it red?", "no", ""),
    ("2.png", "presence", "is it a dog or a cat?", "dog", ""),
    ("2.png", "name", "what is this?", "dog", "hound;dog"),
]


def _questions(home: Path) -> Path:
    folder = home / "data" / "asked"
    folder.mkdir(parents=True)
    lines = [f'{file},,{kind},"{question}",{answer},{answers}' for file, kind, question, answer, answers in QUESTIONS]
    (folder / "data.csv").write_text("\n".join(["file,text,label,question,answer,answers", *lines]) + "\n")
    for i in range(3):
        (folder / f"{i}.png").write_bytes(picture(i))
    return folder


def test_a_vqa_suite_asks_the_questions_of_its_kinds(tmp_path: Path) -> None:
    folder, text = _questions(tmp_path), "task: vqa\n"
    suite = _suite(tmp_path, text, data="asked")
    assert (suite.family, suite.metric, suite.views, suite.k) == ("vlm", "exact_match", ("answer",), 1)
    assert len(suite.items()) == 6
    colours = _suite(tmp_path, text + "kinds: [colour, name]\n", data="asked").items()
    asked = {item.text: item.answers for item in colours if item.name != "0.png"}
    assert asked == {"which colour?": ("blue",), "what is this?": ("dog", "hound")}
    closed = _suite(tmp_path, text + "kinds: [presence]\nmetric: yes_no\n", data="asked").items()
    assert sorted(item.answers for item in closed) == [("no",), ("yes",)]
    (folder / "2.png").write_bytes((folder / "1.png").read_bytes())
    clusters = _suite(tmp_path, text, data="asked").clusters()
    assert clusters is not None and len(clusters) == 6
    assert len(set(clusters)) == 2, "questions about one image are one; its content decides, not its name"


def test_items_that_share_a_caption_or_an_image_are_one_cluster(tmp_path: Path) -> None:
    folder = folder_dataset(tmp_path / "data" / "things", count=6)
    captions = ("0", "a dog"), ("1", "A dog"), ("1", "a red ball"), ("2", "a red ball"), ("3", "a cat")
    rows = [f"{number}.png,{text},kind,{text}," for number, text in captions]
    (folder / "data.csv").write_text("\n".join(["file,text,label,concept,split", *rows]) + "\n")
    suite = _suite(tmp_path, "task: retrieval\n")
    clusters = suite.clusters()
    assert clusters is not None
    found = {item.text: number for item, number in zip(suite.items(), clusters, strict=True)}
    assert found["a dog"] == found["A dog"] == found["a red ball"] != found["a cat"]
    assert _suite(tmp_path, "task: classification\n").clusters() is None


def test_each_family_is_asked_its_own_suites(tmp_path: Path) -> None:
    for name, task in (("a", "vqa"), ("b", "retrieval"), ("c", "classification")):
        _suite(tmp_path, f"task: {task}\n", name)
    names = {family: [suite.name for suite in load_suites([tmp_path], family=family)] for family in ("clip", "vlm")}
    assert names == {"clip": ["b", "c"], "vlm": ["a"]}


# Answers as VQA v2 compares them, and what they earn


@pytest.mark.parametrize(
    ("answer", "same"),
    [
        ("The dog", "dog"),
        ("a red, round apple.", "red round apple"),
        ("Two", "2"),
        ("none", "0"),
        ("1,000", "1000"),
        ("3.5 km", "3.5 km"),
        ("t-shirt", "t shirt"),
        ("dont know", "don't know"),
        ("don’t know", "don't know"),
        ("its tail", "its tail"),
        ("  what?!\n", "what"),
        ("The", ""),
    ],
)
def test_answers_are_compared_without_what_does_not_matter(answer: str, same: str) -> None:
    assert normalise(answer) == normalise(normalise(answer)) == same


@pytest.mark.parametrize(
    ("metric", "answer", "references", "earned"),
    [
        ("exact_match", "A sofa.", ["couch", "sofa"], 1),
        ("exact_match", "sofa bed", ["couch", "sofa"], 0),
        ("exact_match", "", ["the"], 0),
        *(("vqa_accuracy", "Red", ["red"] * n + ["blue"] * (10 - n), min(n, 3) / 3) for n in (0, 1, 2, 3, 10)),
        ("vqa_accuracy", "red", ["red"], 1),
        ("vqa_accuracy", "red", ["blue", "red"], 1),
        ("vqa_accuracy", "red", ["blue", "green"], 0),
        ("yes_no", "Yes, it is.", ["yes"], 1),
        ("yes_no", "No!", ["yes"], 0),
        ("yes_no", "a dog", ["no"], 0),
        ("yes_no", "yesterday", ["yes"], 0),
    ],
)
def test_an_answer_earns_by_its_metric(metric: str, answer: str, references: list[str], earned: float) -> None:
    """Three people must agree if there are as many; an empty answer is never correct."""
    assert grade(metric, answer, references) == pytest.approx(earned)


def test_the_majority_answer_is_what_needs_no_image() -> None:
    assert majority("exact_match", [("red",), ("Red.",), ("blue",), ("green",)]) == ("red", 0.5)
    assert majority("yes_no", [("no",), ("no",), ("yes",)]) == ("no", pytest.approx(2 / 3))
    assert majority("vqa_accuracy", [("red", "red", "blue"), ("blue", "blue", "blue")])[0] == "blue"
