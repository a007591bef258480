"""The relay of the benchmarks that loses a COMMIT."""

from benchmarks.fixtures.commit_relay import CommitRelay, Loss

__all__ = ["CommitRelay", "Loss"]
