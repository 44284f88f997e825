"""The endpointer bridge: patience follows the words, and while the agent speaks only words or lasting sound
interrupt."""

from __future__ import annotations

import pytest

from minmo_runtime.api import DuplexPrediction
from minmo_runtime.bridges import TurnView, patience_ms, predict, trailing_digits

MS = 16


def after(text: str, silence_ms: int, slot_digits: int = 0) -> DuplexPrediction:
    view = TurnView(
        sample=0,
        is_voiced=False,
        silence_samples=silence_ms * MS,
        voiced_samples=0,
        text=text,
        has_segment=True,
        slot_digits=slot_digits,
    )
    return predict("c", view)


def over(text: str, voiced_ms: int) -> DuplexPrediction:
    view = TurnView(
        sample=0,
        is_voiced=True,
        silence_samples=0,
        voiced_samples=voiced_ms * MS,
        overlap_text=text,
        is_agent_speaking=True,
        has_segment=True,
    )
    return predict("c", view)


def total(p: DuplexPrediction) -> float:
    return p.idle + p.user_continues + p.user_done + p.user_waits + p.backchannel + p.interrupt


@pytest.mark.parametrize("prediction", [after("yes", 100), after("", 900), over("", 200), over("no stop", 300)])
def test_a_prediction_sums_to_one(prediction: DuplexPrediction) -> None:
    assert total(prediction) == pytest.approx(1.0)


def test_a_complete_sentence_is_done_sooner_than_an_open_one() -> None:
    assert after("i want to speak to a person", 400).user_done > 0.5
    assert after("i want to speak to", 400).user_done < 0.05
    assert after("i want to speak to", 1400).user_done > 0.5


def test_a_number_under_way_waits_until_it_is_full() -> None:
    assert after("my order is 456", 1200, slot_digits=5).user_done < 0.05
    assert after("my order is 45612", 320, slot_digits=5).user_done > 0.5
    assert after("my order is 456", 1900, slot_digits=5).user_done > 0.5
    assert patience_ms("it is 456", 0) == 1200


def test_one_moment_is_waiting_not_done() -> None:
    prediction = after("one moment please", 1500)
    assert prediction.user_waits > 0.5 and prediction.user_done < 0.05


def test_voiced_means_the_caller_goes_on() -> None:
    view = TurnView(sample=0, is_voiced=True, silence_samples=0, voiced_samples=800, text="yes", has_segment=True)
    assert predict("c", view).user_continues > 0.9


@pytest.mark.parametrize(("text", "voiced_ms"), [("mm hm", 400), ("yeah", 300), ("okay right", 700), ("", 400)])
def test_backchannels_and_short_noise_do_not_interrupt(text: str, voiced_ms: int) -> None:
    assert over(text, voiced_ms).interrupt < 0.5


@pytest.mark.parametrize(("text", "voiced_ms"), [("no wait", 300), ("i have another question", 600), ("stop", 250)])
def test_words_of_substance_interrupt(text: str, voiced_ms: int) -> None:
    assert over(text, voiced_ms).interrupt > 0.7


def test_digits_are_counted_written_or_spoken() -> None:
    assert trailing_digits("order 4 56".split()) == 3
    assert trailing_digits("it is four oh".split()) == 2
    assert trailing_digits("45 please".split()) == 0
