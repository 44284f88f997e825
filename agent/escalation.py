"""What the agent says when the model shall not answer: not understood, keypad, a person, a callback.

Keeps the facts of the call that policies ask for, asks them, and remembers what must follow once the line was heard.
Pure.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from agent.events import Keep
from policies.decisions import EscalationDecision
from policies.engine import PolicyEngine
from policies.facts import CallFacts


@dataclass
class Escalation:
    policy: PolicyEngine
    facts: CallFacts
    min_confidence: float
    refer_to: str = ""  # set when a transfer was announced
    has_callback: bool = False
    kept: list[Keep] = field(default_factory=list)  # to be taken by the call

    def line_for(self, text: str, confidence: float) -> str:
        """ "reply" when the caller was understood, else the line to say."""
        if text and confidence >= self.min_confidence:
            self._count_missed(0)
            return "reply"
        self._count_missed(self.facts.num_turns_not_understood + 1)
        decision = self._decide()
        if decision.action == "offer_keypad":
            return "offer_keypad"
        return "not_understood" if decision.action == "none" else self._to_person(decision)

    def person_line(self) -> str:
        """The caller asked for a person: the line to say; `refer_to` is set if one can be reached."""
        self.facts = msgspec.structs.replace(self.facts, caller_asked_for_person=True)
        return self._to_person(self._decide())

    def callback_line(self, reason: str) -> str:
        """Nobody can be reached: a callback is promised and stored."""
        if not self.has_callback:
            self.has_callback = True
            self.kept.append(Keep("request_callback", {"reason": reason}))
        return "transfer_failed"

    def take_kept(self) -> list[Keep]:
        kept, self.kept = self.kept, []
        return kept

    def _to_person(self, decision: EscalationDecision) -> str:
        if decision.action == "transfer" and decision.refer_to:
            self.refer_to = decision.refer_to
            return "transfer_start"
        return self.callback_line("; ".join(decision.reasons))

    def _count_missed(self, num_missed: int) -> None:
        if num_missed != self.facts.num_turns_not_understood:
            self.facts = msgspec.structs.replace(self.facts, num_turns_not_understood=num_missed)

    def _decide(self) -> EscalationDecision:
        decision = self.policy.escalate(self.facts)
        self.kept.append(Keep("journal_append", {"name": "escalation", **msgspec.to_builtins(decision)}))
        return decision
