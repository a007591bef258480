"""a release names the base of its CLIP; upgrades to another base"""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    op.add_column("releases", sa.Column("clip_base", sa.String(64), nullable=True))
    op.execute(
        "update releases set clip_base = (select base from adapters where adapters.name = releases.clip)"
        " where clip is not null"
    )
    op.create_table(
        "base_upgrades",
        sa.Column("update_id", sa.String(64), sa.ForeignKey("updates.id"), primary_key=True),
        sa.Column("old_base", sa.String(64), nullable=False),
        sa.Column("old_name", sa.String(64), nullable=False),
        sa.Column("new_base", sa.String(64), nullable=False),
        sa.Column("new_name", sa.String(64), nullable=False),
        sa.Column("gflops", sa.Double(), nullable=False),
        sa.Column("actor", sa.String(200), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
    )
