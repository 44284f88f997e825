"""What leaves while nothing is played: a quiet, steady noise, so that a party hears an open line from the ACK on.
Digital silence sounds like a call that was cut.

Made once per process, rate and level and shared by all legs; each reads it from a place of its own, by the leg's clock,
so the same leg sends the same samples whatever the sizes of the pulls. Sent as sound in the call's codec, like
everything else: the CN payload (RFC 3389) is for a sender that stops its RTP, and ours never stops.
"""

from __future__ import annotations

import zlib
from functools import cache

import numpy as np

from telephony.config import TelephonyConfig

_LOOP_S = 5  # long enough that nobody hears it repeat
_SEED = 3389


class ComfortNoise:
    """One leg's."""

    def __init__(self, leg_id: str, config: TelephonyConfig) -> None:
        self._loop = _loop(config.sample_rate_hz, float(config.comfort_noise_dbov))
        self._offset = zlib.crc32(leg_id.encode())

    def at(self, sample: int, num_samples: int) -> bytes:
        """The leg's noise from this sample of its clock on, at most `_LOOP_S` of it."""
        start = 2 * ((sample + self._offset) % (len(self._loop) // 4))
        return self._loop[start : start + 2 * num_samples]


@cache
def _loop(rate_hz: int, level_dbov: float) -> bytes:
    """White noise of exactly this level, twice over so that no read has to wrap; 0 = digital silence."""
    size = _LOOP_S * rate_hz
    if level_dbov == 0:
        return bytes(4 * size)
    noise = np.random.default_rng(_SEED).standard_normal(size)
    noise *= 32768 * 10 ** (level_dbov / 20) / np.sqrt(np.mean(noise**2))
    return np.rint(noise).astype("<i2").tobytes() * 2
