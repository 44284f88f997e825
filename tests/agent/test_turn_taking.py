"""Who may speak: the table itself, and the timings of every decision."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from agent import floor
from agent.agent_turns import NEXT, State
from agent.floor import TurnTakingConfig
from agent.turn_taking import _HANDLERS, TurnTaking

FRAME_S = 0.02
SAMPLE_EVENTS: dict[type, Any] = {
    floor.LineWanted: floor.LineWanted("reprompt"),
    floor.Ringing: floor.Ringing((floor.LineWanted("notice", is_protected=True), floor.LineWanted("greeting"))),
    floor.Answered: floor.Answered(),
    floor.MachineAnswered: floor.MachineAnswered(),
    floor.LinesWanted: floor.LinesWanted((floor.LineWanted("voicemail_message", is_protected=True),)),
    floor.CallerAudio: floor.CallerAudio(True, FRAME_S, 1.0),
    floor.CallerWords: floor.CallerWords("hello"),
    floor.Predicted: floor.Predicted(at_s=1.0, user_done=0.9),
    floor.KeyPressed: floor.KeyPressed(),
    floor.Heard: floor.Heard("a1"),
    floor.PlayoutDry: floor.PlayoutDry("a1"),
    floor.TurnLost: floor.TurnLost("a1"),
    floor.HangUpWanted: floor.HangUpWanted("test"),
    floor.Gone: floor.Gone(),
    floor.Tick: floor.Tick(),
    floor.OnHold: floor.OnHold(1.0),
}
BEFORE_THE_ANSWER = (floor.Ringing, floor.Answered, floor.HangUpWanted, floor.Gone)
TOO_LATE = (floor.LineWanted, floor.CallerWords, floor.KeyPressed, floor.PlayoutDry, floor.Predicted)
# Pairs that are without effect on purpose; everything else must have a handler.
WITHOUT_EFFECT = {
    *((State.CLOSED, event) for event in floor.EVENT_TYPES),
    *((state, floor.Ringing) for state in State if state is not State.WAITING),
    *((state, floor.Answered) for state in State if state is not State.WAITING),
    *((State.WAITING, event) for event in floor.EVENT_TYPES if event not in BEFORE_THE_ANSWER),
    *((State.CLOSING, event) for event in (*TOO_LATE, floor.MachineAnswered, floor.LinesWanted)),
    *((State.UNATTENDED, event) for event in (*TOO_LATE, floor.Heard, floor.TurnLost, floor.MachineAnswered)),
    (State.THINKING, floor.Predicted),
    (State.PROTECTED, floor.Predicted),
}  # fmt: skip


class Table:
    """One call's floor, driven in frames."""

    def __init__(self, **settings: Any) -> None:
        self.turns = TurnTaking(TurnTakingConfig(**settings), slot_digits=5)
        self.now = self.audio_s = 10.0
        self.actions: list[Any] = []

    def tell(self, event: floor.Event) -> list[Any]:
        new = self.turns.step(event, self.now)
        self.actions += new
        return new

    def hear(self, seconds: float, is_voiced: bool, **prediction: float) -> Table:
        for _ in range(round(seconds / FRAME_S)):
            self.now += FRAME_S
            self.audio_s += FRAME_S
            self.tell(floor.CallerAudio(is_voiced, FRAME_S, self.audio_s))
            if prediction:
                self.tell(floor.Predicted(at_s=self.audio_s, **prediction))
        return self

    def listening(self) -> Table:
        self.tell(floor.Answered())
        return self

    def speaking(self) -> Table:
        """In the middle of a reply."""
        self.listening().hear(1.0, True)
        self.tell(floor.CallerWords("where is my order"))
        self.hear(0.5, False, user_done=0.9)
        self.tell(floor.Heard(self.turn_id))
        return self

    @property
    def turn_id(self) -> str:
        assert self.turns.current is not None
        return self.turns.current.turn_id

    @property
    def state(self) -> State:
        return self.turns.state

    def done(self, kind: type) -> list[Any]:
        return [action for action in self.actions if isinstance(action, kind)]


@pytest.mark.parametrize(("state", "event"), list(itertools.product(State, floor.EVENT_TYPES)))
def test_every_state_answers_every_event_or_ignores_it_on_purpose(state: State, event: type) -> None:
    assert ((state, event) in _HANDLERS) != ((state, event) in WITHOUT_EFFECT)


@pytest.mark.parametrize("event", floor.EVENT_TYPES)
def test_a_closed_call_does_nothing_more(event: type) -> None:
    table = Table().listening()
    table.tell(floor.Gone())
    assert table.state is State.CLOSED and table.tell(SAMPLE_EVENTS[event]) == []


def test_no_way_leads_out_of_closed() -> None:
    assert NEXT[State.CLOSED] == frozenset() and State.OVERLAP not in NEXT[State.PROTECTED]


