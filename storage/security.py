"""What strangers and broken peers tried, as rows: one for each kind and source an hour, with how often and when last.

Not part of any call: what is refused before there is a call leaves no call row. Bounded: `MAX_ROWS` at most, the oldest
go first, and a worker tells at most one event a minute for each kind and source (telephony/sip/gate.py). Written beside
the journal, straight into SQL: a lost row loses nobody's words. Texts are the sender's claim; whoever shows them
escapes them.
"""

from __future__ import annotations

import datetime as dt
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from storage.database import writing
from storage.tables import row_as_dict, security_events

SAME_EVENT = dt.timedelta(hours=1)
MAX_ROWS = 10_000
MAX_DETAIL_CHARS = 200


def note_security_event(
    engine: Engine, kind: str, source_address: str, *, now: dt.datetime, count: int = 1, detail: str = ""
) -> None:
    """Adds to the row of this kind and source, or begins one."""
    t = security_events.c
    with writing(engine) as connection, connection.begin():
        running = (
            sa.select(t.id)
            .where(t.kind == kind, t.source_address == source_address, t.last_at > now - SAME_EVENT)
            .order_by(t.id.desc())
            .limit(1)
        )
        row_id = connection.execute(running).scalar()
        if row_id is not None:
            more = {"last_at": now, "count": t.count + count}
            connection.execute(sa.update(security_events).where(t.id == row_id).values(more))
            return
        row = {"kind": kind, "source_address": source_address, "detail": detail[:MAX_DETAIL_CHARS], "count": count}
        connection.execute(sa.insert(security_events).values(row | {"first_at": now, "last_at": now}))
        newest_id = connection.execute(sa.select(sa.func.max(t.id))).scalar_one()
        connection.execute(sa.delete(security_events).where(t.id <= newest_id - MAX_ROWS))


class SecurityTail:
    """How often each kind was tried since it was last asked. Rows count on while they last, so what was counted of
    each is remembered: as many as there may be rows."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._counted: dict[int, int] = {}
        self._seen_until = dt.datetime.min.replace(tzinfo=dt.UTC)
        self._changed_rows()

    def new(self) -> dict[str, int]:
        """Kind -> how many more."""
        found: dict[str, int] = {}
        for kind, more in self._changed_rows():
            found[kind] = found.get(kind, 0) + more
        if len(self._counted) > 2 * MAX_ROWS:
            self._counted = dict(sorted(self._counted.items())[-MAX_ROWS:])
        return found

    def _changed_rows(self) -> list[tuple[str, int]]:
        t = security_events.c
        query = sa.select(t.id, t.kind, t.count.label("times"), t.last_at).where(t.last_at >= self._seen_until)
        found = []
        with self._engine.connect() as connection:
            for row in connection.execute(query):
                found.append((row.kind, row.times - self._counted.get(row.id, 0)))
                self._counted[row.id] = row.times
                self._seen_until = max(self._seen_until, row.last_at)
        return found


def list_security_events(
    engine: Engine, *, limit: int = 100, kind: str = "", since: dt.datetime | None = None
) -> list[dict[str, Any]]:
    """Latest first: id, kind, source_address, first_at, last_at, count, detail."""
    t = security_events.c
    query = sa.select(security_events).order_by(t.last_at.desc(), t.id.desc())
    if kind:
        query = query.where(t.kind == kind)
    if since is not None:
        query = query.where(t.last_at >= since)
    with engine.connect() as connection:
        return [row_as_dict(row) for row in connection.execute(query.limit(max(1, min(limit, MAX_ROWS))))]
