"""Keys as sound: the tone pairs of ITU-T Q.23, made and heard. For carriers that have neither RFC 4733 nor SIP INFO.

The detector follows ITU-T Q.24: a key is two tones, one of each group, each clearly above everything else, no more than
8 dB apart, for at least 40 ms, and counts once. Speech must not pass for keys: the rest of the spectrum is compared.
Streaming: `push` takes any amount of samples. Knows no leg.
"""

from __future__ import annotations

import re

import numpy as np

KEYS = re.compile(r"[0-9*#A-D]{1,64}")
LOW_HZ = (697.0, 770.0, 852.0, 941.0)
HIGH_HZ = (1209.0, 1336.0, 1477.0, 1633.0)
LAYOUT = ("123A", "456B", "789C", "*0#D")

_TONE_S, _GAP_S = 0.1, 0.08  # Q.24 asks for at least 40 ms each; gateways want more
_TONE_AMPLITUDE = 6000.0  # of each of the two: about -14.7 dBm0 together at int16
_BLOCK_S = 0.02
_MIN_BLOCKS = 2  # 40 ms
_MIN_AMPLITUDE = 150.0  # of each tone: -47 dBov
_MAX_TWIST = 10 ** (8 / 20)
_PURITY = 0.75  # share of the block's energy that the two tones must have


def tones(digits: str, rate_hz: int) -> bytes:
    """int16 mono: each key 100 ms, with 80 ms of silence after it."""
    parts = []
    time_s = np.arange(int(_TONE_S * rate_hz)) / rate_hz
    edge = np.minimum(1.0, np.minimum(np.arange(len(time_s)), np.arange(len(time_s))[::-1]) / (0.002 * rate_hz))
    for digit in digits:
        low, high = pair_of(digit)
        pair = np.sin(2 * np.pi * low * time_s) + np.sin(2 * np.pi * high * time_s)
        parts += [pair * edge * _TONE_AMPLITUDE, np.zeros(int(_GAP_S * rate_hz))]
    return np.concatenate(parts).astype("<i2").tobytes() if parts else b""


def pair_of(digit: str) -> tuple[float, float]:
    for row, keys in enumerate(LAYOUT):
        if digit in keys:
            return LOW_HZ[row], HIGH_HZ[keys.index(digit)]
    raise ValueError(f"{digit!r} is not a key")


class DtmfDetector:
    """One direction of one call."""

    def __init__(self, rate_hz: int) -> None:
        self._block = int(_BLOCK_S * rate_hz)
        time_s = np.arange(self._block) / rate_hz
        self._waves = np.exp(-2j * np.pi * np.outer((*LOW_HZ, *HIGH_HZ), time_s)) * np.hanning(self._block)
        self._window = np.hanning(self._block)
        self._scale = 2 / self._window.sum()
        self._rest = np.zeros(0)
        self._candidate, self._run, self._said = "", 0, ""

    def push(self, pcm: bytes) -> str:
        """The keys that became certain."""
        self._rest = np.concatenate([self._rest, np.frombuffer(pcm, "<i2").astype(float)])
        keys = ""
        while len(self._rest) >= self._block:
            keys += self._hear(self._rest[: self._block])
            self._rest = self._rest[self._block :]
        return keys

    def _hear(self, block: np.ndarray) -> str:
        key = self._key_of(block)
        self._run = self._run + 1 if key == self._candidate else 1
        self._candidate = key
        if self._run < _MIN_BLOCKS or key == self._said:
            return ""
        self._said = key
        return key

    def _key_of(self, block: np.ndarray) -> str:
        amplitudes = np.abs(self._waves @ block) * self._scale  # [8]
        low, high = int(np.argmax(amplitudes[:4])), int(np.argmax(amplitudes[4:]))
        tone_low, tone_high = amplitudes[low], amplitudes[4 + high]
        if min(tone_low, tone_high) < _MIN_AMPLITUDE or max(tone_low, tone_high) > _MAX_TWIST * min(
            tone_low, tone_high
        ):
            return ""
        windowed = block * self._window
        energy = float(windowed @ windowed)
        of_tones = float(self._window @ self._window) * (tone_low**2 + tone_high**2) / 2
        return LAYOUT[low][high] if of_tones > _PURITY * energy else ""
