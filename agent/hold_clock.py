"""A call's own time: it stands still while the party is on hold, because nobody hears us then (RFC 3264 §8.4).

Everything that time decides in a call (silence, owed speech, fillers, the goodbye, the keypad) is told this time, so
none of it happens behind a caller's back, and it goes on at resume where it stood. What counts the whole call
(`max_call_s`) adds `held_s`. Whoever held whom. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class HoldClock:
    held_s: float = 0.0  # on hold so far, in all
    is_held: bool = False
    _asked_at: float = 0.0

    def at(self, real_now: float, is_held: bool | None = None) -> float:
        """The call's time at `real_now`. `is_held`: from now on the party is on hold, or is not."""
        if self.is_held:
            self.held_s += real_now - self._asked_at
        self._asked_at = real_now
        if is_held is not None:
            self.is_held = is_held
        return real_now - self.held_s
