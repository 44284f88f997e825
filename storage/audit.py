"""Who looked at what: an append-only table in which every row carries the hash of the one before it.

A changed, removed or inserted row breaks the chain at that place; `verify` finds it. A tail that was cut off whole
can only be noticed by whoever kept the last hash: `minmo db audit` prints it. Source: reliability.md §5.1 rule 5.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from storage.database import writing
from storage.tables import audit

FIRST_HASH = "0" * 64
MAX_ATTEMPTS = 5  # two processes may append at once; the unique previous_hash lets one win


@dataclass(frozen=True)
class AuditVerdict:
    num_rows: int
    last_hash: str
    broken_at_id: int | None  # first row that does not follow from the one before; None = whole


def _hash(previous: str, at: dt.datetime, actor: str, action: str, object_id: str, detail: Any) -> str:
    fields = [previous, at.astimezone(dt.UTC).isoformat(), actor, action, object_id, detail]
    return hashlib.sha256(json.dumps(fields, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def append_audit(
    engine: Engine, actor: str, action: str, *, now: dt.datetime, object_id: str = "", **detail: Any
) -> None:
    """Returns when the row is committed; raises when it is not, and then the action must not happen."""
    for attempt in range(MAX_ATTEMPTS):
        try:
            with writing(engine) as connection, connection.begin():
                newest = sa.select(audit.c.hash).order_by(audit.c.id.desc()).limit(1)
                previous = connection.execute(newest).scalar() or FIRST_HASH
                row = {"at": now, "actor": actor, "action": action, "object_id": object_id, "detail": detail}
                row |= {"previous_hash": previous, "hash": _hash(previous, now, actor, action, object_id, detail)}
                connection.execute(sa.insert(audit).values(row))
                return
        except sa.exc.IntegrityError:
            if attempt == MAX_ATTEMPTS - 1:
                raise


def verify_audit(engine: Engine) -> AuditVerdict:
    previous, num_rows = FIRST_HASH, 0
    with engine.connect() as connection:
        for row in connection.execute(sa.select(audit).order_by(audit.c.id)):
            expected = _hash(previous, row.at, row.actor, row.action, row.object_id, row.detail)
            if row.previous_hash != previous or row.hash != expected:
                return AuditVerdict(num_rows, previous, row.id)
            previous, num_rows = row.hash, num_rows + 1
    return AuditVerdict(num_rows, previous, None)
