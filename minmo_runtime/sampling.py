"""Choosing the next token: nucleus candidates and repetition-aware sampling (RAS), one row at a time, in numpy.

Each call draws from its own generator, so what one call says never depends on its neighbours in the batch. Knows
nothing of models, phases or streams: who may be drawn (`banned`) is the caller's business. Step 9 of the walk.
Source: RAS, VALL-E 2 (arXiv 2406.05370 §4.1) with CosyVoice 2's values and its rule of 2026-02-04: the repeated id is
masked before the second draw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
# Index of the drawn candidate, given weights that need not sum to one.
Draw = Callable[[FloatArray], int]


@dataclass(frozen=True)
class SamplingRules:
    """Values of CosyVoice 2; `temperature` 0 means the most likely id always (no draw, no repetition rule)."""

    top_p: float = 0.8
    top_k: int = 25
    window: int = 10
    max_repeats_share: float = 0.1
    temperature: float = 1.0


def draw_with(generator: np.random.Generator) -> Draw:
    """A draw in proportion to the weights."""

    def draw(weights: FloatArray) -> int:
        steps = np.cumsum(weights)
        return min(int(np.searchsorted(steps, generator.random() * steps[-1], side="right")), len(weights) - 1)

    return draw


def probabilities(scores: NDArray[np.floating], banned: Sequence[int] = ()) -> FloatArray:
    """Softmax of logits or log-probabilities, with `banned` ids at exactly zero."""
    masked = np.array(scores, dtype=np.float64)
    if len(banned):
        masked[list(banned)] = -np.inf
    masked -= masked.max()
    weights: FloatArray = np.exp(masked)
    return weights / weights.sum()


def nucleus(probs: FloatArray, top_p: float, top_k: int) -> tuple[NDArray[np.int64], FloatArray]:
    """Candidates in falling order: one more is taken while the sum *before* it is below `top_p` and fewer than `top_k`
    are in.

    Example: 0.5, 0.4, 0.1 with top_p 0.8 keeps the first two (before the third the sum is 0.9).
    """
    width = min(top_k, len(probs))
    # Sorting 6,564 ids for each row of a large batch would cost more than the batch: first those that can be in at all.
    least = np.partition(probs, len(probs) - width)[len(probs) - width]
    possible = np.flatnonzero(probs >= least)
    # A stable sort keeps the lower id first among equals, whatever the platform.
    order = possible[np.argsort(-probs[possible], kind="stable")[:width]]
    before = np.concatenate([[0.0], np.cumsum(probs[order])[:-1]])
    keep = order[before < top_p]
    return keep, probs[keep]


def ras_sample(
    scores: NDArray[np.floating], decoded: Sequence[int], rules: SamplingRules, draw: Draw, banned: Sequence[int] = ()
) -> int:
    """One id. If the nucleus draw occurs too often among the last ids, it is masked and drawn again from the full
    softmax.
    """
    if rules.temperature == 0.0:
        return int(np.argmax(probabilities(scores, banned)))
    scaled = np.asarray(scores, dtype=np.float64) / rules.temperature
    probs = probabilities(scaled, banned)
    candidates, weights = nucleus(probs, rules.top_p, rules.top_k)
    picked = int(candidates[draw(weights)])
    repeats = sum(1 for token in decoded[-rules.window :] if token == picked)
    if repeats < rules.window * rules.max_repeats_share or np.count_nonzero(probs) < 2:
        return picked
    return draw(probabilities(scaled, [*banned, picked]))
