"""One queue of events per call, between whoever makes them and the one consumer that reads `events(call_id)`.

Used by the engine's shell, the socket client and the fake, so that ending, losing and re-opening a call mean the same
in all. Bounded: a consumer that lets `MAX_QUEUED_EVENTS` pile up loses its stream.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from minmo_runtime.api import RuntimeEvent, StreamFailed, StreamLost

MAX_QUEUED_EVENTS = 8192

_Item = RuntimeEvent | StreamLost | None  # None: the end


class EventQueues:
    """Not thread-safe: one event loop."""

    def __init__(self) -> None:
        self._queues: dict[str, asyncio.Queue[_Item]] = {}
        self._ended: set[str] = set()

    def open(self, call_id: str) -> None:
        """A new stream of this name; what an earlier one of the same name left unread stays with its own reader."""
        if call_id in self._ended:
            self._queues[call_id] = asyncio.Queue()
            self._ended.discard(call_id)

    def put(self, event: RuntimeEvent) -> bool:
        """False if the reader is too slow: the stream has ended with StreamFailed and must be closed by the caller."""
        if event.call_id in self._ended:
            return True
        queue = self._queue(event.call_id)
        if queue.qsize() >= MAX_QUEUED_EVENTS:
            reason = f"{MAX_QUEUED_EVENTS} events were not read"
            queue.put_nowait(StreamFailed(call_id=event.call_id, reason=reason))
            self.end(event.call_id)
            return False
        queue.put_nowait(event)
        if isinstance(event, StreamFailed):
            self.end(event.call_id)
        return True

    def end(self, call_id: str, lost: StreamLost | None = None) -> None:
        """No event follows; with `lost` the reader gets that error instead of a quiet end."""
        if call_id not in self._ended:
            self._queue(call_id).put_nowait(lost)
            self._ended.add(call_id)

    async def events(self, call_id: str) -> AsyncIterator[RuntimeEvent]:
        queue = self._queue(call_id)
        try:
            while (item := await queue.get()) is not None:
                if isinstance(item, StreamLost):
                    raise item
                yield item
        finally:
            if self._queues.get(call_id) is queue and call_id in self._ended:
                del self._queues[call_id]
                self._ended.discard(call_id)

    def _queue(self, call_id: str) -> asyncio.Queue[_Item]:
        return self._queues.setdefault(call_id, asyncio.Queue())
