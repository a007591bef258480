"""a commit can be found by its attempt; the full digest of an adapter"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    for table in ("proposals", "releases"):
        op.add_column(table, sa.Column("attempt", sa.String(32), nullable=True))
        op.create_index(f"ix_{table}_attempt", table, ["attempt"], unique=True)
    op.add_column("adapters", sa.Column("digest", sa.String(64), nullable=True))
