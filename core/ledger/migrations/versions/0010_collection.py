"""when the files of an adapter were collected, and how many bytes that freed"""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    op.add_column("adapters", sa.Column("collected_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("adapters", sa.Column("collected_bytes", sa.BigInteger(), nullable=True))
