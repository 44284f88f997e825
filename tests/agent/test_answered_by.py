"""Who answered: lengths, tones and words as verdicts; which finding overturns which; phrases as data."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.answered_by import AnsweredBy, Strength, Verdict, WhoAnswered
from agent.prompts.answer_phrases import AnswerPhrases, plain_words
from telephony.leg import AnswerEvidence

RATE = 8000
PHRASES = AnswerPhrases.load()


def evidence(kind: str, at_s: float, lasted_s: float, hz: int = 0) -> AnswerEvidence:
    return AnswerEvidence(
        leg_id="l", kind=kind, sample=int(at_s * RATE), num_samples=int(lasted_s * RATE), frequency_hz=hz
    )


class Callee:
    def __init__(self) -> None:
        self.who = WhoAnswered(RATE)

    def hears(self, kind: str, at_s: float, lasted_s: float = 0.5, *, late: bool = False, greeted: bool = False):
        return self.who.hear(evidence(kind, at_s, lasted_s, 1000), may_be_person=late, is_greeted=greeted)

    def says(self, text: str, from_s: float, to_s: float) -> Verdict | None:
        return self.who.read(text, int(from_s * RATE), int(to_s * RATE))

    @property
    def kind(self) -> AnsweredBy:
        return self.who.kind


def test_a_word_and_a_pause_is_a_person_and_a_voice_that_goes_on_is_a_machine() -> None:
    person, machine = Callee(), Callee()
    assert person.hears("utterance", 1.2, 0.6).kind is AnsweredBy.HUMAN
    assert machine.hears("speaking", 3.0, 2.5) is None
    verdict = machine.hears("speaking", 3.5, 3.0)
    assert verdict == Verdict(AnsweredBy.VOICEMAIL, "spoke 3.0 s without a pause", AnsweredBy.UNDECIDED)
    assert not machine.who.is_sure
    machine.hears("speaking", 6.5, 6.0)
    assert machine.who.is_sure


@pytest.mark.parametrize(
    ("kind", "who"),
    [("special_information", "carrier_message"), ("busy", "carrier_message"), ("fax", "ivr"), ("beep", "voicemail")],
)
def test_tones_decide_also_against_a_person(kind: str, who: str) -> None:
    callee = Callee()
    callee.hears("utterance", 1.2, 0.6)
    assert callee.hears(kind, 3.0).kind == who and callee.who.is_sure


def test_ringback_decides_nothing() -> None:
    callee = Callee()
    assert callee.hears("ringback", 3.0, 2.0) is None and callee.kind is AnsweredBy.UNDECIDED


def test_persons_long_sentence_over_our_greeting_is_no_machine_before_five_seconds() -> None:
    callee = Callee()
    callee.hears("utterance", 1.2, 0.6)
    assert callee.hears("speaking", 6.0, 4.5) is None
    assert callee.hears("speaking", 6.5, 5.0).kind is AnsweredBy.VOICEMAIL


def test_after_our_greeting_length_means_nothing() -> None:
    callee = Callee()
    assert callee.hears("speaking", 15.0, 6.0, greeted=True) is None
    assert callee.hears("utterance", 15.0, 6.5, greeted=True).reason == "answered our greeting"


def test_words_are_stronger_than_lengths_and_a_beep_and_they_are_not_overturned_by_them() -> None:
    callee = Callee()
    callee.hears("speaking", 3.5, 3.0)
    verdict = callee.says("for sales press one", 0.5, 3.6)
    assert (verdict.kind, verdict.reason) == (AnsweredBy.IVR, "said 'press one'")
    assert callee.hears("beep", 4.0) is None and callee.kind is AnsweredBy.IVR


def test_beep_belongs_to_a_screener_that_has_asked_who_calls() -> None:
    callee = Callee()
    callee.says("please state your name and reason for calling", 0.5, 3.0)
    assert callee.hears("beep", 3.5) is None and callee.kind is AnsweredBy.CALL_SCREENER
    assert callee.says("please stay on the line", 6.0, 7.0) is None
    assert callee.says("please leave a message after the tone", 9.0, 12.0).kind is AnsweredBy.VOICEMAIL


def test_growing_caption_says_the_same_once() -> None:
    callee = Callee()
    found = [callee.says(text, 0.5, 2.0) for text in ("please leave", "please leave a message", "leave a message bye")]
    assert [verdict.kind if verdict else None for verdict in found] == [None, AnsweredBy.VOICEMAIL, None]


def test_person_in_a_machines_place_by_words_or_where_a_machine_is_silent() -> None:
    for late, text in ((False, "hello"), (True, "")):
        callee = Callee()
        callee.hears("speaking", 6.5, 6.0)
        callee.hears("utterance", 7.0, 6.5)
        if text:
            callee.says(text, 8.0, 8.6)
        assert callee.hears("utterance", 8.6, 0.6, late=late).kind is AnsweredBy.HUMAN
    callee = Callee()
    callee.hears("beep", 6.5)
    assert callee.hears("utterance", 8.6, 0.6) is None  # thank you, says the greeting


def test_what_the_machine_had_said_counts_no_more_once_a_person_came() -> None:
    callee = Callee()
    callee.says("please leave a message", 0.5, 3.0)
    callee.hears("utterance", 5.0, 0.5, late=True)
    assert callee.says("oh sorry i was in the garden", 5.5, 7.0) is None and callee.kind is AnsweredBy.HUMAN


def test_long_first_sentence_that_waits_without_a_beep_is_a_person_unless_we_are_sure() -> None:
    callee, sure = Callee(), Callee()
    for each in (callee, sure):
        each.hears("speaking", 3.5, 3.0)
        each.hears("utterance", 4.5, 4.0)
    sure.says("leave a message", 2.0, 4.4)
    assert callee.who.pass_time(int(5.9 * RATE)) is None
    assert callee.who.pass_time(int(6.1 * RATE)).kind is AnsweredBy.HUMAN
    assert sure.who.pass_time(int(9.0 * RATE)) is None


# ------------------------------------------------------------------ phrases


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Hi, you've reached Ann. Please leave me a message after the tone.", "voicemail"),
        ("Sorry, I can't come to the phone right now", "voicemail"),
        ("The person you're calling is using a screening service. Go ahead and say your name, and why you're calling.",
         "call_screener"),
        ("Hi, if you record your name and reason for calling I'll see if this person is available.", "call_screener"),
        ("For English, press 1.", "ivr"),
        ("The number you have dialled is not in service. Please check the number and dial again.", "carrier_message"),
        ("El número que usted marcó está apagado o fuera de servicio", "carrier_message"),
        ("Bitte hinterlassen Sie eine Nachricht nach dem Signalton", "voicemail"),
        ("您 拨打 的 电话 已关机", "carrier_message"),
        ("hello who is this", ""),
        ("yes i would like to know where my order is", ""),
        ("can you leave it with my neighbour", ""),
        ("i did not press anything", ""),
        ("my number is one two three four five", ""),
    ],
)  # fmt: skip
def test_phrases_of_machines_are_told_from_what_people_say(text: str, kind: str) -> None:
    assert PHRASES.find(text)[0] == kind


@pytest.mark.parametrize(
    ("text", "is_person"),
    [("Hello?", True), ("yes, speaking", True), ("喂", True), ("", False), ("thank you", False),
     ("hello you have reached the office of doctor smith", False), ("hello please leave a message", False)],
)  # fmt: skip
def test_a_person_says_few_words(text: str, is_person: bool) -> None:
    assert PHRASES.is_person(text) is is_person


def test_words_are_compared_without_case_punctuation_and_figures() -> None:
    assert plain_words("Press 1, or DON'T!") == "press one or dont"


def test_unknown_class_is_refused_with_what_is_allowed(tmp_path: Path) -> None:
    file = tmp_path / "answer_phrases.toml"
    file.write_text('[en]\nfax = ["beep"]\n')
    with pytest.raises(ValueError, match=r"en\.fax: must be one of carrier_message, call_screener, voicemail, ivr"):
        AnswerPhrases.load(file)


def test_strengths_are_in_their_order() -> None:
    assert Strength.NONE < Strength.UNSURE < Strength.HEARD < Strength.SAID
