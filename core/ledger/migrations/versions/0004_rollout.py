"""a release says which share of the requests it answers; an adapter can be withdrawn"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    for table in ("proposals", "releases"):
        op.add_column(table, sa.Column("share", sa.Double(), nullable=False, server_default="1"))
    op.add_column("proposals", sa.Column("forced", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("adapters", sa.Column("withdrawn", sa.Text(), nullable=True))
