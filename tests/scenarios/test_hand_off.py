"""Warm hand-off as the call's core sees it, in virtual time: announced first, spoken progress while a person is called,
a sentence and a callback when nobody takes it, the end when somebody does."""

from __future__ import annotations

from typing import Any

from agent.events import CallPerson, PersonRinging
from minmo_runtime.fake import FakeLine
from telephony import leg as tel
from tests.scenarios.scene import Scene, policy

PERSON = FakeLine(text="a person please")
DESK = "sip:desk@pbx"


class WarmScene(Scene):
    """The shell's part of a hand-off is the test's: who was called is kept."""

    def __init__(self, *lines: FakeLine) -> None:
        super().__init__(*lines, handoff_uri=DESK)
        self.called: list[str] = []
        warm = policy(DESK)
        self.call.escalation.policy = type(warm)(
            warm.config, warm.campaigns, warm.problems, warm.handoff_uri, handoff_manner="warm"
        )

    def _carry_out(self, action: Any) -> None:
        if isinstance(action, CallPerson):
            self.called.append(action.target)
        else:
            super()._carry_out(action)

    def ringing(self) -> None:
        self._inbox.append(PersonRinging())

    def outcome(self, sip_status: int, reason: str) -> None:
        self._inbox.append(tel.ReferResult(leg_id="l1", sip_status=sip_status, reason=reason))


def asked_for_a_person() -> WarmScene:
    scene = WarmScene(PERSON, PERSON, FakeLine(text="where is my order"))
    scene.answer()
    scene.caller(1.5)
    scene.run_until(lambda: scene.called, 15)
    return scene


def test_person_is_called_only_after_the_caller_heard_so_and_no_refer_goes_out() -> None:
    scene = asked_for_a_person()
    assert scene.called == [DESK] and not scene.commands(tel.Refer)
    assert any("connecting you" in text or "connect you" in text for text in scene.heard_turns)


def test_caller_hears_that_a_person_is_called_and_is_not_asked_whether_they_are_there() -> None:
    scene = asked_for_a_person()
    for _ in range(4):
        scene.ringing()
        scene.run(6.0)
    said = " ".join(scene.heard_turns)
    assert "i am calling a person" in said and "are you still there" not in said


def test_caller_of_a_plain_transfer_that_takes_long_hears_that_a_person_is_called_too() -> None:
    scene = Scene(PERSON, handoff_uri=DESK)
    scene.leg.refer_answer = None  # accepted; the exchange, or the worker for it, calls the target
    scene.answer().caller(1.5)
    scene.run_until(lambda: scene.leg.referred_to, 15)
    scene.run(20.0)
    said = " ".join(scene.heard_turns)
    assert said.count("one moment please") in (2, 3) and "i am calling a person" in said
    assert "are you still there" not in said


def test_caller_who_asks_again_while_it_rings_causes_no_second_call() -> None:
    scene = asked_for_a_person()
    scene.caller(1.5, 8.0)
    assert scene.called == [DESK]


def test_nobody_took_it_so_the_agent_says_it_stores_a_callback_and_goes_on() -> None:
    scene = asked_for_a_person()
    scene.outcome(486, "nobody answered: busy")
    scene.run_until(lambda: any("no one is free right now" in text for text in scene.heard_turns), 10)
    (request,) = scene.keeps("request_callback")
    assert "486" in request["reason"] and not scene.is_over
    scene.caller(1.5)  # the conversation goes on, and asking again calls again
    scene.run_until(lambda: len(scene.called) == 2, 15)


def test_somebody_took_it_so_the_call_ends_as_transferred() -> None:
    scene = asked_for_a_person()
    scene.outcome(200, "joined")
    scene.run_until(lambda: scene.is_over, 5)
    (closed,) = scene.keeps("close_call")
    assert (closed["disposition"], closed["cause"]) == ("transferred", "transferred")
    assert [command.cause for command in scene.commands(tel.Hangup)] == ["transferred"]
