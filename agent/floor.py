"""The vocabulary of turn taking: its settings, what happens to the floor (events) and what follows (actions).

Imported by turn_taking (which decides) and call (which translates legs and runtimes into these words and back). Times
are seconds; `at_s` and `end_s` are on the caller's own clock, seconds of audio received since the leg began.
"""

from __future__ import annotations

from dataclasses import dataclass

TURN_TAKING_RANGES: dict[str, tuple[float, float]] = {
    "onset_voiced_s": (0, 0.5),
    "pause_after_s": (0.1, 1),
    "decide_min_s": (0.1, 1),
    "decide_max_s": (0.3, 2),
    "interrupt_probability": (0, 1),
    "noise_probability": (0, 1),
    "burst_silence_s": (0.02, 1),
    "burst_voiced_s": (0, 1),
    "user_done_probability": (0, 1),
    "end_silence_s": (0.05, 2),
    "likely_end_probability": (0, 1),
    "likely_end_s": (0.2, 5),
    "missed_end_s": (0.5, 5),
    "slot_patience_s": (0.5, 10),
    "wordless_s": (0.1, 5),
    "false_end_voiced_s": (0.04, 1),
    "filler_after_s": (0.5, 10),
    "recover_after_s": (1, 30),
    "reprompt_after_s": (2, 60),
    "max_reprompts": (0, 10),
    "max_call_s": (10, 86_400),
    "closing_max_s": (2, 60),
    "linger_s": (0, 5),
}


@dataclass(frozen=True, kw_only=True)
class TurnTakingConfig:
    """Seconds and probabilities; one set for each situation, because "hard to interrupt" and "patient" are not one
    knob.
    """

    onset_voiced_s: float = 0.0
    """Voiced audio, beyond the leg's own debounced onset, that ducks the agent, 0-0.5."""
    pause_after_s: float = 0.3
    """Overlap after which the ducked agent holds at the sample, unless the prediction says backchannel, 0.1-1."""
    decide_min_s: float = 0.5
    """Earliest decision about an overlap, 0.1-1."""
    decide_max_s: float = 0.9
    """Latest decision about an overlap, 0.3-2; more than decide_min_s."""
    interrupt_probability: float = 0.5
    """P(interrupt) from which an overlap is an interruption before decide_max_s, 0-1."""
    noise_probability: float = 0.75
    """P(idle) + P(backchannel) from which a voice that still lasts at decide_max_s is not taken for speech, 0-1."""
    burst_silence_s: float = 0.1
    """Silence, beyond the leg's hangover, after which a stretch of voiced audio is over, 0.02-1."""
    burst_voiced_s: float = 0.3
    """A burst with less voiced audio than this is noise whatever is predicted, 0-1."""
    user_done_probability: float = 0.5
    """P(user_done) from which the caller's turn is over, 0-1."""
    end_silence_s: float = 0.12
    """The floor is never taken in a shorter silence (beyond the leg's hangover), 0.05-2."""
    likely_end_probability: float = 0.3
    """P(user_done) from which likely_end_s is silence enough, 0-1 (nano: 98 % of true ends reach it, 21 % of pauses).
    """
    likely_end_s: float = 0.7
    """Silence that ends a turn whose end is predicted as likely but not as certain, 0.2-5; missed_end_s bounds it."""
    missed_end_s: float = 1.6
    """Silence that ends a turn with words in it although no end was predicted, 0.5-5 (design: 1.2-1.6)."""
    slot_patience_s: float = 1.6
    """The same while a number of known length is not complete; predictions of an end are not believed before, 0.5-10.
    """
    wordless_s: float = 0.6
    """A turn of at least this much voiced audio but no words counts as not understood; less is noise, 0.1-5."""
    false_end_voiced_s: float = 0.16
    """Voiced audio that takes an unheard draft back, 0.04-1."""
    filler_after_s: float = 1.5
    """Owed speech that is not heard gets a filler after this, 0.5-10."""
    recover_after_s: float = 4.0
    """... and is given up after this, 1-30; more than filler_after_s."""
    reprompt_after_s: float = 7.0
    """Silence of both sides after which the caller is asked again, 2-60."""
    max_reprompts: int = 2
    """Times a silent caller is asked before the call closes, 0-10."""
    max_call_s: float = 600.0
    """Longest call, 10-86400."""
    closing_max_s: float = 15.0
    """A closing turn that is not heard to its end by then is given up, 2-60."""
    linger_s: float = 0.3
    """Between the last word and BYE, 0-5."""

    def __post_init__(self) -> None:
        for key, (low, high) in TURN_TAKING_RANGES.items():
            if not low <= getattr(self, key) <= high:
                raise ValueError(f"{key} = {getattr(self, key)}: must be {low:g} to {high:g}")
        if not self.decide_min_s < self.decide_max_s:
            raise ValueError(
                f"decide_max_s = {self.decide_max_s}: must be more than decide_min_s ({self.decide_min_s})"
            )
        if not self.filler_after_s < self.recover_after_s:
            raise ValueError(
                f"recover_after_s = {self.recover_after_s}: must be more than filler_after_s ({self.filler_after_s})"
            )


