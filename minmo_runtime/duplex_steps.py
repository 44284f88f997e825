"""One step of the trained duplex predictor: what is known of a call at one moment of its input clock, as numbers.

Training and service build their steps here, from the same ear: the frames that became known since the step before,
facts about the turn (what the endpointer bridge looks at, and what it would say), and the last CTC pieces heard.
Facts are simple numbers around 0 to 1; their order is part of a trained checkpoint (`FACT_NAMES`). Knows no weights and
no streams. Walk: step 8. The facts are ours: facts/recipes part C found frames alone too weak to tell an end from a
pause.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor

from minmo_runtime import bridges
from minmo_runtime.bridges import TurnView
from minmo_runtime.rates import input_samples

_SILENCE_STEPS_MS = (160, 320, 480, 800, 1600, 3200)
_VOICED_STEPS_MS = (200, 500, 1000, 2000)
FACT_NAMES = (
    "is_voiced",
    "has_segment",
    *(f"silence_{ms}" for ms in _SILENCE_STEPS_MS),
    *(f"voiced_{ms}" for ms in _VOICED_STEPS_MS),
    "has_text",
    "num_words",
    "patience",
    "silence_beyond_patience",
    "asks_to_wait",
    "num_digits",
    "ends_in_digits",
    "is_slot_open",
    "is_slot_full",
    "is_slot_exceeded",
    "is_length_known",
    "ends_open",
    "ends_complete",
    "has_overlap_text",
    "num_content_words",
    "says_stop",
    "bridge_user_done",
    "bridge_user_waits",
    "bridge_interrupt",
    "bridge_backchannel",
    "is_loudness_known",
    "loudness",
)
NUM_FACTS = len(FACT_NAMES)
# New facts come behind the others: a predictor trained before the loudness was known reads the first of them.
SERVED_NUM_FACTS = (32, NUM_FACTS)


def facts(view: TurnView) -> list[float]:
    """In the order of FACT_NAMES. A ramp such as `silence_320` goes from 0 to 1 over its first 320 ms."""
    silence_ms = view.silence_samples / input_samples(1)
    voiced_ms = view.voiced_samples / input_samples(1)
    words = _words(view.text)
    overlap = _words(view.overlap_text)
    digits = bridges.trailing_digits(words)
    is_slot = bool(digits and view.slot_digits)
    patience_ms = bridges.patience_ms(view.text, view.slot_digits)
    last = words[-1] if words else ""
    said = bridges.predict("", view)
    return [
        float(view.is_voiced),
        float(view.has_segment),
        *(min(1.0, silence_ms / step) for step in _SILENCE_STEPS_MS),
        *(min(1.0, voiced_ms / step) for step in _VOICED_STEPS_MS),
        float(bool(words)),
        min(1.0, len(words) / 10),
        min(2.0, patience_ms / 1000),
        max(-1.0, min(1.0, (silence_ms - patience_ms) / 400)),
        float(bool(bridges.ASKS_TO_WAIT.search(" ".join(words[-5:])))),
        min(1.0, digits / 8),
        float(digits > 0),
        float(is_slot and digits < view.slot_digits),
        float(is_slot and digits == view.slot_digits),
        float(is_slot and digits > view.slot_digits),
        float(view.slot_digits > 0),
        float(last in bridges.OPEN_ENDINGS),
        float(last in bridges.COMPLETE_ENDINGS),
        float(bool(overlap)),
        min(1.0, sum(word not in bridges.BACKCHANNELS for word in overlap) / 3),
        float(any(word in bridges.STOPS for word in overlap)),
        said.user_done,
        said.user_waits,
        said.interrupt,
        said.backchannel,
        float(view.loudness_db is not None),
        max(-1.0, min(1.0, (view.loudness_db or 0.0) / 24)),
    ]


def last_pieces(tokenizer: Tokenizer, view: TurnView, raw_text: str, window: int) -> list[int]:
    """Ids of the last `window` CTC pieces of what was heard (of the overlap while the agent speaks), 0 in front where
    there are fewer."""
    text = view.overlap_text if view.is_agent_speaking else raw_text
    ids = tokenizer.encode(" ".join(text.split()[-window:])).ids[-window:] if text else []
    return [0] * (window - len(ids)) + list(ids)


def pool(frames: Sequence[Tensor], width: int) -> Tensor:
    """Frames [n, D] known since the last step -> [2 D]: their mean and the last one; zeros where nothing came."""
    if not frames:
        return torch.zeros(2 * width)
    new = torch.cat(list(frames))
    return torch.cat([new.mean(0), new[-1]])


def _words(text: str) -> list[str]:
    return re.findall(r"[\w']+", text.lower())
