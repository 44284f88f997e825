"""What the policy engine decides, each decision with its reason."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from policies.config import PoliciesConfig
from policies.consent import decide_recording
from policies.decisions import EscalationDecision
from policies.disclosure import disclose
from policies.engine import PolicyEngine, UnknownNumber
from policies.escalation import decide_escalation
from policies.facts import CallFacts, CheckpointFacts
from policies.speaking_style import StyleRules, decide_style

Load = Callable[..., PolicyEngine]
Text = Callable[..., str]


def changed(facts: CallFacts, **changes: object) -> CallFacts:
    return msgspec.structs.replace(facts, **changes)


@pytest.fixture
def engine(checkpoint: CheckpointFacts) -> PolicyEngine:
    return PolicyEngine.load(PoliciesConfig(), checkpoint, line_keys=frozenset({"greeting"}))


# ---------------------------------------------------------------- admission


def test_a_call_to_a_known_number_is_admitted(engine: PolicyEngine, facts: CallFacts) -> None:
    decision = engine.admit(facts, num_calls=2, max_calls=3)
    assert decision.is_admitted
    assert decision.reasons == ("campaign acme_orders",)


def test_a_full_house_answers_503_with_retry_after(engine: PolicyEngine, facts: CallFacts) -> None:
    decision = engine.admit(facts, num_calls=3, max_calls=3)
    assert (decision.is_admitted, decision.sip_status, decision.retry_after_s) == (False, 503, 20)


def test_an_unknown_number_answers_404(engine: PolicyEngine, facts: CallFacts) -> None:
    assert engine.admit(changed(facts, did="999"), 0, 3).sip_status == 404
    with pytest.raises(UnknownNumber):
        engine.style(changed(facts, did="999"))


def test_a_refused_campaign_answers_503_and_names_itself(load: Load, campaign_text: Text, facts: CallFacts) -> None:
    bad = campaign_text("301").replace('"calm"', '"furious"')
    engine = load({"bad": bad, "good": campaign_text("300")}, default_campaign="good")
    decision = engine.admit(changed(facts, did="301"), 0, 3)
    assert decision.sip_status == 503
    assert "bad" in decision.reasons[0]
    assert engine.campaign_for("301") is None, "a refused line must not be answered as another shop"
    assert engine.admit(changed(facts, did="300"), 0, 3).is_admitted


def test_the_default_campaign_takes_numbers_nobody_lists(load: Load, campaign_text: Text, facts: CallFacts) -> None:
    engine = load({"river": campaign_text("300")}, default_campaign="river")
    assert engine.admit(changed(facts, did="anything"), 0, 3).is_admitted


def test_an_unknown_default_campaign_stops_the_start(load: Load, campaign_text: Text) -> None:
    with pytest.raises(ValueError, match=r"policies.default_campaign = 'lake': must be one of river"):
        load({"river": campaign_text("300")}, default_campaign="lake")


# ---------------------------------------------------------------- style and prompt


def test_two_campaigns_speak_differently(engine: PolicyEngine, facts: CallFacts) -> None:
    assert engine.style(facts).instruction == "speak in a calm voice at a normal pace."
    assert engine.style(changed(facts, did="200")).instruction == "speak in a brisk voice at a normal pace."


def test_the_prompt_holds_persona_style_and_what_is_expected(engine: PolicyEngine, facts: CallFacts) -> None:
    assert engine.system_prompt(facts) == (
        "you are anna at acme orders. speak in a calm voice at a normal pace. order numbers have 5 digits."
    )


RULES = StyleRules(
    languages=("en", "cmn"),
    dialect="us",
    emotion="brisk",
    rate="normal",
    emotion_for_caller={"angry": "calm"},
    rate_when_not_understood="slow",
)


@pytest.mark.parametrize(
    ("change", "field", "value", "reason"),
    [
        ({"caller_language": "cmn"}, "language", "cmn", "caller speaks cmn"),
        ({"caller_language": "it"}, "language", "en", "caller speaks it, which the campaign does not offer"),
        ({"caller_emotion": "angry"}, "emotion", "calm", "caller sounds angry: calm"),
        ({"caller_emotion": "happy"}, "emotion", "brisk", ""),
        ({"num_turns_not_understood": 1}, "rate", "slow", "1 turns not understood: slow"),
    ],
)
def test_a_style_changes_with_the_caller_and_says_why(
    facts: CallFacts, change: dict[str, object], field: str, value: str, reason: str
) -> None:
    decision = decide_style(RULES, changed(facts, **change))
    assert getattr(decision, field) == value
    assert reason in ("", *decision.reasons)
    assert decision.reasons[0] == "campaign begins in en, us, brisk, normal"


# ---------------------------------------------------------------- escalation


@pytest.mark.parametrize(
    ("missed", "asked", "uri", "action"),
    [
        (0, False, "sip:desk@pbx", "none"),
        (1, False, "sip:desk@pbx", "none"),
        (2, False, "sip:desk@pbx", "offer_keypad"),
        (3, False, "", "offer_keypad"),
        (4, False, "sip:desk@pbx", "transfer"),
        (4, False, "", "callback_request"),
        (0, True, "sip:desk@pbx", "transfer"),
        (0, True, "", "callback_request"),
    ],
)
def test_keypad_first_then_a_person(facts: CallFacts, missed: int, asked: bool, uri: str, action: str) -> None:
    known = changed(facts, num_turns_not_understood=missed, caller_asked_for_person=asked)
    decision = decide_escalation(known, PoliciesConfig(), uri)
    assert decision.action == action
    assert decision.refer_to == (uri if action == "transfer" else "")
    assert decision.reasons or action == "none"


def test_a_line_that_cannot_be_transferred_gets_the_callback_whatever_desk_there_is(facts: CallFacts) -> None:
    known = changed(facts, caller_asked_for_person=True, can_transfer=False)
    decision = decide_escalation(known, PoliciesConfig(), "sip:desk@pbx", is_warm=True)
    assert (decision.action, decision.refer_to) == ("callback_request", "")
    assert "this line cannot be transferred" in decision.reasons


def test_a_line_without_order_numbers_offers_nothing_to_type(facts: CallFacts) -> None:
    known = changed(facts, num_turns_not_understood=2)
    assert decide_escalation(known, PoliciesConfig(), "sip:desk@pbx", has_numbers=False).action == "none"


def test_a_campaign_may_name_its_own_desk(load: Load, campaign_text: Text, facts: CallFacts) -> None:
    engine = load({"river": campaign_text("300", 'handoff_uri = "sip:river@pbx"\n')})
    decision = engine.escalate(changed(facts, did="300", caller_asked_for_person=True))
    assert decision == EscalationDecision(
        action="transfer", refer_to="sip:river@pbx", reasons=("caller asked for a person",)
    )


# ---------------------------------------------------------------- recording and notice


@pytest.mark.parametrize(
    ("campaign", "operator", "mode"),
    [
        ("", "after_notice", "after_notice"),
        ("off", "always", "off"),
        ("always", "after_notice", "after_notice"),
        ("always", "off", "off"),
        ("always", "always", "always"),
    ],
)
def test_a_campaign_records_at_most_what_the_operator_allows(campaign: str, operator: str, mode: str) -> None:
    assert decide_recording(campaign, operator).mode == mode


@pytest.mark.parametrize(
    ("mode", "before", "after"), [("off", False, False), ("after_notice", False, True), ("always", True, True)]
)
def test_after_notice_records_nothing_before_the_notice_was_heard(mode: str, before: bool, after: bool) -> None:
    decision = decide_recording("", mode)
    assert decision.may_record(is_notice_heard=False) is before
    assert decision.may_record(is_notice_heard=True) is after


@pytest.mark.parametrize(
    ("mode", "line"), [("off", "notice_without_recording"), ("after_notice", "notice"), ("always", "notice")]
)
def test_the_notice_speaks_of_recording_only_where_there_is_one(mode: str, line: str) -> None:
    assert disclose(decide_recording("", mode)).line == line


# ---------------------------------------------------------------- settings and contract


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"keypad_after_turns": 0}, "policies.keypad_after_turns = 0: must be 1 to 10"),
        ({"person_after_turns": 2}, "policies.person_after_turns = 2: must be more than"),
        ({"retry_after_s": 0}, "policies.retry_after_s = 0: must be 1 to 3600"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PoliciesConfig(**settings)


def test_decisions_survive_msgpack(engine: PolicyEngine, facts: CallFacts) -> None:
    for decision in (
        engine.admit(facts, 0, 3),
        engine.style(facts),
        engine.escalate(facts),
        engine.recording(facts),
        engine.disclose(facts),
    ):
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(decision), type=type(decision)) == decision
