"""Calls that we place, in virtual time: a person, a voicemail with and without a beep, a menu, a call screener, a
carrier's announcement; who comes late; and nothing of it in calls that come in. users.md L6, J4."""

from __future__ import annotations

import math
from array import array
from typing import Any

import numpy as np
import pytest

from minmo_runtime.fake import FakeLine
from policies.outbound import OutboundRules
from telephony import leg as tel
from telephony.config import TelephonyConfig
from telephony.loopback import LoopbackLeg
from tests.scenarios.scene import RATE_HZ, Scene, tone

LEAVES = OutboundRules(prefixes=("+39",), on_voicemail="leave_message")
HANGS_UP = OutboundRules(prefixes=("+39",))
NOBODY = FakeLine(text="", kind="noise")  # what a recogniser makes of it that understands nothing
HELLO = FakeLine(text="hello")
GREETING_S = 7.0
MESSAGE = "hello, i am calling about your order. please call again. goodbye."


def beep(seconds: float, hz: float = 1000.0, amplitude: int = 8000) -> bytes:
    count = int(seconds * RATE_HZ)
    return array("h", (int(amplitude * math.sin(2 * math.pi * hz * i / RATE_HZ)) for i in range(count))).tobytes()


def silence(seconds: float) -> bytes:
    return bytes(2 * int(seconds * RATE_HZ))


class Dialled(Scene):
    """`scene.plays(pcm)`: what the callee's line sounds like from the answer on."""

    def __init__(
        self, *lines: FakeLine, rules: OutboundRules = LEAVES, echo_canceller: str = "off", **script: Any
    ) -> None:
        super().__init__(*lines, outbound=rules, **script)
        self.leg = LoopbackLeg("l1", direction="outbound", config=TelephonyConfig(echo_canceller=echo_canceller))
        self.run_until(lambda: self.leg.state is tel.LegState.CONFIRMED, 1)

    def plays(self, *parts: bytes) -> Dialled:
        self.leg.speak(b"".join(parts))
        return self

    @property
    def verdicts(self) -> list[tuple[str, str]]:
        return [(entry["was"], entry["kind"]) for entry in self.keeps("journal_append", name="answered_by")]

    @property
    def decision_ms(self) -> float:
        (metric,) = self.keeps("add_metric", name="answer_decision_ms")
        return metric["value"]

    @property
    def said(self) -> list[str]:
        """Every line of ours of which something was heard."""
        return self.heard_turns

    def is_silent(self, from_s: float, to_s: float) -> bool:
        """Nothing of ours on the wire in that time since the answer."""
        sent = np.frombuffer(self.leg.heard, "<i2")[int(from_s * RATE_HZ) : int(to_s * RATE_HZ)]
        return len(sent) > 0 and int(np.abs(sent).max()) < 200

    def first_sound_after(self, from_s: float) -> float:
        """Seconds since the answer."""
        sent = np.frombuffer(self.leg.heard, "<i2")[int(from_s * RATE_HZ) :]
        return from_s + int(np.argmax(np.abs(sent) > 200)) / RATE_HZ

    def closed(self, within_s: float = 60.0) -> tuple[str, str]:
        self.run_until(lambda: self.is_over, within_s)
        (row,) = self.keeps("close_call")
        return row["disposition"], row["cause"]


# ------------------------------------------------------------------ people


def test_a_person_is_known_within_one_and_a_half_seconds_of_the_first_word_while_we_greet_already() -> None:
    scene = Dialled(HELLO, FakeLine(text="where is my order")).plays(silence(0.8), tone(0.5))
    scene.run_until(lambda: scene.verdicts)
    assert scene.verdicts == [("undecided", "human")]
    assert scene.decision_ms - 1300 <= 1500  # its first word was over after 1.3 s
    assert not scene.is_silent(0.0, scene.decision_ms / 1000)  # the notice is on its way already
    scene.run_until(lambda: len(scene.said) >= 2, 20)
    assert "automated assistant" in scene.said[0] and "calling about your order" in scene.said[1]
    assert not scene.commands(tel.Flush)
    scene.run_until(lambda: scene.commands(tel.StopAnswerDetection), 5)  # the worker need not listen any more
    scene.caller(1.5, 1.0)
    scene.run_until(lambda: len(scene.said) == 3)
    scene.leg.hang_up()
    assert scene.closed(1) == ("completed", "normal")


