"""Used call tokens: once each, over a restart, and no more of them than have not ended yet."""

from __future__ import annotations

import datetime as dt

import sqlalchemy as sa

from storage.calls import CallStore
from storage.config import StorageConfig
from storage.database import open_database
from storage.spent_tokens import spend_call_token
from storage.tables import spent_call_tokens


def test_a_token_is_spent_once_also_after_a_restart(store: CallStore, config: StorageConfig, now: dt.datetime) -> None:
    soon = now + dt.timedelta(seconds=60)
    assert spend_call_token(store.engine, "n" * 900, expires_at=soon, now=now)
    assert not spend_call_token(store.engine, "n" * 900, expires_at=soon, now=now)
    restarted = open_database(config)
    assert not spend_call_token(restarted, "n" * 900, expires_at=soon, now=now)
    assert spend_call_token(restarted, "another", expires_at=soon, now=now)
    restarted.dispose()


def test_what_has_ended_is_forgotten(store: CallStore, now: dt.datetime) -> None:
    for second in range(100):
        at = now + dt.timedelta(seconds=second)
        assert spend_call_token(store.engine, f"n{second}", expires_at=at + dt.timedelta(seconds=10), now=at)
    with store.engine.connect() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(spent_call_tokens)).scalar_one() == 10
