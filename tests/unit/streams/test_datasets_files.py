from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import pytest
from torchvision.datasets import ImageFolder
from webdataset import ShardWriter, TarWriter

from core.errors import RecordError
from streams.publish.datasets import FORMATS, detect, read_dataset
from streams.publish.datasets.shards import MAX_HEADER_BYTES, expand
from streams.publish.folders import FolderItem, write_folder
from tests.support.datasets import error_of, items_and_errors, items_of
from tests.support.pictures import png


def images(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png())
    return root


def test_class_folders_are_those_of_torchvision(tmp_path: Path) -> None:
    images(tmp_path, "red_fox/1.png", "red_fox/more/2.png", "crane/3.jpg")
    theirs = ImageFolder(str(tmp_path))
    assert detect(tmp_path).name == "imagefolder"
    ours = {str(item.path): item.label for item in items_of(tmp_path)}
    assert ours == {path: theirs.classes[number] for path, number in theirs.samples}
    assert {item.text for item in items_of(tmp_path)} == {"red fox", "crane"}


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_metadata_is_what_hugging_face_reads(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    root = images(tmp_path / "set", "train/a.png", "train/b/b.png")
    rows = [{"file_name": "a.png", "text": "one, two"}, {"file_name": "b/b.png", "text": "three"}]
    lines = ['file_name,text\na.png,"one, two"\nb/b.png,three\n'] if kind == "csv" else map(json.dumps, rows)
    (root / f"train/metadata.{kind}").write_text("\n".join(lines))
    theirs = datasets.load_dataset("imagefolder", data_dir=str(root), split="train", cache_dir=str(tmp_path / "cache"))
    assert detect(root).name == "imagefolder"
    items = items_of(root)
    assert sorted(item.text for item in items) == sorted(theirs["text"]) == ["one, two", "three"]
    assert {item.split for item in items} == {"train"}


def test_wrong_metadata_rows_are_named_and_the_next_is_read(tmp_path: Path) -> None:
    images(tmp_path, "a.png")
    lines = ["file_name,text", "none.png,x", "../a.png,x", "a.png,", "a.png,caf\udce9", 'a.png,"x"y', "a.png,fine"]
    (tmp_path / "metadata.csv").write_text("\n".join(lines), errors="surrogateescape")
    items, errors = items_and_errors(tmp_path)
    assert [item.text for item in items] == ["fine"]
    said = [
        "line 2, field 'file': 'none.png' does not",
        "leads out",
        "field 'text': is empty",
        "not UTF-8",
        "after line 5",
    ]
    for error, part in zip(errors, said, strict=True):
        assert part in error.message and error.fix


def test_metadata_without_texts_is_refused_with_its_columns(tmp_path: Path) -> None:
    images(tmp_path, "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,size\na.png,3\n")
    with pytest.raises(RecordError, match=r"the columns are \['file_name', 'size'\]"):
        items_of(tmp_path)


def test_an_image_that_is_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    images(tmp_path, "outside.png", "set/crane/a.png")
    (tmp_path / "set/crane/b.png").symlink_to(tmp_path / "outside.png")
    assert "link out of the folder" in error_of(tmp_path / "set").message


def test_ratchets_own_formats_are_found(tmp_path: Path) -> None:
    write_folder(tmp_path / "own", [FolderItem(Path("a.png"), "x", inline=png())])
    (tmp_path / "rows.csv").write_text("file,text\nown/a.png,x\n")
    (tmp_path / "rows.jsonl").write_text('{"file": "own/a.png", "text": "x"}\n')
    names = {"own": "folder", "rows.csv": "csv", "rows.jsonl": "jsonl"}
    assert {path: detect(tmp_path / path).name for path in names} == names
    assert all(items_of(tmp_path / path)[0].bytes() == png() for path in names)


def test_a_format_can_be_forced_and_its_name_is_checked(tmp_path: Path) -> None:
    write_folder(tmp_path, [FolderItem(Path("crane/a.png"), "from the index", inline=png())])
    assert items_of(tmp_path)[0].text == "from the index"
    assert items_of(tmp_path, format="imagefolder")[0].text == "crane"
    with pytest.raises(RecordError, match="'zip' is no format") as caught:
        items_of(tmp_path, format="zip")
    assert all(name in caught.value.fix for name in FORMATS)


def write(path: Path, *samples: dict[str, Any], **options: Any) -> Path:
    with TarWriter(str(path), **options) as sink:
        for sample in samples:
            sink.write(sample)
    return path


def members(path: Path, *files: tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_a_folder_of_shards_from_webdatasets_own_writer_is_read_in_order(tmp_path: Path) -> None:
    with ShardWriter(str(tmp_path / "train-%04d.tar"), maxcount=2, verbose=0) as sink:
        for number in range(5):
            sink.write({"__key__": f"{number:03d}", "png": png((number, 0, 0)), "txt": f"shade {number}"})
    assert detect(tmp_path).name == "webdataset"
    items = items_of(tmp_path)
    assert [item.text for item in items] == [f"shade {number}" for number in range(5)]
    assert [item.bytes() for item in items] == [png((number, 0, 0)) for number in range(5)]
    assert {(item.split, item.domain) for item in items} == {("train", tmp_path.name)}


def test_json_members_bring_the_other_fields(tmp_path: Path) -> None:
    more = {
        "question": "what colour?",
        "answers": ["red", "red", "rot"],
        "tags": ["flat"],
        "url": "https://a/b",
        "n": 1,
    }
    shard = write(tmp_path / "a.tar", {"__key__": "x", "png": png(), "txt": "a square", "json": more})
    [item] = items_of(shard)
    assert (item.text, item.question, item.answer, item.answers) == ("a square", "what colour?", "red", ("red", "rot"))
    assert (item.tags, item.source, item.domain) == (("flat",), "https://a/b", "a")


def test_a_class_is_named_by_the_file_beside_the_shards(tmp_path: Path) -> None:
    shard = write(tmp_path / "a.tar", {"__key__": "x", "png": png(), "cls": 1})
    assert "class 1 has no name" in error_of(shard).message
    (tmp_path / "classes.txt").write_text("disc\nred_square\n")
    [item] = items_of(shard)
    assert (item.label, item.text) == ("red_square", "red square")


def test_a_pattern_names_shards_and_each_must_be_there(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / f"{number:03d}.tar", {"__key__": "x", "png": png(), "txt": f"shard {number}"})
    pattern = str(tmp_path / "{001..002}.tar")
    assert detect(pattern).name == "webdataset"
    assert [item.text for item in items_of(pattern)] == ["shard 1", "shard 2"]
    with pytest.raises(RecordError, match=r"003\.tar does not exist"):
        items_of(tmp_path / "{001..003}.tar")


def test_patterns_count_with_leading_zeros_and_list() -> None:
    assert [str(path) for path in expand(Path("a/{08..10}-{x,y}.tar"))] == [
        f"a/{number}-{letter}.tar" for number in ("08", "09", "10") for letter in "xy"
    ]
    with pytest.raises(RecordError, match="at most"):
        expand(Path("{0..9999}{0..99}.tar"))
    with pytest.raises(RecordError, match="no range"):
        expand(Path("{9..1}.tar"))


def test_members_that_decoders_would_unpickle_are_not_touched(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "executed",)

    bomb = pickle.dumps(Bomb())
    files = [("x.png", png()), ("x.txt", b"a square"), ("x.pyd", bomb), ("x.pth", bomb), ("x.pickle", bomb)]
    assert [item.text for item in items_of(members(tmp_path / "a.tar", *files))] == ["a square"]
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([("b.txt", b"no image")], "field 'image': there is none"),
        ([("b.png", png())], "field 'text': is empty"),
        ([("b.png", png()), ("b.txt", b"\xff")], "field 'txt': is not UTF-8"),
        ([("b.png", png()), ("b.json", b"[1]")], "field 'json': holds a list"),
        ([("b.png", png()), ("b.json", b"[" * 100_000)], "field 'json': not JSON"),
        ([("b.png", png()), ("b.json", b'{"text": 3}')], "field 'text': is a int"),
        ([("b.png", png()), ("b.txt", b"x"), ("b.jpg", png())], "field 'image': the sample has two"),
        ([("b.png", bytes(5000)), ("b.txt", b"x")], "field 'image': 5000 bytes, more than 4096"),
        ([("b.png", png()), ("b.txt", bytes(2**20 + 1))], "field 'txt': 1048577 bytes"),
    ],
)
def test_a_wrong_sample_is_named_and_the_next_is_read(tmp_path: Path, files: list[Any], said: str) -> None:
    good = [("a.png", png()), ("a.txt", b"before")], [("c.png", png()), ("c.txt", b"after")]
    shard = members(tmp_path / "a.tar", *good[0], *files, *good[1])
    items, [error] = items_and_errors(shard, max_image_bytes=4096)
    assert [item.text for item in items] == ["before", "after"]
    assert f"{shard}, sample b" in error.message and said in error.message and error.fix