def test_person_who_picks_up_silently_and_answers_our_greeting_at_length_is_no_machine() -> None:
    scene = Dialled(FakeLine(text="yes where is my order i have been waiting for it for a week now"))
    scene.run_until(lambda: len(scene.said) >= 2 and scene.state == "listening", 20)
    scene.caller(4.5, 1.5)
    assert scene.verdicts == [("undecided", "human")] and scene.state != "unattended"
    scene.run_until(lambda: len(scene.said) == 3, 10)


def test_business_that_answers_in_four_seconds_and_waits_is_greeted_again_from_the_start() -> None:
    scene = Dialled(NOBODY).plays(silence(0.3), tone(4.0))
    scene.run_until(lambda: len(scene.verdicts) == 2, 12)
    assert scene.verdicts == [("undecided", "voicemail"), ("voicemail", "human")]
    scene.run_until(lambda: len(scene.said) >= 3 and scene.state == "listening", 20)
    assert "automated assistant" in scene.said[-2] and "calling about your order" in scene.said[-1]
    assert not scene.is_over


def test_callee_who_says_nothing_is_asked_as_ever_and_the_record_says_undecided() -> None:
    scene = Dialled()
    scene.run_until(lambda: any("still there" in text for text in scene.said), 30)
    scene.leg.hang_up()
    assert scene.closed(1) == ("completed", "normal")
    (entry,) = scene.keeps("journal_append", name="answered_by")
    assert (entry["kind"], entry["decision_ms"]) == ("undecided", None)


# ------------------------------------------------------------------ voicemail


@pytest.mark.parametrize("echo_canceller", ["auto", "off"])
def test_message_begins_after_the_beep_and_is_heard_in_full_though_no_word_was_recognised(
    echo_canceller: str,
) -> None:
    scene = Dialled(NOBODY, echo_canceller=echo_canceller).plays(
        silence(0.5), tone(GREETING_S), silence(0.7), beep(0.4)
    )
    assert scene.closed() == ("voicemail_left", "voicemail_left")
    assert scene.verdicts == [("undecided", "voicemail")] and 3000 <= scene.decision_ms <= 4500
    beep_from, beep_to = 0.5 + GREETING_S + 0.7, 0.5 + GREETING_S + 1.1
    assert scene.is_silent(scene.decision_ms / 1000 + 0.2, beep_to)  # the notice stops, although people cannot stop it
    assert 0 <= scene.first_sound_after(beep_from) - beep_to <= 0.5
    notice, message = scene.said[-2:]
    assert "automated assistant" in notice and message == MESSAGE


def test_voicemail_without_a_beep_is_spoken_to_two_seconds_after_its_greeting() -> None:
    scene = Dialled(NOBODY).plays(silence(0.5), tone(GREETING_S))
    assert scene.closed() == ("voicemail_left", "voicemail_left")
    assert 1.8 <= scene.first_sound_after(scene.decision_ms / 1000 + 0.3) - (0.5 + GREETING_S) <= 2.6


def test_short_greeting_that_sounded_like_a_person_is_overturned_by_its_beep() -> None:
    scene = Dialled(NOBODY).plays(silence(0.5), tone(1.5), silence(1.2), beep(0.5, hz=440))
    assert scene.closed() == ("voicemail_left", "voicemail_left")
    assert scene.verdicts == [("undecided", "human"), ("human", "voicemail")]
    *_, notice, message = [row for row in scene.transcript if row["role"] == "agent"]
    assert "automated assistant" in notice["heard_text"] and message["heard_text"] == MESSAGE
    assert 0 <= notice["start_sample"] / RATE_HZ - 3.7 <= 0.5  # and what was being said before was cut
    assert any(row.get("was_interrupted") for row in scene.transcript)


