"""What a worker keeps out, as few enough events: for the port of SIP and for that of AudioSocket.

Time is an argument. What an event says of a sender's words is printable and cut; whoever shows it still escapes it.
"""

from __future__ import annotations

from collections.abc import Callable

from telephony.sip.trunk import clean
from telephony.wire import SecurityEvent

_EVENT_EVERY_S = 60.0
_MAX_SOURCES = 256  # remembered at once; a flood of forged sources becomes one event


class SecurityLog:
    """At most one event a minute for each kind and source; what came in between is told with the next one."""

    def __init__(self, notify: Callable[[SecurityEvent], None]) -> None:
        self._notify = notify
        self._told_at_s: dict[tuple[str, str], float] = {}
        self._untold: dict[tuple[str, str], int] = {}

    def note(self, kind: str, source: str, detail: str, now_s: float, count: int = 1) -> None:
        if (kind, source) not in self._told_at_s and len(self._told_at_s) >= _MAX_SOURCES:
            source, detail = "many", "more sources than are remembered"
        key = (kind, source)
        told_at_s = self._told_at_s.get(key)
        if told_at_s is not None and now_s - told_at_s < _EVENT_EVERY_S:
            self._untold[key] = self._untold.get(key, 0) + count
            return
        self._told_at_s[key] = now_s
        count += self._untold.pop(key, 0)
        self._notify(SecurityEvent(kind=kind, source_address=source, count=count, detail=clean(detail)[:120]))

    def on_time(self, now_s: float) -> None:
        """Tell what is still untold, and forget who was quiet for a minute."""
        for key, told_at_s in list(self._told_at_s.items()):
            if now_s - told_at_s < _EVENT_EVERY_S:
                continue
            del self._told_at_s[key]
            if count := self._untold.pop(key, 0):
                self.note(*key, "", now_s, count)
