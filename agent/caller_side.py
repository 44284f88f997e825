"""The caller's turn of the moment: what was recognised of it, and its row in the transcript.

The row is written when the floor goes to the agent, and corrected while that may still turn out too early (a false end,
a caption that comes late). Pure.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from agent import floor
from agent.call_context import CallContext
from agent.caller_words import CallerWords, count_trailing_digits
from agent.transcript import Transcript
from minmo_runtime.api import INPUT_SAMPLE_RATE_HZ, Caption


@dataclass
class CallerSide:
    context: CallContext
    transcript: Transcript
    leg_rate_hz: int
    words: CallerWords = field(default_factory=CallerWords)
    turn_id: str = ""  # row of the turn that may still go on

    def on_caption(self, event: Caption, *, is_thinking: bool) -> floor.CallerWords | None:
        """All words of the open turn; None when this one belongs to a turn before. `is_thinking`: the answer is being
        made and not heard yet, so the row may still be corrected.
        """
        words, is_open = self.words, self.words.hear(event)
        if event.is_final:
            confidence = round(event.confidence, 3)
            self.context.journal("caption", text=event.text, confidence=confidence, during_reply=event.during_reply)
            if is_open and self.turn_id and is_thinking:
                self.correct_turn()
        return floor.CallerWords(words.text, words.confidence, count_trailing_digits(words.text)) if is_open else None

    def close_turn(self, text: str) -> str:
        """The floor goes to the agent: keeps what was said, and says what it was. `text`: where no caption has come."""
        text = self.words.text or text
        if self.turn_id:
            self.correct_turn()
        elif text:
            self.keep_turn(text)
        return text

    def keep_turn(self, text: str | None = None, *, source: str = "voice", intent: str = "") -> None:
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
        self.context.add(*kept)

    def end_turn(self, *, is_answered: bool) -> None:
        """The agent is audible: what follows belongs to another turn. Without an answer (a fixed line, e.g. a
        protected one that the caller talked over) what was said until then has no row yet.
        """
        if self.words.text and not self.turn_id and not is_answered:
            self.keep_turn()
        self.turn_id = ""
        self.begin_turn()

    def begin_turn(self) -> None:
        """What was heard up to now is over."""
        self.words.begin_turn(self.context.pushed_16k)

    def correct_turn(self) -> None:
        """The open turn says more, or something else, than when its row was written."""
        last = self.words.span[1] * self.leg_rate_hz // INPUT_SAMPLE_RATE_HZ
        self.context.add(
            *self.transcript.caller_corrected(
                self.turn_id, self.words.text, end_sample=last, confidence=self.words.confidence
            )
        )
