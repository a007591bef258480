"""Data sets of others, as their own writers make them and with what is wrong in them."""

from __future__ import annotations

import gc
import gzip
import io
import json
import pickle
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Pillow
from pycocotools.coco import COCO
from torchvision.datasets import ImageFolder
from webdataset import TarWriter

from core.errors import RecordError
from streams.publish.datasets import FORMATS, detect, read_dataset
from streams.publish.datasets.json_annotations import elements
from streams.publish.datasets.shards import MAX_HEADER_BYTES, expand
from streams.publish.folders import FolderItem, write_folder
from tests.support.datasets import error_of, items_and_errors, items_of
from tests.support.pictures import png

datasets.disable_progress_bars()


def texts_of(path: Path | str, **options: Any) -> list[str]:
    return [item.text for item in items_of(path, **options)]


def images(root: Path, *names: str, colour: str = "red") -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(colour))
    return root


def test_ratchets_own_formats_are_found_and_a_format_can_be_forced(tmp_path: Path) -> None:
    write_folder(tmp_path / "own", [FolderItem(Path("crane/a.png"), "x", inline=png())])
    (tmp_path / "rows.csv").write_text("file,text\nown/crane/a.png,x\n")
    (tmp_path / "rows.jsonl").write_text('{"file": "own/crane/a.png", "text": "x"}\n')
    names = {"own": "folder", "rows.csv": "csv", "rows.jsonl": "jsonl"}
    assert {path: detect(tmp_path / path).name for path in names} == names
    assert all(items_of(tmp_path / path)[0].bytes() == png() for path in names)
    assert (texts_of(tmp_path / "own"), texts_of(tmp_path / "own", format="imagefolder")) == (["x"], ["crane"])
    with pytest.raises(RecordError, match="'zip' is not a known format") as caught:
        items_of(tmp_path / "own", format="zip")
    assert all(name in caught.value.fix for name in FORMATS)


@pytest.mark.parametrize(("folder", "format"), [("webdataset",) * 2, ("files", "sidecars"), ("parquet",) * 2])
def test_what_img2dataset_writes_is_read(img2dataset: Path, folder: str, format: str) -> None:
    assert detect(img2dataset / folder).name == format
    items, errors = items_and_errors(img2dataset / folder)
    assert {item.text for item in items} == {"a red square", "a green square", "a blue square"}
    [red] = [item for item in items if item.text == "a red square"]
    assert red.bytes()[:3] == b"\xff\xd8\xff" and red.source == "http://127.0.0.1:8765/red.jpg"
    told = ["row 3, field 'jpg': was not downloaded: failed_to_download (HTTP Error 404"] * (folder == "parquet")
    assert all(part in error.message for part, error in zip(told, errors, strict=True))


# -- folders of images ---------------------------------------------------------------------------------------------


def test_class_folders_are_those_of_torchvision(tmp_path: Path) -> None:
    root = images(tmp_path / "set", "red_fox/1.png", "red_fox/more/2.png", "crane/3.jpg")
    theirs = ImageFolder(str(root))
    assert detect(root).name == "imagefolder"
    ours = {str(item.path): item.label for item in items_of(root)}
    assert ours == {path: theirs.classes[number] for path, number in theirs.samples}
    assert set(texts_of(root)) == {"red fox", "crane"}
    images(tmp_path, "outside.png")
    (root / "crane/b.png").symlink_to(tmp_path / "outside.png")
    assert "link out of the folder" in error_of(root).message


def test_wrong_metadata_rows_are_named_and_the_next_is_read(tmp_path: Path) -> None:
    images(tmp_path, "a.png")
    lines = ["file_name,text", "none.png,x", "../a.png,x", "a.png,", "a.png,caf\udce9", 'a.png,"x"y', "a.png,fine"]
    (tmp_path / "metadata.csv").write_text("\n".join(lines), errors="surrogateescape")
    items, errors = items_and_errors(tmp_path)
    assert [item.text for item in items] == ["fine"]
    said = ["line 2, field 'file': 'none.png' does not", "leads out", "field 'text': is empty", "UTF-8", "after line 5"]
    assert all(part in error.message and error.fix for error, part in zip(errors, said, strict=True))
    (tmp_path / "metadata.csv").write_text("file_name,size\na.png,3\n")
    with pytest.raises(RecordError, match=r"the columns are \['file_name', 'size'\]"):
        items_of(tmp_path)


# -- WebDataset ----------------------------------------------------------------------------------------------------


