"""a proposal says which adapters it sets"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("proposals", sa.Column("family", sa.String(length=16), nullable=False, server_default="clip"))
    # A first release and a rollback always set all that there was; updates and releases were of CLIP alone.
    op.execute("update proposals set family = 'both' where kind in ('initial', 'rollback')")
