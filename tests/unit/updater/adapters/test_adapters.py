from __future__ import annotations

from pathlib import Path

import pytest
import torch

from core.artifacts import Artifacts, directory_digest
from core.errors import AdapterError
from core.ledger import Ledger
from core.recorded_adapters import fetch_recorded
from updater.adapters import LowRank, compress, merge
from updater.adapters.weight_deltas import kept_share


def factor(out: int, inner: int, rank: int, seed: int) -> LowRank:
    made = torch.Generator().manual_seed(seed)
    return LowRank(
        torch.randn(rank, inner, generator=made, dtype=torch.float64),
        torch.randn(out, rank, generator=made, dtype=torch.float64),
    )


@pytest.mark.parametrize(("out", "inner"), [(40, 25), (25, 40), (6, 50)])
def test_compression_is_the_best_approximation_of_its_rank(out: int, inner: int) -> None:
    """Against the truncated SVD of the whole matrix (Eckart-Young)."""
    full = factor(out, inner, 12, seed=1)
    small = compress(full, 4)
    u, s, vt = torch.linalg.svd(full.dense(), full_matrices=False)
    best = (u[:, :4] * s[:4]) @ vt[:4]
    assert small.rank == 4
    assert torch.allclose(small.dense(), best, atol=1e-9)
    wider = compress(full, 16)
    assert wider.a.shape == (16, inner) and wider.b.shape == (out, 16)
    assert torch.allclose(wider.dense(), full.dense(), atol=1e-12), "a higher rank loses nothing"


def test_a_merge_is_the_weighted_sum_of_both_deltas() -> None:
    old, new = factor(9, 7, 3, seed=3), factor(9, 7, 2, seed=4)
    merged = merge({"both": old, "only old": old}, {"both": new, "only new": new}, 0.3)
    assert torch.allclose(merged["both"].dense(), 0.7 * old.dense() + 0.3 * new.dense())
    assert torch.allclose(merged["only old"].dense(), 0.7 * old.dense())
    assert torch.allclose(merged["only new"].dense(), 0.3 * new.dense())


def test_what_a_lower_rank_keeps_is_said_as_a_share_of_the_squared_norm() -> None:
    """Against the singular values of the whole matrices; a rank that holds everything keeps all of it."""
    large, small = factor(30, 20, 12, seed=5), factor(10, 8, 3, seed=6)
    values = torch.linalg.svdvals(large.dense()) ** 2
    rest = float(small.dense().norm() ** 2)
    expected = (float(values[:4].sum()) + rest) / (float(values.sum()) + rest)
    assert kept_share({"large": large, "small": small}, 4) == pytest.approx(expected)
    assert kept_share({"large": large, "small": small}, 12) == 1.0
    assert kept_share({}, 4) == 1.0


def test_an_adapter_with_other_files_than_those_that_were_recorded_is_refused(tmp_path: Path, ledger: Ledger) -> None:
    artifacts, work = Artifacts(str(tmp_path / "artifacts")), tmp_path / "work"
    work.mkdir()
    (work / "weights").write_bytes(b"1")
    for name, digest in (("clip-a", directory_digest(work)), ("clip-old", None)):
        artifacts.put_directory(work, f"adapters/{name}")
        ledger.register_adapter(name, "clip", "base", "i", "t", {}, digest=digest)
    assert (fetch_recorded(artifacts, ledger, "clip-a") / "weights").read_bytes() == b"1"
    for name in ("clip-a", "clip-old"):
        (artifacts.fetch(f"adapters/{name}") / "weights").write_bytes(b"2")
    with pytest.raises(AdapterError, match="is not the one in the ledger"):
        fetch_recorded(artifacts, ledger, "clip-a")
    assert fetch_recorded(artifacts, ledger, "clip-old")  # recorded before digests were
