"""How much of one source, and of all together, a worker looks at. Pure arithmetic; time is an argument.

A flood of one listed source must not keep another from calling, so each has a bucket of its own (RFC 3261 gives whoever
is dropped its retransmissions, §17.1.1.2), and the total comes second.
"""

from __future__ import annotations

from collections import Counter, OrderedDict

_BURST = 8
_MAX_SOURCES = 1024  # remembered at once; the one not heard for longest is forgotten, its bucket is full again


class TokenBucket:
    """So many at once, so many a second."""

    def __init__(self, per_s: float, burst: int) -> None:
        self._per_s, self._burst = per_s, burst
        self._tokens, self._at_s = float(burst), 0.0

    def take(self, now_s: float) -> bool:
        self._tokens = min(self._burst, self._tokens + (now_s - self._at_s) * self._per_s)
        self._at_s = now_s
        if self._tokens < 1 - 1e-9:
            return False
        self._tokens -= 1
        return True


class SourceBuckets:
    """One bucket a source."""

    def __init__(self, per_s: float, burst: int) -> None:
        self._per_s, self._burst = per_s, burst
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()

    def take(self, source: str, now_s: float) -> bool:
        bucket = self._buckets.get(source)
        if bucket is None:
            bucket = self._buckets[source] = TokenBucket(self._per_s, self._burst)
            if len(self._buckets) > _MAX_SOURCES:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(source)
        return bucket.take(now_s)


class Floods:
    """What is dropped unanswered, and a count of it for each source until somebody takes it."""

    def __init__(self, invites_per_s: int, source_invites_per_s: int, source_requests_per_s: int) -> None:
        self._all_invites = TokenBucket(invites_per_s, min(2 * _BURST, invites_per_s))
        self._invites = SourceBuckets(source_invites_per_s, min(_BURST, source_invites_per_s))
        self._requests = SourceBuckets(source_requests_per_s, source_requests_per_s)
        self._dropped: Counter[str] = Counter()

    def may_be_read(self, source: str, now_s: float) -> bool:
        """Any request, before a word of it is read."""
        return self._counted(source, self._requests.take(source, now_s))

    def may_call(self, source: str, now_s: float) -> bool:
        """A new INVITE. One source takes no more of the total than its own share."""
        return self._counted(source, self._invites.take(source, now_s) and self._all_invites.take(now_s))

    def _counted(self, source: str, is_let_through: bool) -> bool:
        if not is_let_through and (source in self._dropped or len(self._dropped) < _MAX_SOURCES):
            self._dropped[source] += 1
        return is_let_through

    def take_dropped(self) -> dict[str, int]:
        dropped, self._dropped = self._dropped, Counter()
        return dict(dropped)