# ------------------------------------------------------------------------- events


@dataclass(frozen=True)
class LineWanted:
    """The call wants a fixed line spoken as soon as the floor is free. With a cause, the call closes once it was
    heard.
    """

    purpose: str
    is_protected: bool = False
    closing_cause: str = ""


@dataclass(frozen=True)
class Ringing:
    """The call will be answered; `opening` is made while it rings, so that it can be heard at once."""

    opening: tuple[LineWanted, ...]


@dataclass(frozen=True)
class Answered:
    pass


@dataclass(frozen=True)
class MachineAnswered:
    """Nobody hears us: a machine speaks. Everything is cut, what is protected from people too, and nothing is said
    until `LinesWanted`."""


@dataclass(frozen=True)
class LinesWanted:
    """Now, and in this order: a machine records, or a person has come to the telephone. What was being said ends."""

    lines: tuple[LineWanted, ...]


@dataclass(frozen=True)
class CallerAudio:
    """A piece of caller audio, echo removed, judged voiced or not."""

    is_voiced: bool
    duration_s: float
    end_s: float


@dataclass(frozen=True)
class CallerWords:
    """All words of the open caller turn (or of the overlap) as recognised so far."""

    text: str
    confidence: float = 1.0
    num_slot_digits: int = 0  # digits of a number being dictated, at the end of `text`


@dataclass(frozen=True)
class Predicted:
    """The duplex predictor's posterior for audio up to `at_s`."""

    at_s: float
    idle: float = 0.0
    user_continues: float = 0.0
    user_done: float = 0.0
    user_waits: float = 0.0
    backchannel: float = 0.0
    interrupt: float = 0.0


@dataclass(frozen=True)
class KeyPressed:
    pass


@dataclass(frozen=True)
class Heard:
    """Voiced audio of agent turn `turn_id` has left on the wire; `is_finished`: all of it."""

    turn_id: str
    is_finished: bool = False


@dataclass(frozen=True)
class PlayoutDry:
    """All audio made so far of `turn_id` has left, and the turn is not complete."""

    turn_id: str


@dataclass(frozen=True)
class TurnLost:
    """Whoever was making `turn_id` is gone: it will never be complete."""

    turn_id: str


@dataclass(frozen=True)
class HangUpWanted:
    cause: str


@dataclass(frozen=True)
class Gone:
    """The leg is gone, or another party has it."""


@dataclass(frozen=True)
class Tick:
    pass


@dataclass(frozen=True)
class OnHold:
    """Nobody hears us; the time told with every event stands still meanwhile. `held_s`: so far, in all."""

    held_s: float


Event = (
    LineWanted
    | Ringing
    | Answered
    | MachineAnswered
    | LinesWanted
    | CallerAudio
    | CallerWords
    | Predicted
    | KeyPressed
    | Heard
    | PlayoutDry
    | TurnLost
    | HangUpWanted
    | Gone
    | Tick
    | OnHold
)
EVENT_TYPES: tuple[type, ...] = Event.__args__

# ------------------------------------------------------------------------ actions


@dataclass(frozen=True)
class TakeFloor:
    """The agent speaks next, as `turn_id`. `purpose` "reply": answer `caller_words`; else the key of a fixed line."""

    turn_id: str
    purpose: str
    caller_words: str = ""
    caller_confidence: float = 1.0
    how: str = ""  # how the caller's turn came to its end: predicted | likely | silence


@dataclass(frozen=True)
class Cut:
    """Turn `turn_id` ends where it was heard. reason: interrupt | false_end | recover (as in minmo_runtime/api.py)."""

    turn_id: str
    reason: str


@dataclass(frozen=True)
class TurnOver:
    """Turn `turn_id` was heard to its end and stands: what it asked for may be done."""

    turn_id: str


@dataclass(frozen=True)
class DuckPlayout:
    pass


@dataclass(frozen=True)
class PausePlayout:
    pass


@dataclass(frozen=True)
class ResumePlayout:
    pass


@dataclass(frozen=True)
class DiscardOverlap:
    """What the caller said over the agent was no bid for the floor. why: backchannel | noise."""

    why: str
    words: str = ""


@dataclass(frozen=True)
class Filler:
    """Something must be heard now although `turn_id` is not ready."""

    turn_id: str


@dataclass(frozen=True)
class Defect:
    kind: str
    detail: str
    turn_id: str = ""


@dataclass(frozen=True)
class HangUp:
    cause: str


Action = (
    TakeFloor | Cut | TurnOver | DuckPlayout | PausePlayout | ResumePlayout | DiscardOverlap | Filler | Defect | HangUp
)
