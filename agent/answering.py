"""When an inbound call is answered: as soon as the engine is ready, or, where the campaign wants its notice as early
media (183, RFC 3960), once that was heard.

Where no early media begins to play (a browser, a party without SDP) or it lasts too long, the call is answered and the
notice is said, or goes on, after the answer. Asks for the floor by events; pure, time is an argument.
"""

from __future__ import annotations

from dataclasses import dataclass

from agent import floor
from agent.call_context import CallContext
from telephony import leg as tel

BEGINS_WITHIN_S = 1.0
LONGEST_S = 15.0  # less than telephony.answer_timeout_s


@dataclass
class Answering:
    context: CallContext
    is_notice_early: bool
    _since: float | None = None  # early media is playing, or about to
    _is_playing: bool = False
    _heard_turn: str = ""  # the notice, heard before the answer

    def ready(self, opening: tuple[floor.LineWanted, ...], now: float) -> floor.Ringing:
        """The engine is. What is made while it rings: all of `opening`, or its first line for early media."""
        if not self.is_notice_early:
            self._answer()
            return floor.Ringing(opening)
        self._since = now
        self.context.add(tel.Progress(leg_id=self.context.leg_id))
        return floor.Ringing(opening[:1])

    def on_played(self, turn_id: str, is_heard_out: bool) -> None:
        """Of any turn: before the answer there is only the notice."""
        if self._since is not None:
            self._is_playing = True
            if is_heard_out:
                self._heard_turn = turn_id
                self._answer()

    def on_tick(self, now: float) -> None:
        if self._since is not None and now - self._since >= (LONGEST_S if self._is_playing else BEGINS_WITHIN_S):
            self._answer()

    def confirmed(self, opening: tuple[floor.LineWanted, ...]) -> list[floor.Event]:
        """The call is answered: what the floor has to be told of before."""
        self._since = None
        if not self.is_notice_early:
            return []
        heard = [floor.Heard(self._heard_turn, is_finished=True)] if self._heard_turn else []
        return [*heard, *opening[1:]]

    def _answer(self) -> None:
        self._since = None
        self.context.add(tel.Answer(leg_id=self.context.leg_id))