def test_a_transition_outside_the_table_is_our_own_mistake() -> None:
    table = Table().listening()
    with pytest.raises(AssertionError, match="not in the table"):
        table.turns._move(State.OVERLAP)


def test_a_machine_silences_even_what_is_protected_from_people_and_nothing_is_asked_of_it() -> None:
    table = Table()
    table.tell(SAMPLE_EVENTS[floor.Ringing])
    table.listening().tell(floor.Heard("a1"))
    assert table.state is State.PROTECTED
    table.tell(floor.MachineAnswered())
    assert table.state is State.UNATTENDED
    assert [cut.turn_id for cut in table.done(floor.Cut)] == ["a1", "a2"]
    before = len(table.done(floor.TakeFloor))
    table.hear(3.0, True).hear(20.0, False, user_done=0.99)
    table.tell(floor.CallerWords("please leave a message"))
    assert table.state is State.UNATTENDED and len(table.done(floor.TakeFloor)) == before


def test_lines_for_a_machine_or_a_person_who_came_take_the_floor_in_their_order_whatever_was_said() -> None:
    table = Table().speaking()
    table.tell(floor.LinesWanted((floor.LineWanted("notice", is_protected=True), floor.LineWanted("greeting"))))
    assert [cut.reason for cut in table.done(floor.Cut)] == ["interrupt"]
    assert [taken.purpose for taken in table.done(floor.TakeFloor)][-2:] == ["notice", "greeting"]
    assert table.state is State.PROTECTED


def test_an_unattended_call_ends_by_its_length_like_any_other() -> None:
    table = Table(max_call_s=10).listening()
    table.tell(floor.MachineAnswered())
    table.hear(10.1, False)
    assert [taken.purpose for taken in table.done(floor.TakeFloor)] == ["max_length"]


def test_predicted_end_takes_the_floor_and_says_so() -> None:
    table = Table().speaking()
    taken = table.done(floor.TakeFloor)
    assert [(t.purpose, t.how, t.caller_words) for t in taken] == [("reply", "predicted", "where is my order")]


def test_floor_is_not_taken_while_the_caller_is_voiced() -> None:
    table = Table().listening()
    table.tell(floor.CallerWords("where is"))
    table.hear(2.0, True, user_done=0.99)
    assert not table.done(floor.TakeFloor)


def test_missed_end_is_taken_after_its_silence() -> None:
    table = Table().listening().hear(1.0, True)
    table.tell(floor.CallerWords("where is my order"))
    table.hear(1.56, False, user_continues=0.9)
    assert not table.done(floor.TakeFloor)
    table.hear(0.1, False)
    assert [t.how for t in table.done(floor.TakeFloor)] == ["silence"]


def test_what_was_held_stays_held_until_it_is_decided() -> None:
    table = Table().speaking()
    table.hear(0.4, True, interrupt=0.45)
    assert table.done(floor.PausePlayout)
    table.hear(0.12, False, interrupt=0.45, backchannel=0.4)
    assert not table.done(floor.ResumePlayout) and table.state is State.OVERLAP


@pytest.mark.parametrize(("user_done", "taken_after_s"), [(0.29, 1.6), (0.3, 0.7), (0.49, 0.7), (0.5, 0.12)])
def test_the_likelier_the_end_the_shorter_the_silence_that_ends_a_turn(user_done: float, taken_after_s: float) -> None:
    table = Table().listening().hear(1.0, True)
    table.tell(floor.CallerWords("great bye"))
    table.hear(taken_after_s - 0.04, False, user_done=user_done)
    assert not table.done(floor.TakeFloor)
    table.hear(0.06, False, user_done=user_done)
    how = {1.6: "silence", 0.7: "likely", 0.12: "predicted"}[taken_after_s]
    assert [t.how for t in table.done(floor.TakeFloor)] == [how]


def test_a_likely_end_that_was_predicted_before_the_last_word_counts_for_nothing() -> None:
    table = Table().listening().hear(1.0, True)
    table.tell(floor.CallerWords("great"))
    table.hear(0.4, False, user_done=0.3).hear(0.2, True).hear(1.0, False)
    assert not table.done(floor.TakeFloor)


def test_the_patience_for_a_missed_end_bounds_that_for_a_likely_one() -> None:
    table = Table(missed_end_s=0.5).listening().hear(1.0, True)
    table.tell(floor.CallerWords("great bye"))
    table.hear(0.56, False, user_done=0.3)
    assert [t.how for t in table.done(floor.TakeFloor)] == ["silence"]


