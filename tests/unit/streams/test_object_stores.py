"""Objects are read within the list and within bounds, whatever store fsspec leads to."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
from fsspec.asyn import AsyncFileSystem
from fsspec.registry import _registry

from core.addresses import ObjectRule
from core.errors import RecordError
from core.settings.streams import Ingest
from streams.records import uris
from streams.records.uris import UriFetcher


class Store(AsyncFileSystem):  # type: ignore[misc]
    """A store of another kind, in memory. What fails is what its key says."""

    protocol = "gs"
    asked: list[str] = []  # noqa: RUF012
    errors: dict[str, Exception] = {  # noqa: RUF012
        "denied": PermissionError(), "bad": OSError(22, "invalid"), "busy": OSError(16, "SlowDown"),
        "reset": EOFError(),
    }  # fmt: skip

    async def _info(self, path: str, **_: Any) -> dict[str, Any]:
        self.asked.append(path)
        key = path.rpartition("/")[2]
        if key == "none":
            raise FileNotFoundError(path)
        if key in self.errors:
            raise self.errors[key]
        return {"name": path, "size": 2000 if key == "large" else 5, "type": "file"}

    async def _cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        return (b"x" * 5000 if path.endswith("grown") else b"12345")[start:end]


@pytest.fixture
def fetcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[UriFetcher]:
    monkeypatch.setattr(uris, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(Store, "asked", [])
    monkeypatch.setitem(_registry, "gs", Store)
    made = UriFetcher(Ingest(allowed_uris=["gs://pictures/in"], max_image_bytes=1024))
    yield made
    made.close()


def reason(fetcher: UriFetcher, uri: str) -> str:
    with pytest.raises(RecordError) as caught:
        fetcher.fetch(uri)
    return str(caught.value.reason)


def test_an_object_under_the_prefix_is_read(fetcher: UriFetcher) -> None:
    assert fetcher.fetch("gs://pictures/in/a.png") == fetcher.fetch("gs://pictures/in") == b"12345"


def test_others_are_not_even_asked_for(fetcher: UriFetcher) -> None:
    others = [
        "s3://pictures/in/a.png", "gs://other/in/a.png", "gs://pictures/inside/a.png", "gs://pictures/",
        "gs://pictures/in/../a.png", "gs://pictures/in/./a", "gs://pictures/in\\..\\a", "gs:///in/a",
        "gs://pictures/in/\0", "GS://pictures/in/a.png", "gs://pictures/in/" + "a" * 1024, "gs://u:p@pictures/in/a",
        "gs://pictures/in/\ud800",
    ]  # fmt: skip
    assert {reason(fetcher, each) for each in others} == {"uri_not_allowed"}
    assert Store.asked == []


def test_a_large_object_is_refused_by_its_size_and_one_that_has_grown_is_cut(fetcher: UriFetcher) -> None:
    assert reason(fetcher, "gs://pictures/in/large") == "image_too_large"
    assert reason(fetcher, "gs://pictures/in/grown") == "image_too_large"


@pytest.mark.parametrize(
    ("key", "tries"), [("none", 1), ("denied", 1), ("bad", 1), ("busy", 4), ("reset", 4)]
)  # fmt: skip
def test_only_what_may_pass_is_tried_again(fetcher: UriFetcher, key: str, tries: int) -> None:
    assert reason(fetcher, f"gs://pictures/in/{key}") == "uri_unreachable"
    assert len(Store.asked) == tries


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(_registry, "s3", raising=False)
    fetcher = UriFetcher(Ingest(allowed_uris=["s3://pictures/"]))
    with pytest.raises(RecordError, match=r'pip install "ratchet-server\[s3\]"') as caught:
        fetcher.fetch("s3://pictures/a.png")
    fetcher.close()
    assert caught.value.reason == "uri_not_allowed"


@pytest.mark.parametrize(
    "text", ["s3://", "s3:///a", "s3://b", "s3://bucket/../x", "s3://*/x", "S3://bucket", "s3://b c/x"]
)
def test_an_entry_that_cannot_be_meant_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="s3://"):
        ObjectRule.parse(text)