def write(path: Path, *samples: dict[str, Any]) -> Path:
    with TarWriter(str(path)) as sink:
        for sample in samples:
            sink.write(sample)
    return path


def members(path: Path, *files: tuple[str, bytes], **special: bytes) -> Path:
    """``special``: links and devices by name, each with its type."""
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for name, kind in special.items():
            info = tarfile.TarInfo(name.replace("_", "."))
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    return path


def test_json_members_bring_the_other_fields_and_a_file_the_names_of_classes(tmp_path: Path) -> None:
    more = {
        "question": "what colour?",
        "answers": ["red", "red", "rot"],
        "tags": ["flat"],
        "url": "https://a/b",
        "n": 1,
    }
    [item] = items_of(write(tmp_path / "a.tar", {"__key__": "x", "png": png(), "txt": "a square", "json": more}))
    assert (item.text, item.question, item.answer, item.answers) == ("a square", "what colour?", "red", ("red", "rot"))
    assert (item.tags, item.source, item.domain) == (("flat",), "https://a/b", "a")
    shard = write(tmp_path / "b.tar", {"__key__": "x", "png": png(), "cls": 1})
    assert "class 1 has no name" in error_of(shard).message
    (tmp_path / "classes.txt").write_text("disc\nred_square\n")
    assert [(item.label, item.text) for item in items_of(shard)] == [("red_square", "red square")]


def test_a_pattern_counts_with_leading_zeros_and_lists_and_each_shard_must_be_there(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / f"{number:03d}.tar", {"__key__": "x", "png": png(), "txt": f"shard {number}"})
    pattern = str(tmp_path / "{001..002}.tar")
    assert detect(pattern).name == "webdataset"
    assert texts_of(pattern) == ["shard 1", "shard 2"]
    with pytest.raises(RecordError, match=r"003\.tar does not exist"):
        items_of(tmp_path / "{001..003}.tar")
    named = [f"a/{number}-{letter}.tar" for number in ("08", "09", "10") for letter in "xy"]
    assert [str(path) for path in expand(Path("a/{08..10}-{x,y}.tar"))] == named
    for pattern, said in (("{0..9999}{0..99}.tar", "at most"), ("{9..1}.tar", "not a range")):
        with pytest.raises(RecordError, match=said):
            expand(Path(pattern))


def test_members_of_a_shard_execute_nothing_and_lead_nowhere(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "executed",)

    bomb = pickle.dumps(Bomb())
    files = [("x.png", png()), ("x.txt", b"a square"), ("x.pyd", bomb), ("x.pth", bomb), ("x.pickle", bomb)]
    outside = [("../../b.png", png()), ("../../b.txt", b"outside")]
    links = {"y_png": tarfile.SYMTYPE, "y_txt": tarfile.LNKTYPE, "y_json": tarfile.CHRTYPE}
    items = items_of(members(tmp_path / "a.tar", *files, *outside, **links))
    assert [(item.text, item.bytes()) for item in items] == [("a square", png()), ("outside", png())]
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([("b.png", png())], "field 'text': is empty"),
        ([("b.png", png()), ("b.txt", b"\xff")], "field 'txt': is not UTF-8"),
        ([("b.png", png()), ("b.json", b"[" * 100_000)], "field 'json': not JSON"),
        ([("b.png", bytes(5000)), ("b.txt", b"x")], "field 'image': 5000 bytes, more than 4096"),
    ],
)
def test_a_wrong_sample_is_named_and_the_next_is_read(tmp_path: Path, files: list[Any], said: str) -> None:
    good = [("a.png", png()), ("a.txt", b"before")], [("c.png", png()), ("c.txt", b"after")]
    shard = members(tmp_path / "a.tar", *good[0], *files, *good[1])
    items, [error] = items_and_errors(shard, max_image_bytes=4096)
    assert [item.text for item in items] == ["before", "after"]
    assert f"{shard}, sample b" in error.message and said in error.message and error.fix


