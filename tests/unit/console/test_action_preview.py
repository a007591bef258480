"""An action says what it will do before it does it, and what it cannot do it does not offer."""

from __future__ import annotations

from pathlib import Path

from core.ledger import Ledger
from core.ledger.collection import COLLECT_LEASE
from ops.console.action_preview import ActionPreview, Choice, preview
from ops.console.timeline import timeline
from tests.support.story import Story, tell
from tests.unit.console.test_pages import settings


def release(ledger: Ledger, *adapters: tuple[str | None, str | None]) -> None:
    """Releases of (clip, vlm), one after the other."""
    for clip, vlm in adapters:
        live = ledger.live()
        number = (live.number if live else 0) + 1
        ledger.commit_release(number, clip=clip, vlm=vlm, actor="test", reason=f"number {number}", proposal_id=None)


def told(found: ActionPreview) -> str:
    return " ".join(found.happens)


def test_a_rollback_names_both_models_and_how_long_it_takes(ledger: Ledger) -> None:
    release(ledger, (None, None), ("clip-a", "vlm-a"), ("clip-b", "vlm-a"))
    found = preview(ledger, "rollback", Choice(), resident={3: {}, 2: {}})
    assert (found.live, found.possible) == (3, True)
    assert "The CLIP changes from clip-b to clip-a." in found.happens
    assert "The VLM stays as it is (vlm-a)." in found.happens
    assert "less than a second" in told(found)
    assert [row.number for row in found.targets] == [2, 1]
    far = preview(ledger, "rollback", Choice.of("1", "", "", ""), resident={3: {}, 2: {}})
    assert "from vlm-a to the base alone" in told(far) and "not loaded any more" in told(far)


def test_a_rollback_of_one_model_leaves_the_other(ledger: Ledger) -> None:
    release(ledger, ("clip-a", "vlm-a"), ("clip-b", "vlm-a"), ("clip-b", "vlm-b"))
    found = preview(ledger, "rollback", Choice.of("", "clip", "", ""), resident={})
    assert "The CLIP changes from clip-b to clip-a." in found.happens
    assert "The VLM stays as it is (vlm-b)." in found.happens


def test_what_cannot_be_rolled_back_is_not_offered(ledger: Ledger) -> None:
    assert not preview(ledger, "rollback", Choice(), resident={}).possible
    release(ledger, (None, None))
    found = preview(ledger, "rollback", Choice(), resident={})
    assert not found.possible and "no release before 1" in told(found)
    release(ledger, (None, None))
    assert not preview(ledger, "rollback", Choice.of("1", "", "", ""), resident={}).possible, "it serves the same"


def test_releasing_what_the_gate_rejected_warns(ledger: Ledger, tmp_path: Path) -> None:
    story: Story = tell(settings(tmp_path), tmp_path / "made")
    release(ledger, (story.adapter, None))
    assert not preview(ledger, "release", Choice(), resident={}).possible
    bad = preview(ledger, "release", Choice(clip="clip-ba9876543210"), resident={})
    assert bad.possible and bad.warnings == ("The gate rejected this adapter: clip-ba9876543210.",)
    base = preview(ledger, "release", Choice(clip="base"), resident={})
    assert base.warnings == () and f"from {story.adapter} to the base alone" in told(base)
    assert not preview(ledger, "release", Choice(clip=story.adapter), resident={}).possible
    assert dict(base.adapters["clip"]) == {story.adapter: "passed", "clip-ba9876543210": "rejected"}


def test_hold_and_resume_tell_who_held_and_what_waits(ledger: Ledger) -> None:
    release(ledger, (None, None))
    assert preview(ledger, "hold", Choice(), resident={}).possible
    assert not preview(ledger, "resume", Choice(), resident={}).possible
    ledger.hold("ana", "launch")
    again = preview(ledger, "hold", Choice(), resident={})
    assert not again.possible and "by ana: launch" in told(again)
    assert "No update waits" in told(preview(ledger, "resume", Choice(), resident={}))
    for number in range(2):
        update = f"update-{number}"
        ledger.begin_update(
            update, family="clip", recipe={}, seed=0, store_version=0, data_from={}, data_to={}, incumbent=None
        )
        ledger.propose("update", clip=f"clip-{number}", actor="updater", reason="passed", update_id=update)
    assert "2 updates wait" in told(preview(ledger, "resume", Choice(), resident={}))


def test_nonsense_in_a_form_counts_as_not_said() -> None:
    for text in ("", "x", "-1", "0", "١", "1e3"):
        assert Choice.of(text, "both", " ", "").to is None
    choice = Choice.of("3", "vlm", " clip-a ", "")
    assert (choice.to, choice.family, choice.adapters) == (3, "vlm", {"clip": "clip-a"})
    assert choice.query == "to=3&family=vlm&clip=clip-a"


def test_an_adapter_whose_files_were_collected_is_shown_as_such_and_not_offered(ledger: Ledger) -> None:
    for name in ("clip-a", "clip-b"):
        ledger.register_adapter(name, "clip", "b" * 64, "i", "t", {})
    release(ledger, (None, None), ("clip-a", None), ("clip-b", None))
    epoch = ledger.acquire_lease(COLLECT_LEASE, "test", 60)
    assert epoch is not None
    ledger.begin_collection({"clip-a": "old"}, live=3, epoch=epoch, actor="test")
    ledger.finish_collection({"clip-a": 10})
    collected = {entry.row.number: [bool(each.collected) for each in entry.changes] for entry in timeline(ledger, {})}
    assert collected == {3: [False], 2: [True], 1: []}
    found = preview(ledger, "rollback", Choice.of("2", "", "", ""), resident={})
    assert not found.possible
    assert "clip-a were collected" in told(found)
    offered = preview(ledger, "release", Choice(), resident={}).adapters["clip"]
    assert "clip-a" not in dict(offered)