def test_names_that_lead_out_of_the_shard_are_only_names(tmp_path: Path) -> None:
    shard = members(tmp_path / "a.tar", ("../../b.png", png()), ("../../b.txt", b"outside"))
    [item] = items_of(shard)
    assert item.bytes() == png() and item.text == "outside"
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_links_and_devices_are_passed_over(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in (("x.png", tarfile.SYMTYPE), ("x.txt", tarfile.LNKTYPE), ("x.json", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    assert items_and_errors(tmp_path / "a.tar") == ([], [])


def test_a_header_that_would_fill_the_memory_is_not_read(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "a.tar.gz", "wb") as stream, tarfile.open(fileobj=stream, mode="w") as tar:
        info = tarfile.TarInfo("x.png")
        info.type, info.size = tarfile.XHDTYPE, MAX_HEADER_BYTES + 1
        tar.addfile(info, io.BytesIO(bytes(info.size)))
    assert "a header of" in error_of(tmp_path / "a.tar.gz").message


def test_memory_does_not_grow_with_the_members(tmp_path: Path) -> None:
    shard = members(tmp_path / "a.tar", *((f"{n}.{kind}", b"x") for n in range(1500) for kind in ("png", "txt")))
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_dataset(shard)) == 1500
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_a_shard_that_was_cut_off_is_one_wrong_row_and_the_next_is_read(tmp_path: Path, suffix: str) -> None:
    noise = [{"__key__": f"{n}", "png": png() + bytes(20_000), "txt": f"t{n}"} for n in range(4)]
    shard = write(tmp_path / f"a{suffix}", *noise)
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    write(tmp_path / f"b{suffix}", {"__key__": "x", "png": png(), "txt": "whole"})
    items, [error] = items_and_errors(tmp_path)
    assert items[-1].text == "whole"
    assert str(shard) in error.message and "damaged" in error.message


@pytest.mark.parametrize(("folder", "format"), [("webdataset", "webdataset"), ("files", "sidecars")])
def test_what_img2dataset_writes_is_read(img2dataset: Path, folder: str, format: str) -> None:
    assert detect(img2dataset / folder).name == format
    items = items_of(img2dataset / folder)
    assert [item.text for item in items] == ["a red square", "a green square", "a blue square"]
    assert items[0].bytes()[:3] == b"\xff\xd8\xff"
    assert items[0].source == "http://127.0.0.1:8765/red.jpg"
