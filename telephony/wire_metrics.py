"""When did either party become audible or silent: voiced energy in what crossed the wire, in samples of the leg's
clock.

Runs in the media worker on exactly the samples that pjsip decoded and was given, before anything else looks at them,
so no figure depends on the model's, the agent's or the engine's own timers. What it does not know: the caller's jitter
buffer and codec delay (the received direction is later than the socket by the depth of the jitter buffer, which pjsip
keeps adaptive).
"""

from __future__ import annotations

import math

import numpy as np

from telephony.config import TelephonyConfig
from telephony.leg import WireMetric

_BLOCK_MS = 10
_NOISE_BLOCKS = 150  # the noise floor is the quietest block of the last 1.5 to 3 s: speech has pauses, noise has none
_NOISE_MARGIN_DB = 9.0
_NOISE_FLOOR_MAX_DBOV = -35.0  # so that long speech never hides itself


class VoicedEnergyMeter:
    """One direction. `party` is "caller" or "agent"; kinds are <party>_onset and <party>_offset."""

    def __init__(self, leg_id: str, party: str, config: TelephonyConfig) -> None:
        self._leg_id, self._party = leg_id, party
        self._block_samples = config.sample_rate_hz * _BLOCK_MS // 1000
        self._threshold_dbov = config.wire_voiced_dbov
        self._onset_blocks = max(1, config.wire_onset_ms // _BLOCK_MS)
        self._hangover_blocks = max(1, config.wire_hangover_ms // _BLOCK_MS)
        self._noise_dbov = -90.0
        self._quietest, self._quietest_before, self._noise_blocks = 0.0, -90.0, 0
        self._rest = b""
        self._sample = 0  # first sample not yet looked at
        self.is_voiced = False
        self._run = 0  # voiced blocks in a row while silent; unvoiced ones in a row while voiced

    def push(self, pcm: bytes) -> list[WireMetric]:
        self._rest += pcm
        num_blocks = len(self._rest) // (2 * self._block_samples)
        if not num_blocks:
            return []
        used = num_blocks * self._block_samples
        blocks = (
            np.frombuffer(self._rest, "<i2", count=used).reshape(num_blocks, self._block_samples).astype(np.float32)
        )
        self._rest = self._rest[2 * used :]
        metrics = []
        for energy in np.einsum("bs,bs->b", blocks, blocks).tolist():
            metric = self._block(dbov(energy / self._block_samples))
            if metric is not None:
                metrics.append(metric)
        return metrics

    def _block(self, level_dbov: float) -> WireMetric | None:
        is_voiced = level_dbov > max(self._threshold_dbov, self._noise_dbov + _NOISE_MARGIN_DB)
        self._follow_noise(level_dbov)
        self._sample += self._block_samples
        self._run = self._run + 1 if is_voiced != self.is_voiced else 0
        if self._run < (self._hangover_blocks if self.is_voiced else self._onset_blocks):
            return None
        edge = self._sample - self._run * self._block_samples
        self._run = 0
        self.is_voiced = not self.is_voiced
        kind = f"{self._party}_{'onset' if self.is_voiced else 'offset'}"
        return WireMetric(leg_id=self._leg_id, kind=kind, sample=edge)

    def _follow_noise(self, level_dbov: float) -> None:
        self._quietest = min(self._quietest, level_dbov)
        self._noise_blocks += 1
        if self._noise_blocks == _NOISE_BLOCKS:
            self._quietest_before, self._quietest, self._noise_blocks = self._quietest, 0.0, 0
        self._noise_dbov = min(self._quietest, self._quietest_before, _NOISE_FLOOR_MAX_DBOV)


def dbov(mean_square: float) -> float:
    """Level of int16 audio against a full-scale square wave (RFC 6464's 0 dBov)."""
    return 10 * math.log10(mean_square / 32768.0**2) if mean_square > 0 else -96.0


def pcm_dbov(pcm: bytes) -> float:
    """The same of int16 samples."""
    samples = np.frombuffer(pcm, "<i2").astype(np.float32)
    return dbov(float(samples @ samples) / len(samples))
