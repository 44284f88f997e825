"""Which call tokens were used: one row each until the token ends by itself, so a restart makes none of them new.

The nonce is another server's text, so its hash is kept. The table holds no more than what was used within a token's
longest life: whoever adds a row takes away those that have ended.
"""

from __future__ import annotations

import datetime as dt
import hashlib

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from storage.database import insert_new, writing
from storage.tables import spent_call_tokens


def spend_call_token(engine: Engine, nonce: str, *, expires_at: dt.datetime, now: dt.datetime) -> bool:
    """True once for each nonce; committed when it returns."""
    row = {"nonce_sha256": hashlib.sha256(nonce.encode()).hexdigest(), "expires_at": expires_at}
    with writing(engine) as connection, connection.begin():
        connection.execute(sa.delete(spent_call_tokens).where(spent_call_tokens.c.expires_at <= now))
        return insert_new(connection, spent_call_tokens, row)
