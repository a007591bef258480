"""when a key expires; keys that could search before have the scope that searches need now"""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"

KEYS = sa.table("api_keys", sa.column("id", sa.String), sa.column("scopes", sa.JSON))


def upgrade() -> None:
    op.add_column("api_keys", sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True))
    connection = op.get_bind()
    for key_id, has in connection.execute(sa.select(KEYS.c.id, KEYS.c.scopes)).all():
        if "infer" in has:
            scopes = ["infer", "search", *(each for each in has if each not in ("infer", "search"))]
            connection.execute(sa.update(KEYS).where(KEYS.c.id == key_id).values(scopes=scopes))
