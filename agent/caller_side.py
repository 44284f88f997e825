"""The caller's turn of the moment: what was recognised of it, and its row in the transcript.

The row is written when the floor goes to the agent, and corrected while that may still turn out too early (a false end,
a caption that comes late). Pure; returns what to keep.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from agent.caller_words import CallerWords
from agent.events import Keep
from agent.transcript import Transcript
from minmo_runtime.api import INPUT_SAMPLE_RATE_HZ


@dataclass
class CallerSide:
    transcript: Transcript
    leg_rate_hz: int
    words: CallerWords = field(default_factory=CallerWords)
    turn_id: str = ""  # row of the turn that may still go on

    def keep_turn(self, text: str | None = None, *, source: str = "voice", intent: str = "") -> list[Keep]:
        """A row with `text` (None: all words so far). `intent`: said over the agent, and no bid for the floor."""
        first, last = (sample * self.leg_rate_hz // INPUT_SAMPLE_RATE_HZ for sample in self.words.span)
        turn_id, kept = self.transcript.caller_spoke(
            self.words.text if text is None else text,
            start_sample=first,
            end_sample=last,
            confidence=1.0 if source == "keypad" else self.words.confidence,
            source=source,
            intent=intent,
        )
        if not intent and source == "voice":
            self.turn_id = turn_id
        return kept

    def end_turn(self, sample_16k: int, *, is_answered: bool) -> list[Keep]:
        """The agent is audible: what follows belongs to another turn. Without an answer (a fixed line, e.g. a
        protected one that the caller talked over) what was said until then has no row yet.
        """
        kept = self.keep_turn() if self.words.text and not self.turn_id and not is_answered else []
        self.turn_id = ""
        self.words.begin_turn(sample_16k)
        return kept

    def correct_turn(self) -> list[Keep]:
        """The open turn says more, or something else, than when its row was written."""
        last = self.words.span[1] * self.leg_rate_hz // INPUT_SAMPLE_RATE_HZ
        return self.transcript.caller_corrected(
            self.turn_id, self.words.text, end_sample=last, confidence=self.words.confidence
        )
