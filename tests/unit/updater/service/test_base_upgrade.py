from __future__ import annotations

from pathlib import Path

import pytest

from core.errors import BaseModelError, ReleaseError
from core.ledger import Ledger
from core.settings import Settings
from core.settings.serving import BaseModels
from tests.support.tiny import tiny_base
from updater.service.base_upgrade import plan_switch


class TwoBases:
    """Two bases, and an upgrade from "tiny" with the adapter "a" to "wide" with the adapter "n" that passed."""

    def __init__(self, home: Path) -> None:
        self.old, self.new = tiny_base(home), tiny_base(home, "wide", seed=5, dim=48)
        self.settings = Settings(home=home, ledger_url=f"sqlite:///{home / 'ledger.db'}", base=BaseModels(clip="tiny"))
        self.ledger = Ledger.open(self.settings.ledger)
        for name, base in (("a", self.old), ("b", self.old), ("n", self.new)):
            self.ledger.register_adapter(name, "clip", base.digest, f"i-{name}", "t", {})
        self.release("a")
        self.ledger.begin_base_upgrade(
            "upgrade-1", recipe={"name": "default.upgrade"}, seed=0, store_version=1, data_to={}, incumbent="a",
            old=(self.old.digest, "tiny"), new=(self.new.digest, "wide"), gflops=1.0, actor="ann",
        )  # fmt: skip
        self.ledger.advance_update("upgrade-1", "trained", adapter="n")
        self.ledger.record_verdict("upgrade-1", "n", "passed", "report", {})
        self.ledger.advance_update("upgrade-1", "done")

    def release(self, clip: str | None, share: float = 1.0) -> None:
        live = self.ledger.live()
        number = (live.number if live else 0) + 1
        self.ledger.commit_release(number, clip=clip, vlm=None, actor="t", reason="r", proposal_id=None, share=share)

    def refused(self, name: str, words: str) -> None:
        with pytest.raises((ReleaseError, BaseModelError), match=words):
            plan_switch(self.settings, self.ledger, name)


@pytest.fixture
def bases(tmp_path: Path) -> TwoBases:
    return TwoBases(tmp_path)


def test_it_is_not_released_when_something_else_is_live_than_it_was_judged_against(bases: TwoBases) -> None:
    bases.release("b")
    bases.refused("wide", "was judged against a, and b is live by now")


def test_a_base_without_anything_to_release_is_refused_and_what_is_open_is_decided_first(bases: TwoBases) -> None:
    bases.refused("tiny", "has the base 'tiny' already")
    bases.refused("nothing", "no base 'nothing'")
    tiny_base(bases.settings.home, "third", seed=9)
    bases.refused("third", "no upgrade to the base 'third' has passed the gate")
    proposal = bases.ledger.propose("update", clip="b", actor="updater", reason="passed")
    bases.refused("wide", f"proposal {proposal.id} is not decided yet")
    bases.ledger.advance_proposal(proposal.id, "failed", "not now")
    bases.release("b", share=0.1)
    bases.refused("wide", "release 2 is on trial")
