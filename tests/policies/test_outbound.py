"""Whom a campaign may call: closed by default, numbers by prefix, everything decided with its reason."""

from __future__ import annotations

import pytest

from policies.outbound import ANSWER_ACTIONS, OutboundRules, decide_answer, decide_outbound, outbound_faults

ITALY = OutboundRules(prefixes=("+39", "0800"), trunks=("carrier",), caller_id="+390299999")


@pytest.mark.parametrize("number", ["+390212345", "0800123"])
def test_number_with_a_listed_prefix_is_called_as_the_campaign_says(number: str) -> None:
    decision = decide_outbound(ITALY, number, "")
    assert decision.is_allowed and decision.trunks == ("carrier",) and decision.caller_id == "+390299999"


@pytest.mark.parametrize(
    ("rules", "number", "uri"),
    [
        (None, "+390212345", ""),
        (ITALY, "+49301234", ""),
        (ITALY, "", "sip:ann@pbx"),
        (ITALY, "", ""),
        (ITALY, "+390212345", "sip:ann@pbx"),
        (ITALY, "+39;ext=1", ""),
        (ITALY, "+39\r\nEvil: 1", ""),
        (OutboundRules(is_uri_allowed=True), "+390212345", ""),
    ],
)
def test_everything_else_is_refused_with_a_reason(rules: OutboundRules | None, number: str, uri: str) -> None:
    decision = decide_outbound(rules, number, uri)
    assert not decision.is_allowed and decision.reasons[0]


@pytest.mark.parametrize(
    ("rules", "fault"),
    [
        (OutboundRules(), "must have prefixes or is_uri_allowed"),
        (OutboundRules(prefixes=("",)), "prefixes: ''"),  # would be every number there is
        (OutboundRules(prefixes=("+",)), "prefixes"),
        (OutboundRules(prefixes=("+39",), caller_id='a"b'), "caller_id"),
    ],
)
def test_rules_that_cannot_be_meant_are_named(rules: OutboundRules, fault: str) -> None:
    assert any(fault in text for text in outbound_faults(rules))


def test_no_table_and_good_rules_have_no_fault() -> None:
    assert outbound_faults(None) == outbound_faults(ITALY) == []


def test_machines_are_hung_up_on_unless_the_campaign_says_otherwise_and_a_screener_is_told_who_calls() -> None:
    actions = {kind: decide_answer(ITALY, kind).action for kind in ANSWER_ACTIONS}
    assert actions == {
        "voicemail": "hang_up", "call_screener": "answer", "ivr": "hang_up", "carrier_message": "hang_up",
    }  # fmt: skip
    leaves = OutboundRules(prefixes=("+39",), on_voicemail="leave_message")
    assert decide_answer(leaves, "voicemail").action == "leave_message"
    assert decide_answer(leaves, "voicemail").reasons == ("outbound.on_voicemail = leave_message",)
    assert decide_answer(None, "voicemail").action == "hang_up"


@pytest.mark.parametrize("kind", list(ANSWER_ACTIONS))
def test_unknown_way_to_treat_a_machine_is_refused_with_key_value_and_what_is_allowed(kind: str) -> None:
    (fault,) = outbound_faults(OutboundRules(prefixes=("+39",), **{f"on_{kind}": "shout"}))
    assert fault == f"outbound.on_{kind} = 'shout': must be {' or '.join(ANSWER_ACTIONS[kind])}"


def test_message_is_left_only_in_the_campaigns_own_words() -> None:
    leaves = OutboundRules(prefixes=("+39",), on_voicemail="leave_message")
    assert outbound_faults(leaves, {"voicemail_message"}) == []
    (fault,) = outbound_faults(leaves, {"greeting"})
    assert "needs lines.voicemail_message" in fault
