"""the schema of the first version"""

import functools

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = None

TIME = sa.DateTime(timezone=True)
required = functools.partial(sa.Column, nullable=False)
optional = functools.partial(sa.Column, nullable=True)


def upgrade() -> None:
    op.create_table(
        "adapters",
        required("name", sa.String(64), primary_key=True),
        required("family", sa.String(16)),
        required("base", sa.String(64)),
        required("image_space", sa.String(64)),
        required("text_space", sa.String(64)),
        required("meta", sa.JSON()),
        required("created_at", TIME),
        optional("withdrawn", sa.Text()),
        optional("digest", sa.String(64)),
        optional("collected_at", TIME),
        optional("collected_bytes", sa.BigInteger()),
    )
    op.create_table(
        "api_keys",
        required("id", sa.String(16), primary_key=True),
        required("name", sa.String(64), unique=True),
        required("scopes", sa.JSON()),
        required("digest", sa.String(64)),
        optional("requests_per_minute", sa.Integer()),
        required("actor", sa.String(200)),
        required("created_at", TIME),
        optional("revoked_at", TIME),
        optional("last_used_at", TIME),
        optional("expires_at", TIME),
    )
    op.create_table(
        "audit",
        required("id", sa.Integer(), primary_key=True),
        required("actor", sa.String(200)),
        required("action", sa.String(64)),
        required("subject", sa.String(200)),
        required("detail", sa.JSON()),
        required("created_at", TIME),
    )
    op.create_table(
        "budget_bucket",
        required("id", sa.Integer(), primary_key=True, autoincrement=False),
        required("level", sa.Double()),
        required("refilled_at", sa.Double()),
    )
    op.create_table(
        "budget_charges",
        required("key", sa.String(100), primary_key=True),
        required("amount", sa.Double()),
        required("settled", sa.Boolean()),
        required("created_at", TIME),
    )
    op.create_table(
        "deletions",
        required("id", sa.String(300), primary_key=True),
        required("selector", sa.JSON()),
        required("state", sa.String(16)),
        required("actor", sa.String(200)),
        required("reason", sa.Text()),
        required("samples", sa.Integer()),
        required("refusals", sa.Integer()),
        required("adapters", sa.JSON()),
        optional("removed_version", sa.BigInteger()),
        optional("version", sa.BigInteger()),
        optional("update_id", sa.String(64)),
        required("requested_at", TIME),
        optional("removed_at", TIME),
        optional("held_at", TIME),
        optional("done_at", TIME),
        optional("remains", sa.Text()),
        optional("remains_until", TIME),
    )
    op.create_index("ix_deletions_state", "deletions", ["state"])
    op.create_table(
        "events",
        required("id", sa.Integer(), primary_key=True),
        required("event_id", sa.String(200), unique=True),
        required("type", sa.String(64)),
        required("subject", sa.String(300)),
        required("data", sa.JSON()),
        required("time", TIME),
        required("published", sa.Boolean()),
        optional("partition", sa.Integer()),
        optional("offset", sa.BigInteger()),
    )
    op.create_index("ix_events_published", "events", ["published", "id"])
    op.create_table(
        "feedback",
        required("id", sa.String(64), primary_key=True),
        required("caller", sa.String(200)),
        required("release", sa.Integer()),
        required("route", sa.String(16)),
        required("input", sa.String(64)),
        required("answered_at", TIME),
        required("verdict", sa.String(16)),
        required("detail", sa.JSON()),
        optional("state", sa.String(16)),
        optional("image", sa.LargeBinary()),
        optional("outcome", sa.String(300)),
        required("created_at", TIME),
    )
    op.create_index("ix_feedback_caller", "feedback", ["caller", "created_at"])
    op.create_index("ix_feedback_release", "feedback", ["release", "route"])
    op.create_index("ix_feedback_state", "feedback", ["state"])
    op.create_table(
        "holds",
        required("id", sa.Integer(), primary_key=True),
        required("actor", sa.String(200)),
        required("reason", sa.Text()),
        required("created_at", TIME),
        optional("resumed_at", TIME),
    )
    op.create_table(
        "leases",
        required("name", sa.String(100), primary_key=True),
        required("holder", sa.String(200)),
        required("epoch", sa.Integer()),
        required("expires_at", TIME),
    )
    op.create_table(
        "resubmissions",
        required("place", sa.String(300), primary_key=True),
        required("state", sa.String(16)),
        required("times", sa.Integer()),
        required("actor", sa.String(200)),
        required("reason", sa.Text()),
        required("updated_at", TIME),
    )
    op.create_table(
        "updates",
        required("id", sa.String(64), primary_key=True),
        required("family", sa.String(16)),
        required("state", sa.String(16)),
        required("recipe", sa.JSON()),
        required("seed", sa.Integer()),
        required("store_version", sa.Integer()),
        required("data_from", sa.JSON()),
        required("data_to", sa.JSON()),
        optional("incumbent", sa.String(64)),
        optional("adapter", sa.String(64)),
        required("cost", sa.JSON()),
        optional("error", sa.Text()),
        required("created_at", TIME),
        required("updated_at", TIME),
    )
    op.create_index("ix_updates_family", "updates", ["family"])
    op.create_table(
        "base_upgrades",
        required("update_id", sa.String(64), sa.ForeignKey("updates.id"), primary_key=True),
        required("old_base", sa.String(64)),
        required("old_name", sa.String(64)),
        required("new_base", sa.String(64)),
        required("new_name", sa.String(64)),
        required("gflops", sa.Double()),
        required("actor", sa.String(200)),
        required("created_at", TIME),
    )
    op.create_table(
        "proposals",
        required("id", sa.Integer(), primary_key=True),
        required("kind", sa.String(16)),
        required("family", sa.String(16), server_default="clip"),
        optional("clip", sa.String(64)),
        optional("vlm", sa.String(64)),
        required("actor", sa.String(200)),
        required("reason", sa.Text()),
        required("state", sa.String(16)),
        optional("error", sa.Text()),
        optional("release", sa.Integer()),
        optional("update_id", sa.String(64), sa.ForeignKey("updates.id"), unique=True),
        optional("expected_live", sa.Integer()),
        required("created_at", TIME),
        required("updated_at", TIME),
        required("share", sa.Double(), server_default="1"),
        required("forced", sa.Boolean(), server_default=sa.false()),
        optional("attempt", sa.String(32)),
    )
    op.create_index("ix_proposals_attempt", "proposals", ["attempt"], unique=True)
    op.create_index("ix_proposals_state", "proposals", ["state"])
    op.create_table(
        "verdicts",
        required("id", sa.Integer(), primary_key=True),
        required("update_id", sa.String(64), sa.ForeignKey("updates.id"), unique=True),
        required("adapter", sa.String(64)),
        required("outcome", sa.String(16)),
        required("report_key", sa.Text()),
        required("summary", sa.JSON()),
        required("created_at", TIME),
    )
    op.create_table(
        "releases",
        required("number", sa.Integer(), primary_key=True, autoincrement=False),
        optional("clip", sa.String(64)),
        optional("vlm", sa.String(64)),
        required("actor", sa.String(200)),
        required("reason", sa.Text()),
        optional("proposal_id", sa.Integer(), sa.ForeignKey("proposals.id")),
        required("created_at", TIME),
        required("share", sa.Double(), server_default="1"),
        optional("clip_base", sa.String(64)),
        optional("attempt", sa.String(32)),
    )
    op.create_index("ix_releases_attempt", "releases", ["attempt"], unique=True)
    op.create_table(
        "release_audits",
        required("id", sa.Integer(), primary_key=True),
        required("family", sa.String(16)),
        required("base", sa.String(64)),
        required("release", sa.Integer(), sa.ForeignKey("releases.number")),
        required("adapter", sa.String(64)),
        optional("reference", sa.String(64)),
        optional("reference_release", sa.Integer()),
        required("passed", sa.Boolean()),
        required("data_to", sa.JSON()),
        required("summary", sa.JSON()),
        required("created_at", TIME),
    )
