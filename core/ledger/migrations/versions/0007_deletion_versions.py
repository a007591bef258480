"""from which version of the sample store on a deletion has been carried out"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    with op.batch_alter_table("deletions") as table:
        table.add_column(sa.Column("removed_version", sa.BigInteger(), nullable=True))
