"""What happens when the model shall not answer: not understood, keypad, a person, a callback.

Keeps the facts of the call that policies ask for, asks them, and says which line is said. A transfer is announced
first; the REFER goes out, or the person is called, when the announcement was heard. What fails becomes a callback.
Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from agent.call_context import CallContext
from agent.events import CallPerson
from policies.decisions import EscalationDecision
from policies.engine import PolicyEngine
from policies.facts import CallFacts
from telephony import leg as tel

PROGRESS_EVERY_S = 6.0  # less than turn_taking.reprompt_after_s


@dataclass
class Escalation:
    context: CallContext
    policy: PolicyEngine
    facts: CallFacts
    refer_to: str = ""  # set when a person can be reached
    is_warm: bool = False  # the person is called and told first
    is_under_way: bool = False  # and no outcome yet
    has_callback: bool = False
    _told_at: float | None = None  # when the caller last heard that somebody is called
    _announcing: str = ""  # the turn that announces the transfer

    def line_for(self, text: str, confidence: float) -> str:
        """ "reply" when the caller was understood, else the line to say."""
        if text and confidence >= self.policy.config.min_confidence:
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
            self.context.keep("request_callback", reason=reason)
        return "transfer_failed"

    # -------------------------------------------------------------- the transfer

    def announce(self, turn_id: str) -> None:
        """This turn says that the caller is connected now."""
        self._announcing = turn_id

    def cut(self, turn_id: str) -> None:
        if self._announcing == turn_id:
            self._announcing = ""

    def heard(self, turn_id: str) -> None:
        if self._announcing == turn_id:
            self._announcing = ""
            self.refer()

    def refer(self) -> None:
        if self.is_under_way:  # the caller asked again while the person's telephone rings
            return
        self.is_under_way, self._told_at = True, None
        if self.is_warm:
            self.context.add(CallPerson(self.refer_to))
        else:
            self.context.add(tel.Refer(leg_id=self.context.leg_id, refer_to=self.refer_to))

    def is_progress_due(self, now: float) -> bool:
        """The exchange takes its time with our REFER, or the worker calls the target itself: not in silence. In a warm
        hand-off the shell says so (PersonRinging)."""
        if not self.is_under_way or self.is_warm:
            return False
        self._told_at = now if self._told_at is None else self._told_at
        if now - self._told_at < PROGRESS_EVERY_S:
            return False
        self._told_at = now
        return True

    def referred(self, event: tel.ReferResult) -> str:
        """The line to say; "" when the caller has been taken over."""
        self.is_under_way = False
        self.context.journal("refer_result", sip_status=event.sip_status, reason=event.reason)
        if 200 <= event.sip_status < 300:
            return ""
        return self.callback_line(f"transfer refused: {event.sip_status} {event.reason}")

    def left(self, event: tel.ReferResult) -> None:
        """The caller went before the outcome was told."""
        self.is_under_way = False
        self.context.journal("refer_result", sip_status=event.sip_status, reason=event.reason, target=self.refer_to)

    def _to_person(self, decision: EscalationDecision) -> str:
        if decision.action == "transfer" and decision.refer_to:
            self.refer_to, self.is_warm = decision.refer_to, decision.is_warm
            return "transfer_start"
        return self.callback_line("; ".join(decision.reasons))

    def _count_missed(self, num_missed: int) -> None:
        if num_missed != self.facts.num_turns_not_understood:
            self.facts = msgspec.structs.replace(self.facts, num_turns_not_understood=num_missed)

    def _decide(self) -> EscalationDecision:
        decision = self.policy.escalate(self.facts)
        self.context.journal("escalation", **msgspec.to_builtins(decision))
        return decision
