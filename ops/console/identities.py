"""Who an identity provider says somebody is, and what that person may do: an API key that ends with the sign-in.

The server, the audit log and `ratchet keys` know keys alone, so a sign-in makes one: named after the person, with the
scopes of the settings, good for `console.session_hours`. Revoking it ends the session.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from typing import Any, Final

from core.errors import AccessError
from core.ledger import Ledger
from core.ledger.rows import KeyScope
from core.settings.identity import Oidc

READ: Final[tuple[KeyScope, ...]] = ("infer", "search")
ACT: Final[tuple[KeyScope, ...]] = (*READ, "publish", "operate")
ISSUER: Final = "ratchet"
"""Who made such a key, in the ledger."""
NAME_CHARS: Final = 50
MOST_GROUPS: Final = 50
GROUP_CHARS: Final = 200
"""Bounds of what an audit row tells of somebody's groups."""


def scopes_of(claims: Mapping[str, Any], rules: Oidc) -> tuple[KeyScope, ...]:
    """What the settings let somebody do; nothing where they name neither the person nor one of the groups.

    Raises:
        AccessError: the provider did not say who it is, or has not verified the address.
    """
    name, groups = person(claims, rules), groups_of(claims, rules)
    if name in rules.operators or not groups.isdisjoint(rules.operator_groups):
        return ACT
    reads = name in rules.readers or "*" in rules.readers or not groups.isdisjoint(rules.reader_groups)
    return READ if reads else ()


def person(claims: Mapping[str, Any], rules: Oidc) -> str:
    """The name by which settings and the audit log know somebody. Raises AccessError, see :func:`scopes_of`."""
    name = claims.get(rules.name_claim)
    if not isinstance(name, str) or not name.strip():
        raise AccessError(
            f"the provider sent no claim {rules.name_claim!r}.", "See console.oidc.name_claim and console.oidc.scope."
        )
    if rules.name_claim == "email" and claims.get("email_verified") is not True and not rules.trust_emails:
        raise AccessError(
            f"the provider does not say that it verified the address {name!r}.",
            "Verify it there, and sign in again. An operator can set console.oidc.trust_emails where users cannot "
            "choose their address, or another console.oidc.name_claim.",
        )
    return name.strip()


def issue_key(ledger: Ledger, claims: Mapping[str, Any], rules: Oidc, hours: float) -> str:
    """Make the key of one sign-in. Returns its token.

    Raises:
        AccessError: this person may not sign in; says why.
        LedgerUnavailable: the ledger is away.
    """
    name, scopes = person(claims, rules), scopes_of(claims, rules)
    if not scopes:
        came = ", ".join(sorted(groups_of(claims, rules))) or "none"
        raise AccessError(
            f"{name} may not use this console. Groups that the provider sent: {came}.",
            "An operator can name the person in console.oidc.readers, or a group in console.oidc.reader_groups.",
        )
    letters = re.sub(r"[^a-z0-9._@-]", "-", name.lower())[:NAME_CHARS].lstrip("._@-") or "somebody"
    row, token = ledger.create_key(f"{letters}.{secrets.token_hex(4)}", scopes, actor=ISSUER, days=hours / 24)
    groups = [each[:GROUP_CHARS] for each in sorted(groups_of(claims, rules))[:MOST_GROUPS]]
    detail = {"issuer": rules.issuer, "subject": str(claims.get("sub")), "groups": groups}
    ledger.audit(f"key:{row.name}", "sign in", "console", detail)
    return token


def end_key(ledger: Ledger, key_id: str | None) -> None:
    """Revoke a key that :func:`issue_key` made; one that somebody made with `ratchet keys` stays."""
    if any(row.id == key_id and row.actor == ISSUER for row in ledger.api_keys()):
        ledger.revoke_key(str(key_id), actor=ISSUER, reason="signed out")


def groups_of(claims: Mapping[str, Any], rules: Oidc) -> set[str]:
    """Groups of a person; Keycloak's begin with a slash unless its mapper leaves the path out."""
    value = claims.get(rules.groups_claim)
    values = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return {each for each in values if isinstance(each, str)}
