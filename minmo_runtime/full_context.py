"""Listening with an encoder that sees whole segments (SenseVoice-Small): run again as the segment grows, keep what has
settled.

Four query rows go in front: the language (or "auto"), the two rows under which event and emotion come out, and whether
numbers and punctuation are written out (ITN). Their four outputs are the segment's tags, the rest is CTC text. Each
run may correct the words of the one before; `settled` is what two runs agree on, and only that is given to the LLM
ahead of the end of the turn. If a later run changes it after all, the conversation's common prefix shrinks and the
LLM's cache is cut back there (conversation.py): no state to undo here.

Walk: step 8. Knows nothing of calls, time or the LLM. Source: FunASR `models/sense_voice/model.py`, described in
facts/minmo.md 3.1 and 3.3; exempt from "streaming = offline" by design §1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minmo_runtime.conversation import AudioVector
from minmo_runtime.features import stack_frames
from minmo_runtime.model.encoder import VoiceEncoder

# Rows of the table `embed`, by SenseVoice's own names.
LANGUAGE_ROWS = {"auto": 0, "zh": 3, "en": 4, "yue": 7, "ja": 11, "ko": 12, "nospeech": 13}
TEXT_NORM_ROWS = {"withitn": 14, "woitn": 15}
EVENT_EMOTION_ROWS = (1, 2)
# Longer segments cost more with every run (662 ms for 10 s on two cores): from here on the words so far are kept and
# the encoder starts again. SenseVoice was trained on cuts of at most 30 s.
MAX_SEGMENT_S = 20.0
# Of a vector's length: two runs that differ by less say the same. A choice, not a measurement: no connector behind a
# full-context encoder has been trained yet.
VOICE_TOLERANCE = 0.1


def query_rows(language: str = "auto", has_itn: bool = False) -> tuple[int, int, int, int]:
    """The rows in front of a segment: language, event, emotion, text normalisation."""
    if language not in LANGUAGE_ROWS:
        raise ValueError(f"language {language!r}: must be one of {', '.join(LANGUAGE_ROWS)}")
    return (LANGUAGE_ROWS[language], *EVENT_EMOTION_ROWS, TEXT_NORM_ROWS["withitn" if has_itn else "woitn"])


@dataclass
class SettledText:
    """Token ids that two consecutive runs agree on. One per segment."""

    kept: str = ""  # text of what the segment held before it became too long
    tokens: list[int] = field(default_factory=list)  # of the latest run
    settled: list[int] = field(default_factory=list)

    def push(self, tokens: Sequence[int]) -> list[int]:
        """Take a run's tokens; returns the settled prefix, which may be shorter than before."""
        shared = 0
        while shared < min(len(tokens), len(self.tokens)) and tokens[shared] == self.tokens[shared]:
            shared += 1
        self.tokens, self.settled = list(tokens), list(tokens[:shared])
        return self.settled


@dataclass
class SettledVoice:
    """The same for what a trained projector gives the LLM: vectors that two runs agree on, one per position. One per
    segment; what was given keeps its identity, so that the LLM need not read it again."""

    kept: list[AudioVector] = field(default_factory=list)  # of what the segment held before it became too long
    settled: list[AudioVector] = field(default_factory=list)
    latest: Tensor | None = None  # [n, D] of the latest run

    def push(self, vectors: Tensor, is_last: bool) -> list[AudioVector]:
        """Take a run's vectors [n, D]; returns the segment's settled positions, all of them in its last run."""
        agreed = self._agreed(vectors)
        end = len(vectors) if is_last else agreed
        self.settled = self.settled[:agreed]
        self.settled += [AudioVector(vector) for vector in vectors[len(self.settled) : end]]
        self.latest = vectors
        return [*self.kept, *self.settled]

    def _agreed(self, vectors: Tensor) -> int:
        """How many from the first on are as they were."""
        if self.latest is None:
            return 0
        known = self.latest.clone()
        if self.settled:  # measured against what the LLM has read: small steps must not add up
            known[: len(self.settled)] = torch.stack([given.vector for given in self.settled]).to(known)
        count = min(len(known), len(vectors))
        change = (vectors[:count] - known[:count]).float().norm(dim=1)
        moved = (change > VOICE_TOLERANCE * vectors[:count].float().norm(dim=1)).nonzero()
        return int(moved[0]) if len(moved) else count


def joined(before: str, after: str) -> str:
    return f"{before} {after}".strip()


@dataclass(frozen=True)
class Heard:
    """One run over one segment."""

    tag_ids: tuple[int, ...]  # language, emotion, event, text normalisation: ids of the CTC vocabulary
    log_probs: NDArray[np.float32]  # [T, V] without the query rows
    hidden: Tensor  # [T, D], the same frames


@torch.no_grad()
def hear(encoder: VoiceEncoder, segments: Sequence[Tensor], rows: Sequence[int]) -> list[Heard]:
    """Run whole segments, each fbank [F_i, M] with F_i >= 1, as one padded batch."""
    dims = encoder.dims
    stacked = [stack_frames(fbank, dims.lfr_m, dims.lfr_n) for fbank in segments]
    lengths = torch.tensor([len(frames) for frames in stacked])
    padded = torch.nn.utils.rnn.pad_sequence(stacked, batch_first=True)
    queries = torch.tensor(rows).expand(len(segments), -1)
    hidden = encoder(padded, None if len(segments) == 1 else lengths + len(rows), queries)
    log_probs = encoder.ctc_log_probs(hidden)
    heard = []
    for row, length in enumerate(lengths.tolist()):
        valid = log_probs[row, : len(rows) + length].float().cpu().numpy()
        frames = hidden[row, len(rows) : len(rows) + length]
        heard.append(Heard(tuple(valid[: len(rows)].argmax(1).tolist()), valid[len(rows) :], frames))
    return heard
