"""One outbound call on its way: which of its routes is tried now, and when the next one is.

A route is given up when its host answers 408 or 5xx, or nothing at all for the trunk's `failover_s` (RFC 3263 §4.3);
any other refusal is the called party's and is final. Plain state; told by the endpoint, time is an argument.
"""

from __future__ import annotations

from telephony.sip.trunk import Route, is_for_next_host
from telephony.wire import PlaceCall


class OutboundAttempt:
    """Owned by the endpoint until one route is answered or the last has failed."""

    def __init__(self, request: PlaceCall, routes: list[Route], now_s: float) -> None:
        self.request = request
        self._routes = routes
        self._index = 0
        self._since_s = now_s
        self.has_answer = False  # the present host said something, if only 100 Trying
        self.tried: list[str] = []  # "host: status", for the record

    @property
    def route(self) -> Route:
        return self._routes[self._index]

    @property
    def has_next(self) -> bool:
        return self._index + 1 < len(self._routes)

    def is_stuck(self, now_s: float) -> bool:
        """Nobody is there, and there is somebody else to ask."""
        trunk = self.route.trunk
        return self.has_next and not self.has_answer and trunk is not None and now_s - self._since_s > trunk.failover_s

    def goes_on_after(self, sip_status: int) -> bool:
        return self.has_next and is_for_next_host(sip_status)

    def next(self, sip_status: int, now_s: float) -> Route:
        self.tried.append(f"{self.route.uri}: {sip_status or 'no answer'}")
        self._index += 1
        self._since_s, self.has_answer = now_s, False
        return self.route
