"""The two decisions of full duplex, as arithmetic on what is known: has the caller finished, and what does an overlap
mean?

agent/turn_taking.py asks, and carries them out. Pure functions: no state of their own, no clock. Sources: MinMo arXiv
2501.06282 section 3.4; the rules of design section 4a.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from agent import floor
from agent.floor import TurnTakingConfig


@dataclass
class CallerTurn:
    """The caller's open stretch: counted on the caller's own clock (seconds of received audio)."""

    voiced_s: float = 0.0
    words: str = ""
    confidence: float = 1.0
    num_slot_digits: int = 0
    has_waited: bool = False  # predicted user_waits: "hold on, let me look"


@dataclass
class Overlap:
    started_at: float
    started_at_audio_s: float
    voiced_s: float = 0.0
    words: str = ""
    prediction: floor.Predicted | None = None
    is_paused: bool = False
    why: str = ""  # backchannel | noise, once the agent went on
    is_agent_done: bool = False  # the current turn was played to its end meanwhile


# ------------------------------------------------------------------ has the caller finished?


class EndOfTurn(StrEnum):
    NOT_YET = "not_yet"
    PREDICTED = "predicted"
    LIKELY = "likely"  # predicted with little certainty, and silent for some time
    SILENCE = "silence"  # missed by the predictor, or nothing was recognised in it
    NOISE = "noise"  # it was no turn at all


def end_of_turn(
    caller: CallerTurn,
    silence_s: float,
    prediction: floor.Predicted | None,
    is_slot_open: bool,
    config: TurnTakingConfig,
) -> EndOfTurn:
    """`prediction`: the last one that covers all that the caller said. `is_slot_open`: a number of known length is not
    complete, so no prediction of an end is believed.
    """
    if caller.voiced_s <= 0 or silence_s < config.end_silence_s:
        return EndOfTurn.NOT_YET
    if caller.has_waited and silence_s < config.reprompt_after_s:
        return EndOfTurn.NOT_YET
    if not caller.words:
        if silence_s < config.missed_end_s:
            return EndOfTurn.NOT_YET
        return EndOfTurn.SILENCE if caller.voiced_s >= config.wordless_s else EndOfTurn.NOISE
    if is_slot_open:
        return EndOfTurn.SILENCE if silence_s >= config.slot_patience_s else EndOfTurn.NOT_YET
    if prediction is not None and prediction.user_done >= config.user_done_probability:
        return EndOfTurn.PREDICTED
    if silence_s >= config.missed_end_s:
        return EndOfTurn.SILENCE
    is_likely = prediction is not None and prediction.user_done >= config.likely_end_probability
    return EndOfTurn.LIKELY if is_likely and silence_s >= config.likely_end_s else EndOfTurn.NOT_YET


# ------------------------------------------------------------------ what does an overlap mean?


class Meaning(StrEnum):
    UNDECIDED = "undecided"
    LIKELY = "likely"  # undecided, but it goes on: hold at the sample
    INTERRUPT = "interrupt"
    BACKCHANNEL = "backchannel"
    NOISE = "noise"


def meaning_of(overlap: Overlap, elapsed_s: float, silence_s: float, config: TurnTakingConfig) -> Meaning:
    """`elapsed_s` since the onset, `silence_s` since the caller was last voiced."""
    p = overlap.prediction or floor.Predicted(at_s=0.0)
    is_burst_over = silence_s >= config.burst_silence_s
    if is_burst_over and overlap.voiced_s < config.burst_voiced_s:
        return Meaning.NOISE
    if elapsed_s >= config.decide_min_s:
        if p.interrupt >= config.interrupt_probability and overlap.voiced_s >= config.burst_voiced_s:
            return Meaning.INTERRUPT
        if is_burst_over and p.backchannel + p.idle > p.interrupt:
            return Meaning.BACKCHANNEL if p.backchannel >= p.idle else Meaning.NOISE
    if elapsed_s >= config.decide_max_s:
        # Undecided: a voice that goes on is meant; one that is called noise or echo, or that fell silent, is not.
        is_noise = p.idle + p.backchannel > config.noise_probability
        if p.interrupt > max(p.backchannel, p.idle) or not (is_burst_over or is_noise):
            return Meaning.INTERRUPT
        return Meaning.NOISE if p.idle >= p.backchannel else Meaning.BACKCHANNEL
    is_going_on = elapsed_s >= config.pause_after_s and p.backchannel + p.idle < 0.5 and not is_burst_over
    return Meaning.LIKELY if is_going_on else Meaning.UNDECIDED