def test_words_overturn_the_sound_of_a_short_greeting() -> None:
    scene = Dialled(HELLO, FakeLine(text="please leave a message after the tone")).plays(
        silence(0.3), tone(0.6), silence(1.0), tone(2.6), silence(0.5), beep(0.3)
    )
    assert scene.closed() == ("voicemail_left", "voicemail_left")
    assert scene.verdicts == [("undecided", "human"), ("human", "voicemail")]
    reasons = scene.keeps("journal_append", name="answered_by")[-1]["reasons"]
    assert reasons == ["said 'leave a message'", "outbound.on_voicemail = leave_message"]


def test_J4_words_decide_from_an_interim_caption_before_the_greeting_is_over() -> None:
    scene = Dialled(FakeLine(text="your call has been forwarded to voicemail please record"), rules=HANGS_UP)
    scene.plays(silence(0.3), tone(2.8))
    assert scene.closed(5) == ("voicemail", "voicemail")
    assert scene.decision_ms <= 2800
    final = scene.keeps("journal_append", name="caption")
    assert not final  # nobody waited for it


def test_campaign_that_leaves_no_message_hangs_up_once_it_is_sure() -> None:
    scene = Dialled(NOBODY, rules=HANGS_UP).plays(silence(0.5), tone(12.0))
    assert scene.closed(10) == ("voicemail", "voicemail")
    assert MESSAGE not in scene.said


def test_greeting_that_goes_on_after_something_like_a_beep_is_waited_out() -> None:
    scene = Dialled(NOBODY).plays(
        silence(0.5), tone(4.0), silence(0.3), beep(0.2, hz=880), silence(0.9), tone(4.0), silence(0.5), beep(0.4)
    )
    assert scene.closed() == ("voicemail_left", "voicemail_left")
    assert scene.said.count(MESSAGE) == 1
    assert 0 <= scene.first_sound_after(10.2) - 10.3 <= 0.6


def test_endless_greeting_is_left_after_half_a_minute_without_a_message() -> None:
    scene = Dialled(NOBODY).plays(silence(0.5), tone(60.0))
    assert scene.closed(40) == ("voicemail", "voicemail")


def test_person_who_picks_up_during_the_machines_greeting_hears_notice_and_greeting() -> None:
    scene = Dialled(NOBODY, HELLO).plays(silence(0.3), tone(6.5), silence(0.9), tone(0.6))
    scene.run_until(lambda: scene.state == "unattended", 8)
    scene.run_until(lambda: len(scene.verdicts) == 2, 12)
    assert scene.verdicts[1] == ("voicemail", "human")
    scene.run_until(lambda: any("calling about your order. how" in text for text in scene.said), 20)
    assert "automated assistant" in scene.said[-2]
    scene.leg.hang_up()
    assert scene.closed(1) == ("completed", "normal")


def test_person_who_picks_up_while_the_message_is_left_is_spoken_to() -> None:
    scene = Dialled(NOBODY, FakeLine(text="oh i am just coming in")).plays(
        silence(0.5), tone(GREETING_S), silence(0.5), beep(0.4), silence(2.5), tone(0.9)
    )
    scene.run_until(lambda: scene.verdicts[-1:] == [("voicemail", "human")], 20)
    scene.run_until(lambda: any("how can i help" in text for text in scene.said), 20)
    assert not scene.is_over


def test_machine_that_hangs_up_in_the_middle_of_the_message_has_no_message() -> None:
    scene = Dialled(NOBODY).plays(silence(0.5), tone(GREETING_S), silence(0.5), beep(0.4))
    scene.run(GREETING_S + 4.0)
    scene.leg.hang_up()
    assert scene.closed(1) == ("voicemail", "normal")


