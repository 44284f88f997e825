"""CTC without a model: greedy captions that grow chunk by chunk, and forced alignment of a known text (prefix allowed).

Plain numpy over log-posteriors [T, V]; blank is id 0. Used for the caller's captions (walk step 8) and, on a cut, to
find which words of our own reply were heard (design §4 rule 4). Source: Graves et al. 2006; alignment is its Viterbi
form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

BLANK = 0
_NEVER = -1e30


@dataclass
class GreedyCtc:
    """Best path so far of one segment: repeats merged, blanks dropped. Owned by the segment's ear."""

    tokens: list[int] = field(default_factory=list)
    posteriors: list[float] = field(default_factory=list)  # highest posterior of each token's run
    num_frames: int = 0
    _last: int = BLANK

    def push(self, log_probs: NDArray[np.floating]) -> bool:
        """Take [T, V] more frames; True if a token was added."""
        best = log_probs.argmax(axis=1)
        peaks = np.exp(log_probs[np.arange(len(best)), best])
        grown = False
        for token, peak in zip(best.tolist(), peaks.tolist(), strict=True):
            if token != BLANK and token != self._last:
                self.tokens.append(token)
                self.posteriors.append(peak)
                grown = True
            elif token != BLANK:
                self.posteriors[-1] = max(self.posteriors[-1], peak)
            self._last = token
        self.num_frames += len(best)
        return grown

    @property
    def confidence(self) -> float:
        """Mean posterior of the tokens, 0 without any."""
        return float(np.mean(self.posteriors)) if self.posteriors else 0.0


def align_prefix(log_probs: NDArray[np.floating], tokens: Sequence[int]) -> list[int]:
    """For each token of the longest prefix that the frames contain, the last frame it holds (best path, any prefix
    may end it).

    log_probs [T, V]. The path starts before the first token and may stop behind any of them: whichever prefix
    explains the frames best. Returns as many frame indices as tokens lie in that prefix.

    Example: frames that say "a b" against tokens (a, b, c) give two indices; c was not heard.
    """
    num_frames, num_tokens = len(log_probs), len(tokens)
    if num_frames == 0 or num_tokens == 0:
        return []
    # States: blank, t0, blank, t1, ... blank.
    labels = np.full(2 * num_tokens + 1, BLANK)
    labels[1::2] = tokens
    can_skip = np.zeros(len(labels), dtype=bool)  # over a blank, between two different tokens
    can_skip[3::2] = labels[3::2] != labels[1:-2:2]
    emit = log_probs[:, labels]  # [T, states]
    score = np.full(len(labels), _NEVER)
    score[:2] = emit[0, :2]
    back = np.zeros((num_frames, len(labels)), dtype=np.int8)
    for frame in range(1, num_frames):
        stay = score
        step = np.concatenate(([_NEVER], score[:-1]))
        skip = np.where(can_skip, np.concatenate(([_NEVER, _NEVER], score[:-2])), _NEVER)
        choices = np.stack((stay, step, skip))
        back[frame] = choices.argmax(axis=0)
        score = choices.max(axis=0) + emit[frame]
    state = int(score.argmax())
    ends = [-1] * num_tokens
    for frame in range(num_frames - 1, -1, -1):
        if state % 2 == 1 and ends[state // 2] < 0:
            ends[state // 2] = frame
        state -= int(back[frame, state])
    return [end for end in ends if end >= 0]


def heard_words(
    word_tokens: Sequence[Sequence[int]], token_ends: Sequence[int], played_frames: float, num_frames: int
) -> int:
    """How many whole words ended inside the first `played_frames` of `num_frames` aligned ones.

    A word counts when all its tokens were aligned and the last one's last frame lies before the cut. The last aligned
    word of audio that reaches beyond the cut is safe; if the audio stops at the cut, a word whose token is its very
    last frame may be half spoken and does not count.
    """
    count, used = 0, 0
    for tokens in word_tokens:
        used += len(tokens)
        if used > len(token_ends):
            break
        end = token_ends[used - 1] if tokens else -1
        if end + 1 > played_frames or (end + 1 >= num_frames and played_frames >= num_frames and tokens):
            break
        count += 1
    return count
