"""Settings of the policies: section `[policies]` of config.toml.

Frozen and checked once at start; the island receives it in a constructor and never sees the file.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PoliciesConfig:
    campaigns_dir: str = ""
    """Folder of campaign TOML files; empty = the packs shipped in policies/campaigns."""

    default_campaign: str = ""
    """Campaign (file name without .toml) for a dialled number that none lists; empty = such a call gets 404."""

    keypad_after_turns: int = 2
    """Turns not understood in a row after which the agent offers the keypad, 1-10."""

    person_after_turns: int = 4
    """Turns not understood in a row after which the agent offers a person; more than keypad_after_turns, at most 20."""

    min_confidence: float = 0.35
    """Mean posterior of a caller's words under which the turn counts as not understood, 0-1; not calibrated on people:
    with nano most misheard turns of people lie above it."""

    retry_after_s: int = 20
    """Retry-After of a 503 when every place is taken, 1-3600 s (RFC 3261 section 20.33)."""

    def __post_init__(self) -> None:
        if not 1 <= self.keypad_after_turns <= 10:
            raise ValueError(f"policies.keypad_after_turns = {self.keypad_after_turns}: must be 1 to 10")
        if not self.keypad_after_turns < self.person_after_turns <= 20:
            raise ValueError(
                f"policies.person_after_turns = {self.person_after_turns}: "
                f"must be more than policies.keypad_after_turns ({self.keypad_after_turns}) and at most 20"
            )
        if not 0 <= self.min_confidence <= 1:
            raise ValueError(f"policies.min_confidence = {self.min_confidence}: must be 0 to 1")
        if not 1 <= self.retry_after_s <= 3600:
            raise ValueError(f"policies.retry_after_s = {self.retry_after_s}: must be 1 to 3600")
