"""What time alone decides about the floor: speech that is owed, a silent caller, a call that closes or lasts too long.

The promises of agent/turn_taking.py, which calls these at every tick: the caller is not left in silence, and a call
ends. Time stands still while the party is on hold (agent/hold_clock.py), but for the length of the call. Between the
queue (agent/agent_turns.py) and the decisions about the caller's voice, of which it knows nothing. Pure; sources:
users.md P8-P12, L9.
"""

from __future__ import annotations

from dataclasses import dataclass

from agent import floor
from agent.agent_turns import AgentTurns, State
from agent.duplex_decisions import CallerTurn


@dataclass
class TurnClock(AgentTurns):
    answered_at: float | None = None
    _num_reprompts: int = 0
    _hang_up_at: float | None = None
    _held_s: float = 0.0  # not in `now`

    def _on_hold(self, event: floor.OnHold, now: float) -> None:
        """Nothing may be said; only a call that has nothing more to say, or that is too long, ends here."""
        self._held_s = event.held_s
        turn = self.current
        is_done = turn is not None and self._hang_up_at is not None
        if is_done or self._has_lasted(now):
            self._actions.append(floor.HangUp(turn.closing_cause if is_done and turn else "max_length"))
            self._move(State.CLOSED)

    def _is_too_long(self, now: float) -> bool:
        return self.state is not State.CLOSING and self._has_lasted(now)

    def _has_lasted(self, now: float) -> bool:
        """Holds count: they take a line."""
        return self.answered_at is not None and now + self._held_s - self.answered_at >= self.config.max_call_s

    def _close_for_length(self, now: float) -> None:
        self._actions += [floor.Cut(turn.turn_id, "interrupt") for turn in self.queue]
        self.queue.clear()
        self._take_floor("max_length", now, closing_cause="max_length")

    def _watch_owed(self, now: float) -> None:
        turn = self.current
        if turn is None or (self.state is State.PROTECTED and turn.is_audible):
            return
        owed_s = now - turn.owed_since
        if owed_s >= self.config.recover_after_s:
            self._actions.append(floor.Defect("silence", f"{turn.purpose} owed for {owed_s:.1f} s", turn.turn_id))
            self._cut_current("recover", now)
            if self.state is State.LISTENING:
                self.caller = CallerTurn()
                self._take_floor("apology", now)
        elif owed_s >= self.config.filler_after_s and not turn.has_filler:
            turn.has_filler = True
            self._actions.append(floor.Filler(turn.turn_id))

    def _break_silence(self, now: float) -> None:
        if self.state is not State.LISTENING:
            return
        self._say_waiting_line(now)
        if self.state is not State.LISTENING:
            return
        silent_since = max(self._listening_since, self._last_voiced_at)
        if now - silent_since < self.config.reprompt_after_s:
            return
        self.caller = CallerTurn()
        if self._num_reprompts >= self.config.max_reprompts:
            self._take_floor("goodbye_silence", now, closing_cause="silence")
        else:
            self._num_reprompts += 1
            self._take_floor("reprompt", now)

    def _finish_closing(self, now: float) -> None:
        turn = self.current
        assert turn is not None
        is_heard = self._hang_up_at is not None and now >= self._hang_up_at
        if is_heard or now - self._closing_since >= self.config.closing_max_s:
            self._actions.append(floor.HangUp(turn.closing_cause))
            self._move(State.CLOSED)
