"""What stands in for connectors that a checkpoint does not hold: `duplex` → an endpointer over voice activity and
words.

(`in`: the encoder's CTC text becomes the LLM's user turn as text, see stream.py; `out`: the LLM's text is spoken by
the voice LM's own text table, see runner.py. Which bridges stand is decided in weights.py.)

The endpointer answers, every few frames, with the same six-class posterior that the trained predictor would give.
Pure: input clock in samples, no audio, no weights. The word lists are English, like the checkpoint that needs them;
words of other languages fall into the neutral class and only the silence decides.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from minmo_runtime.api import DuplexPrediction
from minmo_runtime.rates import input_samples

# Silence after which the turn is more likely over than not. LiveKit and pipecat wait 0.5 s by default; the slot value
# is the time a person needs to look at the next digits (facts/recipes.md part C: only a timeout of 1.6 s is as safe
# as a trained head).
DONE_COMPLETE_MS = 320
DONE_NEUTRAL_MS = 520
DONE_OPEN_MS = 1200
DONE_SLOT_MS = 1600
DONE_SLOT_FULL_MS = 240
DONE_WAITS_MS = 4000
_SLOPE_MS = 60.0  # how sharply the posterior passes 0.5

_DIGIT_WORDS = frozenset("zero oh one two three four five six seven eight nine".split())
OPEN_ENDINGS = frozenset(
    "um uh er erm and but or so because the a an my your our his her their is are was to for on of with at in from by "
    "number order i i'm it's that's if when what which where can could would like want need please order's".split()
)
COMPLETE_ENDINGS = frozenset(
    "yes no yeah nope yep thanks thank you goodbye bye please today tomorrow monday tuesday wednesday thursday friday "
    "saturday sunday person human agent correct right open closed delivery now".split()
)
ASKS_TO_WAIT = re.compile(
    r"\b(one moment|just a moment|hold on|hang on|one second|just a second|let me (see|check|look)|wait a)\b"
)
BACKCHANNELS = frozenset(
    "mm hm mhm mmhm uh huh yeah yes okay ok right sure aha ah oh good fine great cool i see go on".split()
)
STOPS = frozenset("stop wait no hold sorry excuse actually but hello hey listen".split())


@dataclass(frozen=True)
class TurnView:
    """What is known at one moment of the input clock.

    `text` is what the open user turn says so far (written digits); `overlap_text` what was said while the agent speaks.
    """

    sample: int
    is_voiced: bool
    silence_samples: int  # since the last voiced sample
    voiced_samples: int  # length of the running segment up to its last voiced sample
    text: str = ""
    overlap_text: str = ""
    is_agent_speaking: bool = False
    has_segment: bool = False  # a segment is open (hangover not over)
    slot_digits: int = 0
    loudness_db: float | None = None  # of that segment beside the caller's own turns; None: unknown


def patience_ms(text: str, slot_digits: int = 0) -> int:
    """Silence after `text` at which the turn is as likely over as not."""
    words = re.findall(r"[\w']+", text.lower())
    if not words:
        return DONE_SLOT_MS
    if ASKS_TO_WAIT.search(" ".join(words[-5:])):
        return DONE_WAITS_MS
    digits = trailing_digits(words)
    if digits and slot_digits:
        return DONE_SLOT_FULL_MS if digits >= slot_digits else DONE_SLOT_MS
    if digits:  # a number of unknown length: its end cannot be told from a pause
        return DONE_OPEN_MS
    if words[-1] in OPEN_ENDINGS and words[-1] not in COMPLETE_ENDINGS:
        return DONE_OPEN_MS
    return DONE_COMPLETE_MS if words[-1] in COMPLETE_ENDINGS else DONE_NEUTRAL_MS


def trailing_digits(words: list[str]) -> int:
    """Digits at the end: written ("4 56" is three) or spoken ("four five" is two)."""
    count = 0
    for word in reversed(words):
        if word.isdigit():
            count += len(word)
        elif word in _DIGIT_WORDS:
            count += 1
        else:
            break
    return count


def predict(call_id: str, view: TurnView) -> DuplexPrediction:
    """The bridge's posterior; masked by who speaks, as the trained head's would be."""
    scores = _while_agent_speaks(view) if view.is_agent_speaking else _while_agent_listens(view)
    total = sum(scores.values())
    return DuplexPrediction(call_id=call_id, sample=view.sample, **{name: s / total for name, s in scores.items()})


def _while_agent_listens(view: TurnView) -> dict[str, float]:
    if view.is_voiced:
        return {"user_continues": 0.96, "user_done": 0.01, "idle": 0.03}
    if not view.text:
        # Voiced but without a word so far: the words come with the next chunk, or it was noise.
        return {"user_continues": 0.6, "idle": 0.4} if view.has_segment else {"idle": 0.98, "user_continues": 0.02}
    silence_ms = view.silence_samples / input_samples(1)
    waited = (silence_ms - patience_ms(view.text, view.slot_digits)) / _SLOPE_MS
    done = 1.0 / (1.0 + math.exp(-max(-30.0, min(30.0, waited))))
    rest = 1.0 - done
    if ASKS_TO_WAIT.search(view.text[-40:]):
        return {"user_done": done, "user_waits": 0.9 * rest, "user_continues": 0.1 * rest + 1e-6}
    return {"user_done": done, "user_continues": rest + 1e-6}


def _while_agent_speaks(view: TurnView) -> dict[str, float]:
    if not view.has_segment:
        return {"idle": 0.98, "interrupt": 0.01, "backchannel": 0.01}
    voiced_ms = view.voiced_samples / input_samples(1)
    words = re.findall(r"[\w']+", view.overlap_text.lower())
    content = [word for word in words if word not in BACKCHANNELS]
    if any(word in STOPS for word in words):
        interrupt, backchannel = 0.95, 0.02
    elif len(content) >= 2:
        interrupt, backchannel = 0.92, 0.04
    elif content:
        interrupt, backchannel = (0.7, 0.2) if voiced_ms >= 400 else (0.45, 0.35)
    elif words:  # only "mm hm", "yeah": it takes a long run of them to mean more
        interrupt, backchannel = (0.6, 0.35) if voiced_ms >= 1500 else (0.08, 0.85)
    else:  # sound without words: a cough or the television; only lasting sound may stop the agent
        interrupt, backchannel = min(0.55, 0.1 + 0.3 * voiced_ms / 1000), 0.1
    return {"interrupt": interrupt, "backchannel": backchannel, "idle": max(0.0, 1.0 - interrupt - backchannel) + 1e-6}
