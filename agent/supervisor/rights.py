"""What a handler asks before it acts (has the person who is signed in this right?) and writes (who looked at what)."""

from __future__ import annotations

import datetime as dt
from collections import OrderedDict
from collections.abc import Callable

from fastapi import HTTPException, Request

from agent.supervisor.auth import Person, Right
from storage.audit import append_audit
from storage.search import CallReader

AUDIT_AGAIN_S = 600.0  # the console asks for the same again and again: one view, not hundreds
MAX_REMEMBERED = 10_000


def person_with(request: Request, right: Right) -> Person:
    """The person; 403 that names the missing right. The guard has let nobody else in."""
    person: Person | None = request.state.person
    if person is None:
        raise HTTPException(401, "sign in first")
    if right not in person.rights:
        raise HTTPException(403, f"{person.name} does not have the right {right}; minmo access gives it")
    return person


class Auditor:
    """Writes who looked at what, once per person, object and AUDIT_AGAIN_S."""

    def __init__(self, reader: CallReader, clock: Callable[[], dt.datetime]) -> None:
        self._reader = reader
        self._clock = clock
        self._last: OrderedDict[tuple[str, str, str, str], dt.datetime] = OrderedDict()

    def note(self, request: Request, action: str, object_id: str = "", **detail: object) -> None:
        """Committed when it returns; raises when it is not, and then nothing may be shown."""
        now, actor = self._clock(), request.state.person.name
        key = (actor, action, object_id, repr(detail))
        last = self._last.get(key)
        if last is not None and (now - last).total_seconds() < AUDIT_AGAIN_S:
            return
        append_audit(self._reader.engine, actor, action, now=now, object_id=object_id, **detail)
        self._last[key] = now
        self._last.move_to_end(key)
        while len(self._last) > MAX_REMEMBERED:
            self._last.popitem(last=False)