def test_a_header_that_would_fill_the_memory_is_not_read_and_members_are_forgotten(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "a.tar.gz", "wb") as stream, tarfile.open(fileobj=stream, mode="w") as tar:
        info = tarfile.TarInfo("x.png")
        info.type, info.size = tarfile.XHDTYPE, MAX_HEADER_BYTES + 1
        tar.addfile(info, io.BytesIO(bytes(info.size)))
    assert "a header of" in error_of(tmp_path / "a.tar.gz").message
    shard = members(tmp_path / "b.tar", *((f"{n}.{kind}", b"x") for n in range(1500) for kind in ("png", "txt")))
    for number, _ in enumerate(read_dataset(shard), 1):
        if number == 1500:
            assert sum(type(each) is tarfile.TarInfo for each in gc.get_objects()) < 10
    assert number == 1500


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_a_shard_that_was_cut_off_is_one_wrong_row_and_the_next_is_read(tmp_path: Path, suffix: str) -> None:
    noise = [{"__key__": f"{n}", "png": png() + bytes(20_000), "txt": f"t{n}"} for n in range(4)]
    shard = write(tmp_path / f"a{suffix}", *noise)
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    write(tmp_path / f"b{suffix}", {"__key__": "x", "png": png(), "txt": "whole"})
    items, [error] = items_and_errors(tmp_path)
    assert items[-1].text == "whole"
    assert str(shard) in error.message and "damaged" in error.message


# -- Parquet -------------------------------------------------------------------------------------------------------


def hugging_face(path: Path, colours: list[str], rows: dict[str, list[Any]], **features: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    pictures = [Pillow.open(io.BytesIO(png(each))) for each in colours]
    made = Dataset.from_dict({"image": pictures, **rows}, features=Features({"image": Image(), **features}))
    made.to_parquet(str(path))
    return path


def test_hugging_face_data_sets_are_read(tmp_path: Path) -> None:
    root = tmp_path / "captions"
    root.mkdir()
    for split, colours in (("train", ["red", "blue"]), ("test", ["green"])):
        rows = {"caption": [f"a {each} square" for each in colours]}
        hugging_face(root / f"data/{split}-00000-of-00001.parquet", colours, rows, caption=Value("string"))
    assert detect(root).name == "parquet"
    items = items_of(root)
    assert [(item.text, item.split) for item in items] == [
        ("a green square", "test"), ("a red square", "train"), ("a blue square", "train"),
    ]  # fmt: skip
    assert Pillow.open(io.BytesIO(items[1].bytes())).getpixel((0, 0)) == (255, 0, 0)
    assert texts_of(root, split="test") == ["a green square"]
    labels = ClassLabel(names=["sky_lark", "crane"])
    file = hugging_face(tmp_path / "classes.parquet", ["red", "blue"], {"label": [1, 0]}, label=labels)
    assert [(item.label, item.text) for item in items_of(file)] == [("crane", "crane"), ("sky_lark", "sky lark")]
    answers = [{"answer": text, "answer_id": n} for n, text in enumerate(["two", "2", "two"])]
    kinds = {"question": Value("string"), "answers": [{"answer": Value("string"), "answer_id": Value("int64")}]}
    asked = {"question": ["how many?"], "answers": [answers]}
    [item] = items_of(hugging_face(tmp_path / "vqa.parquet", ["red"], asked, **kinds))
    assert (item.question, item.answer, item.answers) == ("how many?", "two", ("two", "2")), "what most said"


def table(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"image": [bytes(5000)], "text": ["x"]}, "5000 bytes, more than 4096"),
        ({"image": [png()], "question": ["q"], "answer": [""]}, "row 1, field 'answer': is empty"),
        ({"image": [{"path": "../a.png"}], "text": ["x"]}, "leads out of the folder"),
        ({"photo": ["a.png"], "text": ["x"]}, "no column of images; it has: photo, text"),
        ({"image": [png()], "n": [1]}, "no column of texts; it has: image, n"),
    ],
)
def test_a_wrong_row_or_column_of_a_table_is_named(tmp_path: Path, columns: dict[str, Any], said: str) -> None:
    with pytest.raises(RecordError, match=said):
        raise error_of(table(tmp_path / "a.parquet", **columns), max_image_bytes=4096)


def test_what_is_damaged_in_a_table_is_one_wrong_row_and_the_next_is_read(tmp_path: Path) -> None:
    damaged = table(tmp_path / "a.parquet", image=[png()] * 50, text=["x"] * 50)
    damaged.write_bytes(damaged.read_bytes()[:-20])
    texts = pa.array([b"one", b"caf\xe9", b"three"]).view(pa.string())
    table(tmp_path / "b.parquet", image=[png()] * 3, text=texts)
    others = {"source": [3], "time": ["noon"], "tags": [[1, 2]], "domain": [{"a": 1}], "concept": [1.5]}
    table(tmp_path / "c.parquet", image=[png()], text=["other people's meaning of a name"], **others)
    items, errors = items_and_errors(tmp_path, format="parquet")
    assert [item.text for item in items] == ["one", "three", "other people's meaning of a name"]
    assert f"{damaged}" in errors[0].message and "damaged" in errors[0].message
    assert "row 2, field 'text': cannot be read" in errors[1].message
    item = items[-1]
    assert (item.source, item.time, item.tags, item.domain, item.concept) == ("", "", (), tmp_path.name, "")


