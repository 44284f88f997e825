"""Live views: the tail of the journal table as server-sent events (WHATWG HTML §9.2).

A view polls the database and holds nothing else, so the page's death harms no call, and a view that reconnects goes
on after the last id it saw. Rows arrive some 50 ms after they were acknowledged plus at most one poll.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from storage.search import CallReader

HEARTBEAT_S = 15.0  # proxies close silent streams after 30-60 s


class TooManyViews(Exception):
    """The bound on open streams is reached."""


class LiveTail:
    """Makes streams; counts them against their bound."""

    def __init__(self, reader: CallReader, *, poll_ms: int, max_views: int) -> None:
        self._reader = reader
        self._poll_s = poll_ms / 1_000
        self._max_views = max_views
        self.num_views = 0
        self.is_stopping = False

    def check_room(self) -> None:
        if self.num_views >= self._max_views:
            raise TooManyViews

    async def stream(
        self, *, call_id: str = "", after_id: int | None = None, is_allowed: Callable[[], bool] = lambda: True
    ) -> AsyncIterator[str]:
        """Events from after `after_id` (None: from now on), until `is_allowed` says no (the session ended)."""
        self.num_views += 1
        try:
            position = after_id if after_id is not None else await asyncio.to_thread(self._reader.last_journal_id)
            yield f"retry: 1000\nid: {position}\nevent: ready\ndata: {{}}\n\n"
            silent_s = 0.0
            while not self.is_stopping and is_allowed():
                rows = await asyncio.to_thread(self._reader.tail_journal, after_id=position, call_id=call_id)
                if rows:
                    position = rows[-1]["id"]
                    yield "".join(as_event(row) for row in rows)
                silent_s = 0.0 if rows else silent_s + self._poll_s
                if silent_s >= HEARTBEAT_S:
                    silent_s = 0.0
                    yield ": still here\n\n"
                await asyncio.sleep(self._poll_s)
        finally:
            self.num_views -= 1


def as_event(row: dict[str, Any]) -> str:
    """One journal row. JSON has no raw line breaks, so no text in it can start another event."""
    fields = {key: row[key] for key in ("call_id", "seq", "kind", "payload")}
    at: dt.datetime = row["at"]
    data = json.dumps({**fields, "at": at.isoformat()}, ensure_ascii=True)
    return f"id: {row['id']}\nevent: journal\ndata: {data}\n\n"
