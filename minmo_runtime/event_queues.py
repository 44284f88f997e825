"""One queue of events per call, between whoever makes them and the one consumer that reads `events(call_id)`.

Used by the engine's shell, the socket client and the fake, so that ending, losing and re-opening a call mean the same
in all. Bounded: a consumer that lets `MAX_QUEUED_EVENTS` or `MAX_QUEUED_BYTES` pile up loses its stream. Whoever stops
reading before the end gives up the rest: nothing is kept for a reader that is gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from minmo_runtime.api import AudioDelta, RuntimeEvent, StreamFailed, StreamLost

MAX_QUEUED_EVENTS = 8192
MAX_QUEUED_BYTES = 4 << 20  # of audio: a minute and a half at 24 kHz, where an engine is at most seconds ahead

_Item = RuntimeEvent | StreamLost | None  # None: the end


class _Queue(asyncio.Queue[_Item]):
    num_bytes = 0  # of audio that waits


class EventQueues:
    """Not thread-safe: one event loop."""

    def __init__(self) -> None:
        self._queues: dict[str, _Queue] = {}
        self._ended: set[str] = set()  # their end waits in the queue
        self._left: set[str] = set()  # nobody reads them any more; until their end, what comes is dropped

    @property
    def names(self) -> frozenset[str]:
        """Calls of which something is kept."""
        return frozenset(self._queues) | self._ended | self._left

    def open(self, call_id: str) -> None:
        """A new stream of this name; what an earlier one of the same name left unread stays with its own reader."""
        self._left.discard(call_id)
        if call_id in self._ended:
            self._queues[call_id] = _Queue()
            self._ended.discard(call_id)

    def put(self, event: RuntimeEvent) -> bool:
        """False if the reader is too slow: the stream has ended with StreamFailed and must be closed by the caller."""
        if event.call_id in self._left:
            if isinstance(event, StreamFailed):
                self._left.discard(event.call_id)
            return True
        if event.call_id in self._ended:
            return True
        queue = self._queue(event.call_id)
        if queue.qsize() >= MAX_QUEUED_EVENTS or queue.num_bytes + _audio_bytes(event) > MAX_QUEUED_BYTES:
            reason = f"{queue.qsize()} events with {queue.num_bytes} bytes of audio were not read"
            queue.put_nowait(StreamFailed(call_id=event.call_id, reason=reason))
            self.end(event.call_id)
            return False
        queue.put_nowait(event)
        queue.num_bytes += _audio_bytes(event)
        if isinstance(event, StreamFailed):
            self.end(event.call_id)
        return True

    def end(self, call_id: str, lost: StreamLost | None = None) -> None:
        """No event follows; with `lost` the reader gets that error instead of a quiet end."""
        if call_id in self._left:
            self._left.discard(call_id)
        elif call_id not in self._ended:
            self._queue(call_id).put_nowait(lost)
            self._ended.add(call_id)

    def leave(self, call_id: str) -> None:
        """Nobody will read it, or read on."""
        self._queues.pop(call_id, None)
        if call_id in self._ended:
            self._ended.discard(call_id)
        else:
            self._left.add(call_id)

    async def events(self, call_id: str) -> AsyncIterator[RuntimeEvent]:
        queue = self._queue(call_id)
        try:
            while (item := await queue.get()) is not None:
                queue.num_bytes -= _audio_bytes(item)
                if isinstance(item, StreamLost):
                    raise item
                yield item
        finally:
            if self._queues.get(call_id) is queue:
                self.leave(call_id)

    def _queue(self, call_id: str) -> _Queue:
        return self._queues.setdefault(call_id, _Queue())


def _audio_bytes(item: _Item) -> int:
    return len(item.pcm) if isinstance(item, AudioDelta) else 0
