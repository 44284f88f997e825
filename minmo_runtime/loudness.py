"""How loud a voice is beside the caller's own turns so far: what is far away (a television, somebody else in the room)
is not the caller.

Levels are mean powers over packets that the leg calls voiced, so pauses and the line's hiss do not count. The caller's
own level is known from the first turn on; it forgets, because a caller may move the telephone. Pure: no clock, no
samples kept. Walk: step 6.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from minmo_runtime.rates import input_samples

_MEMORY_SAMPLES = input_samples(6_000)  # of voiced audio, after which a level counts for 1/e
_SHORTEST_SAMPLES = input_samples(200)  # voiced audio from which a stretch has a level


@dataclass(eq=False)
class VoicedLevel:
    """Energy of voiced audio, int16 samples squared."""

    energy: float = 0.0
    num_samples: float = 0.0

    def hear(self, pcm: NDArray[np.int16]) -> None:
        wave = pcm.astype(np.float32)
        self.energy += float(wave @ wave)
        self.num_samples += len(pcm)

    def remember(self, other: VoicedLevel) -> None:
        """`other` is the latest of what this is the level of."""
        kept = math.exp(-other.num_samples / _MEMORY_SAMPLES)
        self.energy = self.energy * kept + other.energy
        self.num_samples = self.num_samples * kept + other.num_samples

    def beside(self, own: VoicedLevel) -> float | None:
        """dB by which this is louder than `own`; None while one of them is unknown."""
        if min(self.num_samples, own.num_samples) < _SHORTEST_SAMPLES or own.energy <= 0:
            return None
        ratio = (self.energy / self.num_samples) / (own.energy / own.num_samples)
        return 10 * math.log10(max(ratio, 1e-6))
