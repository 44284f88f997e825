"""The floor's states and the queue of the agent's turns: which turn is current, and what state that is.

The mechanics under agent/turn_taking.py, which decides when. The table `NEXT` lists every state with the states that
may follow; `_move` refuses anything else. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from agent import floor
from agent.duplex_decisions import CallerTurn
from agent.floor import Action, TurnTakingConfig


class State(StrEnum):
    WAITING = "waiting"  # ringing: nothing may be heard yet
    LISTENING = "listening"
    THINKING = "thinking"
    SPEAKING = "speaking"
    PROTECTED = "protected"
    OVERLAP = "overlap"
    UNATTENDED = "unattended"  # a machine has answered our call: nobody hears us, nothing is said
    CLOSING = "closing"
    CLOSED = "closed"


_OPEN = frozenset(
    {State.LISTENING, State.THINKING, State.SPEAKING, State.PROTECTED, State.UNATTENDED, State.CLOSING, State.CLOSED}
)
NEXT: dict[State, frozenset[State]] = {
    State.WAITING: _OPEN,
    State.LISTENING: _OPEN,
    State.THINKING: _OPEN,
    State.SPEAKING: _OPEN | {State.OVERLAP},
    State.PROTECTED: _OPEN,
    State.OVERLAP: _OPEN,
    State.UNATTENDED: _OPEN,
    State.CLOSING: frozenset({State.CLOSING, State.CLOSED}),
    State.CLOSED: frozenset(),
}


@dataclass
class AgentTurn:
    """One stretch of the floor that the agent wants or has."""

    turn_id: str
    purpose: str  # "reply", or the key of a fixed line
    is_protected: bool = False
    closing_cause: str = ""
    is_audible: bool = False
    owed_since: float = 0.0
    has_filler: bool = False


@dataclass
class AgentTurns:
    """The floor of one call. `TurnTaking` extends it; nobody else writes it."""

    config: TurnTakingConfig = field(default_factory=TurnTakingConfig)
    slot_digits: int = 0  # length of the number this line expects, 0 = none
    state: State = State.WAITING
    caller: CallerTurn = field(default_factory=CallerTurn)
    queue: list[AgentTurn] = field(default_factory=list)
    _num_turns: int = 0
    _last_voiced_at: float = 0.0  # wall
    _last_voiced_audio_s: float = -1.0
    _listening_since: float = 0.0
    _closing_since: float = 0.0
    _waiting_lines: list[floor.LineWanted] = field(default_factory=list)
    _actions: list[Action] = field(default_factory=list)

    def skip_turns(self, num_turns: int) -> None:
        """An earlier agent of this call has used so many turn ids."""
        self._num_turns += num_turns

    @property
    def current(self) -> AgentTurn | None:
        return self.queue[0] if self.queue else None

    def is_caller_voiced(self, now: float) -> bool:
        return self._last_voiced_audio_s >= 0 and now - self._last_voiced_at < self.config.burst_silence_s

    def may_duck(self, turn_id: str) -> bool:
        """False for a turn that must be heard in full: whatever the caller says, it stays as loud as it is."""
        return not any(turn.turn_id == turn_id and (turn.is_protected or turn.closing_cause) for turn in self.queue)

    def _move(self, state: State) -> None:
        assert state in NEXT[self.state], f"{self.state} -> {state} is not in the table"
        self.state = state

    def _take_floor(
        self, purpose: str, now: float, *, is_protected: bool = False, closing_cause: str = "", how: str = ""
    ) -> AgentTurn:
        self._num_turns += 1
        turn = AgentTurn(f"a{self._num_turns}", purpose, is_protected, closing_cause, owed_since=now)
        self.queue.append(turn)
        self._actions.append(floor.TakeFloor(turn.turn_id, purpose, self.caller.words, self.caller.confidence, how))
        if self.state is not State.WAITING and self.current is turn:
            self._enter_current(now)
        return turn

    def _enter_current(self, now: float) -> None:
        """The first of the queue is what the agent says now; without one the caller has the floor."""
        turn = self.current
        if turn is None:
            if self.state is not State.LISTENING:
                self._move(State.LISTENING)
                self._listening_since = now
            self._say_waiting_line(now)
        elif turn.closing_cause:
            self._closing_since = now
            self._move(State.CLOSING)
        else:
            turn.owed_since = now
            self._move(State.PROTECTED if turn.is_protected else State.SPEAKING if turn.is_audible else State.THINKING)

    def _cut_current(self, reason: str, now: float) -> None:
        """The current turn ends here. Queued turns fall with it, except those that must be heard."""
        turn, *rest = self.queue
        self._actions.append(floor.Cut(turn.turn_id, reason))
        for dropped in [t for t in rest if not t.is_protected]:
            self._actions.append(floor.Cut(dropped.turn_id, "false_end"))
        self.queue = [t for t in rest if t.is_protected]
        self._enter_current(now)

    def _say_waiting_line(self, now: float) -> None:
        if self._waiting_lines and not self.queue and not self.is_caller_voiced(now):
            line = self._waiting_lines.pop(0)
            self.caller = CallerTurn()
            self._take_floor(line.purpose, now, is_protected=line.is_protected, closing_cause=line.closing_cause)
