"""`ratchet bench search` at a few thousand rows."""

from __future__ import annotations

import json

import pytest

from benchmarks.search.run_search import main
from core.settings import Settings


@pytest.mark.long
def test_a_small_run_compares_with_faiss(capsys: pytest.CaptureFixture[str]) -> None:
    main(Settings(), ["--rows", "3000", "--seconds", "0.2", "--index-rows", "1000"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["recall"] >= 0.95 and figures["qps_to_faiss"] > 0
    for size in figures["growth"]:  # asked of the same queries, however many a busy machine had time for
        assert len({measured["recall"] for name, measured in size.items() if name.startswith("callers_")}) == 1
    assert [size["rows"] for size in figures["growth"]] == [30, 300, 3000]
    assert [size["index_used"] for size in figures["growth"]] == [False, False, True]
    assert figures["growth"][-1]["faiss"]["ef_search"] > 0
    assert {"recall_filtered", "ingest_rows_per_second", "backfill_rows_per_second", "memory_gib"} <= set(figures)
