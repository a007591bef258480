"""what a bucket keeps of deleted samples, and until when"""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    op.add_column("deletions", sa.Column("held_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("deletions", sa.Column("remains", sa.Text(), nullable=True))
    op.add_column("deletions", sa.Column("remains_until", sa.DateTime(timezone=True), nullable=True))