# -- JSON beside its images ----------------------------------------------------------------------------------------


def document(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def coco(root: Path, captions_first: bool = False, **changes: Any) -> Path:
    """The layout of COCO 2017."""
    for number, colour in ((9, "red"), (25, "blue")):
        images(root, f"train2017/{number:012d}.jpg", colour=colour)
    content: dict[str, Any] = {
        "info": {"year": 2017},
        "images": [{"id": n, "file_name": f"{n:012d}.jpg", "height": 8, "width": 8, "license": 1} for n in (9, 25)],
        "annotations": [
            {"image_id": 9, "id": 1, "caption": "a red square"},
            {"image_id": 25, "id": 2, "caption": "a blue square "},
            {"image_id": 9, "id": 3, "caption": "something red"},
        ],
    } | changes
    ordered = dict(reversed(content.items())) if captions_first else content
    return document(root / "annotations/captions_train2017.json", ordered)


@pytest.mark.parametrize("captions_first", [False, True])
def test_coco_captions_are_those_that_pycocotools_reads(tmp_path: Path, captions_first: bool) -> None:
    file = coco(tmp_path, captions_first)
    theirs = COCO(str(file))
    expected = [
        (theirs.loadImgs(each["image_id"])[0]["file_name"], each["caption"].strip())
        for each in theirs.loadAnns(theirs.getAnnIds())
    ]
    boxes = {"images": theirs.dataset["images"], "annotations": [{"image_id": 9, "bbox": [0, 0, 1, 1]}]}
    document(file.with_name("instances_train2017.json"), boxes)
    for path in (file, tmp_path):
        assert detect(path).name == "coco"
        assert [(item.path.name, item.text) for item in items_of(path)] == expected
    assert (items_of(file)[1].bytes(), items_of(file)[1].split) == (png("blue"), "train")
    assert "field 'caption': there is none" in error_of(file.with_name("instances_train2017.json")).message


def test_a_wrong_annotation_is_named(tmp_path: Path) -> None:
    images(tmp_path.parent, "x.jpg")
    caption = [{"image_id": 7, "caption": "x"}]
    for changes, said in (
        ({"annotations": caption}, "field 'image_id': 7 is none of the images"),
        ({"images": [{"id": 7, "file_name": "../x.jpg"}], "annotations": caption}, "leads out"),
    ):
        assert said in error_of(coco(tmp_path, **changes), format="coco").message


LLAVA_IMAGE = "coco/train2017/000000000009.jpg"
LLAVA = {
    "id": "000000000009",
    "image": LLAVA_IMAGE,
    "conversations": [
        {"from": "human", "value": "What is it?\n<image>"},
        {"from": "gpt", "value": "A square."},
        {"from": "human", "value": "Which colour?"},
        {"from": "gpt", "value": "Red."},
    ],
}


@pytest.mark.parametrize("name", ["llava.json", "llava.jsonl"])
def test_every_turn_of_a_llava_conversation_is_a_sample_of_the_image(tmp_path: Path, name: str) -> None:
    images(tmp_path / "images", LLAVA_IMAGE)
    file = document(tmp_path / name, [LLAVA] if name.endswith("json") else LLAVA)
    assert detect(file).name == "llava"
    items = items_of(file)
    assert [(item.question, item.answer) for item in items] == [("What is it?", "A square."), ("Which colour?", "Red.")]
    assert {item.bytes() for item in items} == {png()}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('[{"a": 1}, {"a": ', "after element 1: not JSON"),
        ("[" * 100_000, "nested deeper"),
        ('[{"a":' * 100_000, "nested deeper"),
        ('[{"a": "' + "x" * 2**26 + '"}]', "an element of more than"),
    ],
    ids=["breaks off", "arrays", "objects", "large"],
)
def test_a_document_that_breaks_off_or_is_too_deep_or_large_is_refused_before_it_is_in_memory(
    tmp_path: Path, content: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streams.publish.datasets.json_annotations.MAX_ELEMENT_BYTES", 2**20)
    (tmp_path / "a.json").write_text(content)
    tracemalloc.start()
    try:
        with pytest.raises(RecordError, match=said):
            list(elements(tmp_path / "a.json"))
        # Python's own table of interned strings counts in full, some 16 MB, if it happens to grow meanwhile.
        assert tracemalloc.get_traced_memory()[1] < 2**25
    finally:
        tracemalloc.stop()
