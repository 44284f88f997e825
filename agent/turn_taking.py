"""Who may speak: the only place that decides. Pure: `step(event, now) -> actions`, no clock, no I/O, no text of its
own.

Theory
------
There is one *floor*. The agent has it while an *agent turn* is the current one: from the decision to speak (THINKING:
it owes speech and nothing of it is heard) through its audible part (SPEAKING) until its last sample has left the
wire. Otherwise the caller has it (LISTENING), whether speaking or silent. Agent turns queue: the next becomes current
when the one before ends.

Three overlaps are possible, each with its own rule:

* caller voiced before anything of a draft was heard (THINKING): a *false end*. The caller had not finished. The draft
  is cut, its tools never run, the caller's turn goes on as if nothing had been.
* caller voiced while the agent is heard (SPEAKING): OVERLAP. The agent ducks on the spot, holds at the exact sample
  when the caller goes on, and between `decide_min_s` and `decide_max_s` after the onset the duplex prediction
  decides: *interrupt* (cut; the caller has the floor) or *backchannel*, noise, echo (resume at that sample; the
  overlap is forgotten).
* caller voiced in a *protected* turn (PROTECTED) or while the call closes (CLOSING): nothing happens to the floor.
  The turn is heard in full; what the caller says is still listened to and transcribed.

A call that we placed may be answered by a machine (agent/callee_side.py finds out). Then nobody hears us: UNATTENDED.
The agent is silent, whatever it was saying, and neither answers nor asks whether somebody is there, until there is
somebody or something to speak to.

Two promises are kept by time alone. The caller is not left in silence: an owed turn that is not heard gets a filler
after `filler_after_s` and is given up after `recover_after_s`; a silent caller is asked again, then the call closes.
And a call ends: `max_call_s`. On hold nobody hears us: the time that `step` is told stands still, and only the length
of the call counts on (OnHold).

The states, which may follow which, and the queue are in agent/agent_turns.py; what time alone decides in
agent/turn_clock.py; the two decisions, as arithmetic, in agent/duplex_decisions.py. Every (state, event) pair is
answered by `_HANDLERS`; a pair that is not in it is deliberately without effect (tests/agent lists them).

Sources: MinMo arXiv 2501.06282 section 3.4 (two decisions); Duplex rules of design §4a; users.md P8-P12, P16, L1, L2,
L4, L6, L9.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from agent import floor
from agent.agent_turns import AgentTurn, State
from agent.duplex_decisions import CallerTurn, EndOfTurn, Meaning, Overlap, end_of_turn, meaning_of
from agent.floor import Action, Event
from agent.turn_clock import TurnClock


@dataclass
class TurnTaking(TurnClock):
    """Drive it with `step`; it owns the floor of one call and knows neither audio nor models."""

    overlap: Overlap | None = None
    _doubtful: Overlap | None = None  # resumed, but its voice still lasts
    _audio_s: float = 0.0  # the caller's clock
    _stretch_s: float = 0.0  # voiced audio of the running stretch
    _is_ignoring: bool = False  # a voice that was judged noise: until it falls silent
    _prediction: floor.Predicted | None = None

    # ------------------------------------------------------------------- drive

    def step(self, event: Event, now: float) -> list[Action]:
        """Everything that follows from `event` at `now` (seconds, any steady origin), in order."""
        self._actions = []
        handler = _HANDLERS.get((self.state, type(event)))
        if handler is not None:
            handler(self, event, now)
        return self._actions

    # ---------------------------------------------------------------- life of the call

    def _on_ringing(self, event: floor.Ringing, now: float) -> None:
        for line in event.opening:
            self._take_floor(line.purpose, now, is_protected=line.is_protected)

    def _on_answered(self, _event: floor.Answered, now: float) -> None:
        self.answered_at = self._listening_since = now
        self._enter_current(now)

    def _on_machine(self, _event: floor.Event, now: float) -> None:
        if self.state is State.OVERLAP:
            self._actions.append(floor.ResumePlayout())
        self._leave_overlap()
        self._doubtful = None
        self._actions += [floor.Cut(turn.turn_id, "interrupt") for turn in self.queue]
        self.queue.clear()
        self._waiting_lines.clear()
        self._move(State.UNATTENDED)

    def _on_lines_wanted(self, event: floor.LinesWanted, now: float) -> None:
        if self.state is not State.UNATTENDED:
            self._on_machine(event, now)
        self.caller = CallerTurn()
        for line in event.lines:
            self._take_floor(line.purpose, now, is_protected=line.is_protected)

    def _on_line_wanted(self, event: floor.LineWanted, now: float) -> None:
        self._waiting_lines.append(event)
        if event.closing_cause and self.state in (State.SPEAKING, State.THINKING, State.OVERLAP):
            self._actions.append(floor.ResumePlayout())  # whatever was held makes way for the goodbye
            self._cut_current("interrupt", now)
        elif self.state is State.LISTENING:
            self._say_waiting_line(now)

    def _on_hang_up_wanted(self, event: floor.HangUpWanted, now: float) -> None:
        """The call's own decision (a tool that was heard, a transfer that went through): nothing more to say."""
        self._actions.append(floor.HangUp(event.cause))
        self._move(State.CLOSED)

    def _on_gone(self, _event: floor.Gone, now: float) -> None:
        self.queue.clear()
        self._move(State.CLOSED)

    # ------------------------------------------------------------------- playout

    def _on_heard(self, event: floor.Heard, now: float) -> None:
        turn = self.current
        if turn is None or event.turn_id != turn.turn_id:
            return
        turn.is_audible = True
        turn.owed_since = now
        if self.state is State.THINKING:
            self._move(State.SPEAKING)
            self._stretch_s = 0.0  # what is voiced from here on is an overlap, not a false end
        if event.is_finished:
            self._on_turn_over(turn, now)

    def _on_turn_over(self, turn: AgentTurn, now: float) -> None:
        if self.state is State.OVERLAP and self.overlap is not None:
            self.overlap.is_agent_done = True  # what the overlap meant still decides whose words they were
            return
        if self._doubtful is not None:  # it lasted longer than we did: the caller's words after all
            self.overlap, self._doubtful, self._is_ignoring = self._doubtful, None, False
            self._move(State.OVERLAP)
            self._interrupt(now)
            return
        self._actions.append(floor.TurnOver(turn.turn_id))
        if turn.closing_cause:
            self._hang_up_at = now + self.config.linger_s
            return
        self.queue.pop(0)
        if not self.queue:
            self._listening_since = now
            if self.state is not State.PROTECTED:
                self.caller = CallerTurn()
        self._enter_current(now)

    def _on_dry(self, event: floor.PlayoutDry, now: float) -> None:
        """Everything that was made of the current turn has been heard, and it is not complete: speech is owed again."""
        turn = self.current
        if turn is None or turn.turn_id != event.turn_id:
            return
        turn.owed_since, turn.is_audible = now, False
        if self.state is State.SPEAKING:
            self._move(State.THINKING)

    def _on_lost(self, event: floor.TurnLost, now: float) -> None:
        lost = [turn for turn in self.queue if turn.turn_id == event.turn_id]
        if not lost:
            return
        if lost[0] is not self.current:
            self.queue.remove(lost[0])
            self._actions.append(floor.Cut(event.turn_id, "recover"))
            return
        if self.state is State.CLOSING:  # the goodbye cannot be said: close without it
            self._hang_up_at = now
            return
        self._leave_overlap()
        self._cut_current("recover", now)

    # -------------------------------------------------------------------- caller

    def _hear(self, event: floor.CallerAudio, now: float) -> bool:
        """Book-keeping common to all states; true when this piece is voiced and not to be ignored."""
        self._audio_s = event.end_s
        if not event.is_voiced:
            if now - self._last_voiced_at >= self.config.burst_silence_s:
                self._stretch_s = 0.0
                self._is_ignoring = False
                self._forget_doubtful()
            return False
        self._last_voiced_at, self._last_voiced_audio_s = now, event.end_s
        self._stretch_s += event.duration_s
        return not self._is_ignoring

    def _on_audio_quietly(self, event: floor.CallerAudio, now: float) -> None:
        if self._hear(event, now):
            self.caller.voiced_s += event.duration_s
            self.caller.has_waited = False
        self._on_tick(floor.Tick(), now)

    def _on_audio_thinking(self, event: floor.CallerAudio, now: float) -> None:
        if self._hear(event, now) and self._stretch_s >= self.config.false_end_voiced_s:
            self.caller.voiced_s += self._stretch_s
            self._cut_current("false_end", now)
            return
        self._on_tick(floor.Tick(), now)

    def _on_audio_speaking(self, event: floor.CallerAudio, now: float) -> None:
        if self._hear(event, now) and self._stretch_s >= self.config.onset_voiced_s:
            self.overlap = Overlap(started_at=now - self._stretch_s, started_at_audio_s=event.end_s - self._stretch_s)
            self.overlap.voiced_s = self._stretch_s
            self._actions.append(floor.DuckPlayout())
            self._move(State.OVERLAP)
            return
        self._on_tick(floor.Tick(), now)

    def _on_audio_overlap(self, event: floor.CallerAudio, now: float) -> None:
        assert self.overlap is not None
        if self._hear(event, now):
            self.overlap.voiced_s += event.duration_s
        self._decide_overlap(now)

    def _on_words(self, event: floor.CallerWords, now: float) -> None:
        if self.state is State.OVERLAP and self.overlap is not None:
            self.overlap.words = event.text
            return
        if self._doubtful is not None:
            self._doubtful.words = event.text
            return
        self.caller.words = event.text
        self.caller.confidence = event.confidence
        self.caller.num_slot_digits = event.num_slot_digits
        if event.text:
            self._num_reprompts = 0

    def _on_predicted(self, event: floor.Predicted, now: float) -> None:
        self._prediction = event
        if event.user_waits >= self.config.user_done_probability:
            self.caller.has_waited = True
        self._end_caller_turn(now)

    def _on_predicted_speaking(self, event: floor.Predicted, now: float) -> None:
        """A voice that was taken for noise has turned into speech: decided at once, it has lasted long enough."""
        if self._doubtful is not None and event.interrupt >= self.config.interrupt_probability:
            self._actions.append(floor.DuckPlayout())
            self.overlap, self._doubtful, self._is_ignoring = self._doubtful, None, False
            self._move(State.OVERLAP)
            self._interrupt(now)

    def _on_predicted_overlap(self, event: floor.Predicted, now: float) -> None:
        assert self.overlap is not None
        if event.at_s > self.overlap.started_at_audio_s:
            self.overlap.prediction = event
        self._decide_overlap(now)

    def _on_key(self, _event: floor.KeyPressed, now: float) -> None:
        """A key is never noise: it stops the agent at once, and the silence clock starts anew."""
        self._num_reprompts = 0
        self._listening_since = now
        if self.state in (State.SPEAKING, State.THINKING, State.OVERLAP):
            self._leave_overlap()
            self._cut_current("interrupt", now)

    # ------------------------------------------------------------------ decisions

    def _end_caller_turn(self, now: float) -> None:
        """LISTENING only."""
        last = self._prediction
        if last is not None and last.at_s < self._last_voiced_audio_s:
            last = None  # it does not know the caller's last words
        is_slot_open = 0 < self.caller.num_slot_digits < self.slot_digits
        match end_of_turn(self.caller, now - self._last_voiced_at, last, is_slot_open, self.config):
            case EndOfTurn.PREDICTED | EndOfTurn.LIKELY | EndOfTurn.SILENCE as how:
                self._take_floor("reply", now, how=how.value)
            case EndOfTurn.NOISE:
                self.caller = CallerTurn()

    def _decide_overlap(self, now: float) -> None:
        overlap = self.overlap
        assert overlap is not None
        match meaning_of(overlap, now - overlap.started_at, now - self._last_voiced_at, self.config):
            case Meaning.INTERRUPT:
                self._interrupt(now)
            case Meaning.BACKCHANNEL | Meaning.NOISE as why:
                self._resume(now, why.value)
            case Meaning.LIKELY if not overlap.is_paused:
                overlap.is_paused = True
                self._actions.append(floor.PausePlayout())

    def _cut_current(self, reason: str, now: float) -> None:
        self._doubtful = None  # the cut tells the runtime whose words they were
        super()._cut_current(reason, now)

    def _interrupt(self, now: float) -> None:
        overlap = self._leave_overlap()
        self.caller = CallerTurn(voiced_s=overlap.voiced_s, words=overlap.words)
        self._cut_current("interrupt", now)

    def _resume(self, now: float, why: str) -> None:
        """The agent goes on. While that voice lasts it may still turn into speech: nothing of it is forgotten yet."""
        overlap = self._leave_overlap()
        overlap.why = why
        self._is_ignoring = True  # until it falls silent: the same voice must not duck us again and again
        self._actions.append(floor.ResumePlayout())
        self._doubtful = overlap
        self._move(State.SPEAKING)
        if overlap.is_agent_done:
            turn = self.current
            assert turn is not None
            self._forget_doubtful()
            self._on_turn_over(turn, now)
        elif not self.is_caller_voiced(now):
            self._forget_doubtful()

    def _forget_doubtful(self) -> None:
        if self._doubtful is not None:
            self._actions.append(floor.DiscardOverlap(self._doubtful.why, self._doubtful.words))
            self._doubtful = None

    def _leave_overlap(self) -> Overlap:
        overlap = self.overlap or Overlap(started_at=0.0, started_at_audio_s=0.0)
        self.overlap = None
        return overlap

    # ----------------------------------------------------------------------- time

    def _on_tick(self, _event: Event, now: float) -> None:
        if self._is_too_long(now):
            self._actions.append(floor.ResumePlayout())
            self._leave_overlap()
            self._close_for_length(now)
            return
        match self.state:
            case State.LISTENING:
                self._end_caller_turn(now)
                self._break_silence(now)
            case State.THINKING | State.PROTECTED:
                self._watch_owed(now)
            case State.OVERLAP:
                self._decide_overlap(now)
            case State.CLOSING:
                self._finish_closing(now)


