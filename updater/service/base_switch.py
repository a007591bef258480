"""The release that changes the CLIP's base: an upgrade that passed the gate, or back to what the other base had.

Servers answer with the newest release of the base that they have (``base.clip``). So those of the old base go on as
they are, and those that are started with the new one answer with this release from their first request on.
"""

from __future__ import annotations

from dataclasses import dataclass

from core.artifacts import Artifacts
from core.digests import digest12
from core.errors import BaseModelError, ReleaseError
from core.ledger import Ledger, ReleaseRow
from core.progress import step
from core.settings import Settings
from serving.engines.clip import ClipEngine
from serving.engines.clip_base import ClipBase, digest_of, load_base
from updater.adapters.recorded import fetch_recorded


@dataclass(frozen=True)
class Switch:
    """What would be released."""

    live: ReleaseRow
    live_base: str
    base: ClipBase
    clip: str | None
    update_id: str | None
    """The upgrade that made the adapter; None: it goes back to an earlier release's."""


def plan_switch(settings: Settings, ledger: Ledger, name: str) -> Switch:
    """What a switch to the base ``name`` would release: the newest upgrade to it that passed the gate or, where there
    is none, the adapter of its newest plain release.

    Raises:
        BaseModelError: there is no such base, or it is live.
        ReleaseError: nothing of that base may be released, or something else has to be decided first.
    """
    base = load_base(settings.home, name)
    live = ledger.live()
    if live is None:
        raise ReleaseError("nothing is released yet.", f"Set base.clip={name} and start the server.")
    if not live.plain:
        raise ReleaseError(f"release {live.number} is on trial.", "Promote it or take it back first.")
    waiting = [each.id for each in ledger.pending_proposals() if each.family != "vlm"]
    if waiting:
        raise ReleaseError(f"proposal {waiting[0]} is not decided yet.", "Wait until it is released or has failed.")
    approved = ledger.approved_upgrade(base.digest)
    live_base = live.clip_base or (approved.old_base if approved else digest_of(settings.home, settings.base.clip))
    if live_base is None or live_base == base.digest:
        raise BaseModelError(f"release {live.number} has the base {name!r} already.", "See `ratchet releases list`.")
    if approved is not None:
        update = ledger.update(approved.update_id)
        if update.incumbent != live.clip:
            raise ReleaseError(
                f"{update.id} was judged against {update.incumbent or 'the base alone'}, and {live.clip or 'the base'} "
                "is live by now.",
                f"Drop it (`ratchet base upgrade {name} --cancel`) and upgrade again.",
            )
        return Switch(live, live_base, base, update.adapter, update.id)
    earlier = [row for row in ledger.newest_of_each_base() if row.clip_base == base.digest]
    if not earlier:
        raise ReleaseError(
            f"no upgrade to the base {name!r} has passed the gate, and it was never live.",
            f"Begin with `ratchet base upgrade {name}`.",
        )
    for adapter, why in ledger.withdrawn([earlier[0].clip]).items():
        raise ReleaseError(f"{adapter} was withdrawn: {why}", f"Upgrade again: `ratchet base upgrade {name}`.")
    return Switch(live, live_base, base, earlier[0].clip, None)


def switch_base(settings: Settings, name: str, *, actor: str, reason: str) -> ReleaseRow:
    """Load the base with its adapter here, look at golden inputs as an encoder would, and release it.

    Raises:
        AdapterError: it cannot be loaded; nothing was released.
        ReleaseConflict: something else was released meanwhile.
        BaseModelError, ReleaseError: see :func:`plan_switch`.
    """
    ledger = Ledger.open(settings.ledger)
    try:
        switch = plan_switch(settings, ledger, name)
        with step(f"loading base {name}"):
            engine = ClipEngine.of(settings, switch.base)
            if switch.clip is not None:
                engine.load(switch.clip, fetch_recorded(Artifacts(settings.artifacts), ledger, switch.clip))
            engine.golden(switch.clip)
        back = switch.update_id is None
        row = ledger.change_base(
            switch.live, clip=switch.clip, base=switch.base.digest, live_base=switch.live_base, rollback=back,
            actor=actor, reason=f"{reason} (base {name} {digest12(switch.base.digest)})", update_id=switch.update_id,
        )  # fmt: skip
        if back and settings.rollout.hold_after_rollback and ledger.held() is None:
            ledger.hold(actor, f"after the switch back to the base {name}: {reason}")
        return row
    finally:
        ledger.close()
