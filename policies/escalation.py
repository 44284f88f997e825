"""When the agent stops trying alone: keypad first, then a person; a caller who asks for a person is never argued with.

The target of a transfer is configuration (the campaign's, else `handoff.uri`). Without one, and on a line that cannot
be transferred, the caller is told so and a callback request is stored: the agent must not promise what cannot happen.
"""

from __future__ import annotations

from policies.config import PoliciesConfig
from policies.decisions import EscalationDecision
from policies.facts import CallFacts


def decide_escalation(
    facts: CallFacts, config: PoliciesConfig, handoff_uri: str, is_warm: bool = False, has_numbers: bool = True
) -> EscalationDecision:
    """`handoff_uri` "" = nobody to transfer to. `is_warm`: the person is told first. `has_numbers`: the line has order
    numbers, without them there is nothing to type.
    """
    if facts.caller_asked_for_person:
        return _to_person(facts, handoff_uri, is_warm, "caller asked for a person")
    missed = facts.num_turns_not_understood
    if missed >= config.person_after_turns:
        reason = f"{missed} turns not understood (person after {config.person_after_turns})"
        return _to_person(facts, handoff_uri, is_warm, reason)
    if missed >= config.keypad_after_turns and has_numbers:
        reason = f"{missed} turns not understood (keypad after {config.keypad_after_turns})"
        return EscalationDecision(action="offer_keypad", reasons=(reason,))
    return EscalationDecision(action="none")


def _to_person(facts: CallFacts, handoff_uri: str, is_warm: bool, reason: str) -> EscalationDecision:
    if not facts.can_transfer:
        return EscalationDecision(action="callback_request", reasons=(reason, "this line cannot be transferred"))
    if handoff_uri:
        return EscalationDecision(action="transfer", refer_to=handoff_uri, is_warm=is_warm, reasons=(reason,))
    return EscalationDecision(action="callback_request", reasons=(reason, "handoff.uri is not set"))