_Handler = Callable[[TurnTaking, Any, float], None]
_T = TurnTaking
_ACTIVE = (State.LISTENING, State.THINKING, State.SPEAKING, State.PROTECTED, State.OVERLAP)


def _in_all(states: tuple[State, ...], event: type, handler: _Handler) -> dict[tuple[State, type], _Handler]:
    return {(state, event): handler for state in states}


_HANDLERS: dict[tuple[State, type], _Handler] = {
    (State.WAITING, floor.Ringing): _T._on_ringing,
    (State.WAITING, floor.Answered): _T._on_answered,
    (State.WAITING, floor.HangUpWanted): _T._on_hang_up_wanted,
    (State.WAITING, floor.Gone): _T._on_gone,
    **_in_all((*_ACTIVE, State.UNATTENDED, State.CLOSING), floor.Gone, _T._on_gone),
    **_in_all((*_ACTIVE, State.UNATTENDED, State.CLOSING), floor.HangUpWanted, _T._on_hang_up_wanted),
    **_in_all((*_ACTIVE, State.UNATTENDED, State.CLOSING), floor.Tick, _T._on_tick),
    **_in_all((*_ACTIVE, State.UNATTENDED, State.CLOSING), floor.OnHold, _T._on_hold),
    **_in_all(_ACTIVE, floor.MachineAnswered, _T._on_machine),
    **_in_all((*_ACTIVE, State.UNATTENDED), floor.LinesWanted, _T._on_lines_wanted),
    **_in_all((*_ACTIVE, State.CLOSING), floor.Heard, _T._on_heard),
    **_in_all(_ACTIVE, floor.PlayoutDry, _T._on_dry),
    **_in_all((*_ACTIVE, State.CLOSING), floor.TurnLost, _T._on_lost),
    **_in_all(_ACTIVE, floor.LineWanted, _T._on_line_wanted),
    **_in_all(_ACTIVE, floor.CallerWords, _T._on_words),
    **_in_all(_ACTIVE, floor.KeyPressed, _T._on_key),
    **_in_all(
        (State.LISTENING, State.PROTECTED, State.UNATTENDED, State.CLOSING), floor.CallerAudio, _T._on_audio_quietly
    ),
    (State.THINKING, floor.CallerAudio): _T._on_audio_thinking,
    (State.SPEAKING, floor.CallerAudio): _T._on_audio_speaking,
    (State.OVERLAP, floor.CallerAudio): _T._on_audio_overlap,
    (State.LISTENING, floor.Predicted): _T._on_predicted,
    (State.SPEAKING, floor.Predicted): _T._on_predicted_speaking,
    (State.OVERLAP, floor.Predicted): _T._on_predicted_overlap,
}
