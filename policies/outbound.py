"""May this campaign call this party, and how: numbers by prefix, trunks in order, our number as it is shown; and what
follows when it is no person who answers.

Closed by default: a campaign without an `[outbound]` table calls nobody, and one without prefixes no number. Which
hosts a SIP URI may have is the operator's (`telephony.outbound_hosts`), on top of this.
"""

from __future__ import annotations

import re
from collections.abc import Collection

import msgspec

from policies.decisions import AnswerDecision, OutboundDecision

_NUMBER = re.compile(r"\+?[0-9*#]{1,32}")
_PREFIX = re.compile(r"\+?[0-9]{0,15}")
_CALLER_ID = re.compile(r"[+0-9A-Za-z._-]{0,64}")
# What may be done when this has answered; who answered: agent/answered_by.py.
ANSWER_ACTIONS: dict[str, tuple[str, ...]] = {
    "voicemail": ("hang_up", "leave_message"),
    "call_screener": ("answer", "hang_up"),
    "ivr": ("hang_up", "go_on"),
    "carrier_message": ("hang_up",),
}
VOICEMAIL_LINE = "voicemail_message"  # key of the sentence that is left behind: only the campaign can know it


class OutboundRules(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Table `[outbound]` of a campaign."""

    prefixes: tuple[str, ...] = ()  # numbers that begin so may be called, e.g. "+39"
    is_uri_allowed: bool = False  # also sip: addresses, at hosts of telephony.outbound_hosts
    trunks: tuple[str, ...] = ()  # names of telephony.trunks, best first; () = all, in their order
    caller_id: str = ""  # our number as shown; "" = the trunk's
    display_name: str = ""
    on_voicemail: str = "hang_up"  # hang_up | leave_message (lines.voicemail_message, after the beep)
    on_call_screener: str = "answer"  # answer (lines.screener_reply: who calls and why) | hang_up
    on_ivr: str = "hang_up"  # hang_up | go_on (as with a person)
    on_carrier_message: str = "hang_up"  # hang_up: number not in service, party not reachable


def outbound_faults(rules: OutboundRules | None, lines: Collection[str] = ()) -> list[str]:
    """Every reason why these rules cannot be used. `lines`: keys of the sentences in the campaign's own words."""
    if rules is None:
        return []
    faults = [
        f"outbound.prefixes: {prefix!r}: must be + and digits"
        for prefix in rules.prefixes
        if not _PREFIX.fullmatch(prefix) or prefix in ("", "+")
    ]
    if not _CALLER_ID.fullmatch(rules.caller_id):
        faults.append(f"outbound.caller_id = {rules.caller_id!r}: must be a number or the user part of a SIP address")
    if not rules.prefixes and not rules.is_uri_allowed:
        faults.append("outbound: must have prefixes or is_uri_allowed, else leave the table out")
    for kind, allowed in ANSWER_ACTIONS.items():
        value = getattr(rules, f"on_{kind}")
        if value not in allowed:
            faults.append(f"outbound.on_{kind} = {value!r}: must be {' or '.join(allowed)}")
    if rules.on_voicemail == "leave_message" and VOICEMAIL_LINE not in lines:
        faults.append(f"outbound.on_voicemail = 'leave_message': needs lines.{VOICEMAIL_LINE}, what is to be said")
    return faults


def decide_answer(rules: OutboundRules | None, kind: str) -> AnswerDecision:
    """What to do now that `kind` (of ANSWER_ACTIONS) has answered."""
    action = getattr(rules or OutboundRules(), f"on_{kind}")
    return AnswerDecision(action=action, reasons=(f"outbound.on_{kind} = {action}",))


def decide_outbound(rules: OutboundRules | None, number: str, uri: str) -> OutboundDecision:
    """Exactly one of `number` and `uri` is given."""
    if rules is None:
        return _refused("the campaign has no [outbound] table")
    if bool(number) == bool(uri):
        return _refused("exactly one of number and uri must be given")
    if uri and not rules.is_uri_allowed:
        return _refused("outbound.is_uri_allowed is false")
    if number and not _NUMBER.fullmatch(number):
        return _refused("the number must be + and digits, * or #")
    if number and not any(number.startswith(prefix) for prefix in rules.prefixes):
        return _refused(f"no prefix of outbound.prefixes ({', '.join(rules.prefixes) or 'none'}) fits {number}")
    reason = "a sip: address is allowed" if uri else f"{number} fits outbound.prefixes"
    return OutboundDecision(
        is_allowed=True, trunks=rules.trunks, caller_id=rules.caller_id, display_name=rules.display_name,
        reasons=(reason,),
    )  # fmt: skip


def _refused(reason: str) -> OutboundDecision:
    return OutboundDecision(is_allowed=False, reasons=(reason,))