# ------------------------------------------------------------------ other machines


def test_L6_call_screener_is_told_who_calls_and_the_person_who_comes_is_greeted_from_the_start() -> None:
    screener = FakeLine(text="hi please say your name and why you are calling")
    stay = FakeLine(text="thanks please stay on the line")
    scene = Dialled(screener, stay, HELLO).plays(silence(0.3), tone(4.5))
    scene.run_until(lambda: any("automated assistant. i am calling" in text for text in scene.said), 20)
    assert scene.verdicts == [("undecided", "call_screener")]
    scene.plays(silence(0.5), tone(2.0))
    scene.run(4.0)
    assert scene.state == "unattended" and len(scene.verdicts) == 1
    scene.plays(tone(0.6))
    scene.run_until(lambda: len(scene.said) >= 4 and scene.state == "listening", 20)
    assert scene.verdicts == [("undecided", "call_screener"), ("call_screener", "human")]
    assert "how can i help" in scene.said[-1] and "automated assistant" in scene.said[-2]
    scene.leg.hang_up()
    assert scene.closed(1) == ("completed", "normal")


def test_screener_after_whom_nobody_comes_is_left() -> None:
    scene = Dialled(FakeLine(text="please say your name and why you are calling")).plays(silence(0.3), tone(3.5))
    assert scene.closed(60) == ("call_screened", "call_screened")


def test_screener_is_not_answered_where_the_campaign_says_so() -> None:
    rules = OutboundRules(prefixes=("+39",), on_call_screener="hang_up")
    scene = Dialled(FakeLine(text="please say your name and why you are calling"), rules=rules)
    scene.plays(silence(0.3), tone(3.5))
    assert scene.closed(10) == ("call_screened", "call_screened")


MENU = FakeLine(text="welcome for sales press one for service press two")


def test_menu_is_left_and_filed_as_one() -> None:
    scene = Dialled(MENU).plays(silence(0.3), tone(5.0))
    assert scene.closed(10) == ("ivr", "ivr")


def test_menu_is_talked_to_where_the_campaign_goes_on() -> None:
    scene = Dialled(MENU, rules=OutboundRules(prefixes=("+39",), on_ivr="go_on")).plays(silence(0.3), tone(3.0))
    scene.run(15.0)
    assert not scene.is_over and scene.verdicts == [("undecided", "ivr")] and len(scene.said) >= 2


SPECIAL_INFORMATION = beep(0.33, 950) + beep(0.33, 1400) + beep(0.33, 1800)


@pytest.mark.parametrize(
    "sound",
    [silence(0.4) + SPECIAL_INFORMATION + silence(0.3) + tone(3.0), (beep(0.5, 425) + silence(0.5)) * 6],
    ids=["special information tone", "busy tone"],
)
def test_carriers_tones_end_the_call_so_that_it_can_be_dialled_again(sound: bytes) -> None:
    scene = Dialled(NOBODY).plays(sound)
    assert scene.closed(6) == ("carrier_message", "carrier_message")
    assert scene.verdicts == [("undecided", "carrier_message")]


def test_carriers_words_do_so_too() -> None:
    scene = Dialled(FakeLine(text="the number you have dialled is not in service")).plays(silence(0.3), tone(3.5))
    assert scene.closed(6) == ("carrier_message", "carrier_message")


# ------------------------------------------------------------------ calls that come in


def test_nothing_of_it_in_a_call_that_came_in() -> None:
    scene = Scene(FakeLine(text="please leave a message after the tone")).answer()
    scene.leg.speak(tone(8.0) + silence(0.5) + beep(0.5))
    scene.run(12.0)
    assert scene.state != "unattended" and not scene.is_over
    assert not scene.keeps("journal_append", name="answered_by")
    assert not scene.keeps("journal_append", name="answer_evidence")
    assert not scene.keeps("add_metric", name="answer_decision_ms")
    assert not scene.commands(tel.StopAnswerDetection)
