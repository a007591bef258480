from __future__ import annotations

import pytest

from core.errors import LedgerError
from core.ledger import Ledger
from tests.unit.core.ledger.steps import begin, release


def test_an_adapter_needs_force_until_it_passed_the_gate_or_was_live(ledger: Ledger) -> None:
    for name in ("passed", "served", "tried", "rejected"):
        ledger.register_adapter(name, "clip", "base", f"i-{name}", "t", {})
        begin(ledger, name)
    ledger.record_verdict("passed", "passed", "passed", "r", {})
    ledger.record_verdict("rejected", "rejected", "rejected", "r", {})
    again = ledger.record_verdict("rejected", "rejected", "passed", "r", {})
    assert again.outcome == "rejected", "a verdict falls once"
    release(ledger, "served")
    release(ledger, "tried", share=0.1)
    assert [ledger.unproven(name) for name in ("passed", "served")] == ["", ""]
    for name in ("tried", "rejected"):
        assert ledger.unproven(name) == f"{name} has no passed verdict in the ledger and was never live"
    ledger.withdraw(["passed", None], actor="guard", subject="release 3", reason="disagrees", evidence={"of": 40})
    ledger.withdraw(["passed"], actor="guard", subject="release 4", reason="again", evidence={})
    assert ledger.unproven("passed") == "passed was withdrawn: disagrees"
    assert ledger.withdrawn(["passed", "served", None]) == {"passed": "disagrees"}
    assert ledger.audit_rows(2)[1].detail == {"reason": "disagrees", "adapters": ["passed"], "of": 40}


def test_a_killed_updater_finds_its_update_again(ledger: Ledger) -> None:
    assert ledger.unfinished_update("clip") is None and not ledger.is_finished("u1")
    begin(ledger)
    begin(ledger)  # a restart begins the same update again
    assert len(ledger.updates()) == 1
    ledger.advance_update("u1", "trained", adapter="clip-a", cost={"steps": 5})
    found = ledger.unfinished_update("clip")
    assert found is not None
    assert (found.state, found.adapter, found.cost) == ("trained", "clip-a", {"steps": 5})
    assert not ledger.is_finished("u1")
    ledger.advance_update("u1", "done", cost={"gate": 1})
    assert ledger.unfinished_update("clip") is None and ledger.is_finished("u1")
    assert ledger.update("u1").cost == {"steps": 5, "gate": 1}
    with pytest.raises(LedgerError, match="u2"):
        ledger.advance_update("u2", "done")


def test_looks_count_verdicts_since_the_last_released_update(ledger: Ledger) -> None:
    for number in (1, 2):
        begin(ledger, f"u{number}")
        ledger.record_verdict(f"u{number}", f"clip-{number}", "rejected", "reports/x", {})
    assert _looked_at(ledger) == ["u1", "u2"], "what says nothing of it has spent"
    assert ledger.looks_since_release("vlm") == []
    for number, spent in ((3, False), (4, True), (5, False)):
        begin(ledger, f"u{number}")
        ledger.record_verdict(f"u{number}", f"clip-{number}", "inconclusive", "reports/x", {"spent": spent})
    assert _looked_at(ledger) == ["u1", "u2", "u4"]
    proposal = ledger.propose("update", clip="clip-5", vlm=None, actor="u", reason="r", update_id="u5")
    release(ledger, "clip-5", proposal=proposal.id)
    assert _looked_at(ledger) == []


def _looked_at(ledger: Ledger) -> list[str]:
    return [verdict.update_id for verdict in ledger.looks_since_release("clip")]


def test_an_adapter_name_is_never_reused(ledger: Ledger) -> None:
    ledger.register_adapter("clip-a", "clip", "base", "i1", "t1", {"rank": 8})
    assert ledger.register_adapter("clip-a", "clip", "base", "i1", "t1", {"rank": 8}).image_space == "i1"
    with pytest.raises(LedgerError, match="never reused"):
        ledger.register_adapter("clip-a", "clip", "base", "i2", "t1", {})
    with pytest.raises(LedgerError, match="clip-b"):
        ledger.adapter("clip-b")


def test_the_full_digest_of_an_adapter_is_recorded_once_and_stays(ledger: Ledger) -> None:
    first, second = "1" * 64, "2" * 64
    ledger.register_adapter("clip-old", "clip", "base", "i", "t", {})
    assert ledger.adapter_digests(["clip-old", None, "clip-none"]) == {}
    assert ledger.register_adapter("clip-old", "clip", "base", "i", "t", {}, digest=first).digest == first
    assert ledger.register_adapter("clip-old", "clip", "base", "i", "t", {}).digest == first
    with pytest.raises(LedgerError, match="another digest"):
        ledger.register_adapter("clip-old", "clip", "base", "i", "t", {}, digest=second)
    assert ledger.adapter_digests(["clip-old", None]) == {"clip-old": first}