def test_open_slot_lengthens_the_patience() -> None:
    table = Table().listening().hear(1.0, True)
    table.tell(floor.CallerWords("it is four five", num_slot_digits=2))
    table.hear(1.5, False, user_done=0.9)
    assert not table.done(floor.TakeFloor)
    table.hear(0.2, False)
    assert table.done(floor.TakeFloor)


def test_full_slot_needs_no_patience() -> None:
    table = Table().listening().hear(1.0, True)
    table.tell(floor.CallerWords("45612", num_slot_digits=5))
    table.hear(0.3, False, user_done=0.9)
    assert table.done(floor.TakeFloor)


def test_short_sound_without_words_is_noise() -> None:
    table = Table().listening().hear(0.3, True).hear(3.0, False)
    assert not table.done(floor.TakeFloor) and table.turns.caller.voiced_s == 0


def test_caller_who_asks_to_wait_is_waited_for() -> None:
    table = Table().listening().hear(0.6, True)
    table.tell(floor.CallerWords("one moment"))
    table.hear(5.0, False, user_waits=0.9)
    assert not table.done(floor.TakeFloor)


def test_duck_comes_with_the_first_voiced_piece() -> None:
    table = Table().speaking().hear(FRAME_S, True)
    assert table.done(floor.DuckPlayout) and table.state is State.OVERLAP


@pytest.mark.parametrize(("probability", "decided_s"), [(0.9, 0.5), (0.3, 0.9)])
def test_interruption_holds_the_agent_after_300_ms_and_is_decided_by_900(probability: float, decided_s: float) -> None:
    table = Table().speaking().hear(0.28, True, interrupt=probability)
    assert table.state is State.OVERLAP and not table.done(floor.PausePlayout)
    began = table.now - 0.28
    table.hear(3 * FRAME_S, True, interrupt=probability)
    assert table.done(floor.PausePlayout)
    while table.state is State.OVERLAP:
        table.hear(FRAME_S, True, interrupt=probability)
    assert table.now - began == pytest.approx(decided_s, abs=0.05)
    assert table.done(floor.Cut)[-1].reason == "interrupt" and table.state is State.LISTENING


def test_held_at_the_sample_while_it_is_not_decided() -> None:
    table = Table().speaking().hear(0.5, True, interrupt=0.2)
    assert len(table.done(floor.PausePlayout)) == 1


def test_backchannel_is_forgotten_and_the_same_voice_does_not_duck_again() -> None:
    table = Table().speaking().hear(0.4, True, backchannel=0.8).hear(0.2, False, backchannel=0.8)
    assert table.done(floor.DiscardOverlap)[0].why == "backchannel" and table.state is State.SPEAKING
    assert not table.done(floor.Cut)


def test_lasting_noise_ducks_once_until_it_turns_into_speech() -> None:
    table = Table().speaking().hear(2.0, True, idle=0.9)
    assert len(table.done(floor.DuckPlayout)) == 1 and table.state is State.SPEAKING
    table.hear(0.1, True, interrupt=0.9)
    assert len(table.done(floor.DuckPlayout)) == 2


def test_overlap_at_the_very_end_still_decides_whose_words_they_were() -> None:
    table = Table().speaking().hear(0.2, True)
    table.tell(floor.Heard(table.turn_id, is_finished=True))
    assert table.state is State.OVERLAP and not table.done(floor.TurnOver)
    table.hear(0.6, True, interrupt=0.9)
    assert table.done(floor.Cut)


def test_protected_turn_is_not_touched() -> None:
    table = Table()
    table.tell(SAMPLE_EVENTS[floor.Ringing])
    table.tell(floor.Answered())
    table.tell(floor.Heard(table.turn_id))
    table.hear(1.5, True, interrupt=0.99)
    assert table.state is State.PROTECTED and not table.done(floor.DuckPlayout) + table.done(floor.Cut)


def test_notice_stays_when_the_greeting_before_it_is_cut() -> None:
    table = Table()
    opening = (floor.LineWanted("greeting"), floor.LineWanted("notice", is_protected=True))
    table.tell(floor.Ringing(opening))
    table.tell(floor.Answered())
    table.tell(floor.Heard(table.turn_id))
    table.hear(0.8, True, interrupt=0.9)
    assert table.state is State.PROTECTED


def test_key_stops_the_agent_at_once() -> None:
    table = Table().speaking()
    table.tell(floor.KeyPressed())
    assert table.done(floor.Cut) and table.state is State.LISTENING


def test_dry_playout_is_owed_speech_again() -> None:
    table = Table().speaking()
    table.tell(floor.PlayoutDry(table.turn_id))
    table.hear(1.6, False)
    assert table.done(floor.Filler)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="decide_max_s"):
        TurnTakingConfig(decide_min_s=0.7, decide_max_s=0.3)
    with pytest.raises(ValueError, match="recover_after_s"):
        TurnTakingConfig(filler_after_s=5.0)
