"""Keys that the agent presses on the caller's line: a menu that has answered, a door, an extension. With a pause after
each row, because a model that hears a menu again presses again (users.md L16). Pure; time is an argument.
"""

from __future__ import annotations

from dataclasses import dataclass

KEY_S = 0.2  # a key and the gap behind it take no longer, by any method


@dataclass
class KeySender:
    cooldown_s: float
    _ready_at: float = float("-inf")

    def is_ready(self, now: float) -> bool:
        return now >= self._ready_at

    def sent(self, keys: str, now: float) -> None:
        self._ready_at = now + len(keys) * KEY_S + self.cooldown_s
