"""Everything a call knows before its first event. Made by the agent process, read by agent/call.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from agent.floor import TurnTakingConfig
from agent.prompts.lines import CallLines
from policies.engine import PolicyEngine
from policies.facts import CallFacts

# Lines that are played from audio made before the call: they must be heard whatever the engine is doing.
CACHED_PURPOSES = frozenset({"notice", "notice_without_recording", "apology", "filler", "engine_lost"})


@dataclass(frozen=True, kw_only=True)
class CallSetup:
    """Everything a call knows before its first event."""

    call_id: str
    leg_id: str
    sample_rate_hz: int
    facts: CallFacts
    policy: PolicyEngine
    lines: CallLines
    order_digits: int
    tools: tuple[str, ...]
    turn_taking: TurnTakingConfig = field(default_factory=TurnTakingConfig)
    digit_timeout_s: float = 4.0
    send_keys_cooldown_s: float = 3.0
    rendered: Mapping[str, bytes] = field(default_factory=dict)  # sentence -> audio made before the call
    rendered_rate_hz: int = 24_000
    seed: int = 0

    @property
    def greeting(self) -> str:
        """Key of the first line after the notice."""
        return "outbound_greeting" if self.facts.direction == "outbound" else "greeting"

    def floor_rules(self) -> TurnTakingConfig:
        """The operator's turn taking, with the manner of the campaign over it."""
        values: dict[str, Any] = {**self.policy.duplex(self.facts).values}
        return replace(self.turn_taking, **values)
