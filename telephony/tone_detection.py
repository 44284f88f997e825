"""Steady tones of the telephone network in received audio: where each begins and ends, and its one or two frequencies.

A tone is what keeps its frequencies for at least 60 ms with nearly all energy in them. One frequency: an answering
machine's beep, the special information tone, a fax machine; two: ringback and busy tones (ITU-T E.180, Supplement 2),
keys (Q.23). Speech does not stay that still: measured by `minmo bench answers`. What a tone means is
telephony/answer_detection.py's business. Streaming, whole frames of 10 to 40 ms; counts samples. Knows no leg.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from telephony.wire_metrics import dbov

_BLOCK_S = 0.02
_WINDOW_BLOCKS = 2  # compared at once: 25 Hz between two bins
_SUB_BLOCKS = 4  # of a block: 5 ms, more than two periods of the lowest tone
_LOWEST_HZ, _HIGHEST_HZ = 340.0, 2400.0
_MIN_DBOV = -40.0
_PEAK_BINS = 2  # either side: where a Hann window puts all of a steady tone
_PURE = 0.9  # share of the energy that the tone, or both, must have
_LOUDER_OF_TWO = 0.85  # more in one peak is one tone with noise
_STEADY = 0.6  # quietest 5 ms to the loudest, as energy; two tones 40 Hz apart (ringback) beat to nothing
_DRIFT_HZ, _DRIFT_BEATING_HZ = 12.0, 45.0  # between two windows; a beat moves the peaks of two to and fro
_MIN_WINDOWS = 3  # 60 ms


@dataclass(frozen=True)
class Tone:
    """`second_hz` 0: a single frequency. `silence_db`: how much quieter the 60 ms after it were."""

    frequency_hz: float
    second_hz: float
    start_sample: int
    end_sample: int
    silence_db: float = 0.0


class ToneTracker:
    """One direction of one call."""

    def __init__(self, rate_hz: int) -> None:
        self._rate = rate_hz
        self._block = int(_BLOCK_S * rate_hz)
        size = _WINDOW_BLOCKS * self._block
        self._window = np.hanning(size).astype(np.float32)
        self._bin_hz = rate_hz / size
        self._first, self._last = int(_LOWEST_HZ / self._bin_hz), int(_HIGHEST_HZ / self._bin_hz)
        self._rest, self._kept = b"", np.zeros(size, np.float32)
        self._sample = 0  # first sample not looked at
        self._run: list[tuple[float, float]] = []  # frequencies of the windows of the present tone
        self._run_start, self._level = 0, 0.0
        self._over: Tone | None = None  # waits for what follows it
        self._after: list[float] = []

    @property
    def since(self) -> int | None:
        """First sample of the tone that sounds now."""
        return self._run_start if len(self._run) >= _MIN_WINDOWS else None

    def push(self, pcm: bytes) -> list[Tone]:
        """Tones that are over, 60 ms after their end."""
        self._rest += pcm
        tones = []
        while len(self._rest) >= 2 * self._block:
            block = np.frombuffer(self._rest, "<i2", count=self._block).astype(np.float32)
            self._rest = self._rest[2 * self._block :]
            self._kept[: -self._block] = self._kept[self._block :]
            self._kept[-self._block :] = block
            self._sample += self._block
            if tone := self._hear(block):
                tones.append(tone)
        return tones

    def _hear(self, block: np.ndarray) -> Tone | None:
        level = dbov(float(block @ block) / self._block)
        found = self._frequencies(block) if level > _MIN_DBOV else None
        if found is not None and self._run and not _is_same(found, self._run[-1]):
            self._end_run()
        if found is None:
            self._end_run()
        else:
            if not self._run:
                self._run_start, self._level = self._sample - 2 * self._block, level
            self._run.append(found)
            self._level = max(self._level, level)
        return self._settle(level)

    def _end_run(self) -> None:
        """A run that was too short was no tone."""
        if len(self._run) >= _MIN_WINDOWS:
            low, high = np.median(np.array(self._run), axis=0)
            self._over = Tone(float(low), float(high), self._run_start, self._sample - self._block)
            self._after = []
        self._run = []

    def _settle(self, level: float) -> Tone | None:
        """What follows a tone is looked at for 60 ms, its own last block left out."""
        if self._over is None:
            return None
        self._after.append(level)
        if len(self._after) < 4 and not self._run:
            return None
        tone, self._over = self._over, None
        quieter = self._level - max(self._after[1:], default=level)
        return Tone(tone.frequency_hz, tone.second_hz, tone.start_sample, tone.end_sample, quieter)

    def _frequencies(self, block: np.ndarray) -> tuple[float, float] | None:
        """(frequency, 0) of one steady tone, (lower, higher) of two, None for anything else."""
        spectrum = np.fft.rfft(self._kept * self._window)
        power = spectrum.real**2 + spectrum.imag**2
        total = float(power[2:].sum()) + 1e-9
        at, share = self._peak(power)
        if share / total < 1 - _LOUDER_OF_TWO:
            return None
        first = self._between_bins(power, at)
        if share / total >= _PURE:
            parts = block.reshape(_SUB_BLOCKS, -1)
            energies = np.einsum("bs,bs->b", parts, parts)
            is_steady = float(energies.min()) >= _STEADY * float(energies.max())
            return (first, 0.0) if is_steady else (first, first)  # beating: two tones that one peak holds
        if share / total > _LOUDER_OF_TWO:
            return None
        power[at - _PEAK_BINS : at + _PEAK_BINS + 1] = 0
        at, share_of_second = self._peak(power)
        if (share + share_of_second) / total < _PURE:
            return None
        second = self._between_bins(power, at)
        return min(first, second), max(first, second)

    def _peak(self, power: np.ndarray) -> tuple[int, float]:
        """Bin of the highest peak, and its energy."""
        at = self._first + int(power[self._first : self._last].argmax())
        return at, float(power[at - _PEAK_BINS : at + _PEAK_BINS + 1].sum())

    def _between_bins(self, power: np.ndarray, at: int) -> float:
        """Frequency of the peak: the top of a parabola through its three bins, in decibels."""
        before, here, after = (math.log(float(each) + 1e-9) for each in power[at - 1 : at + 2])
        bend = before - 2 * here + after
        return (at + (0.5 * (before - after) / bend if bend else 0.0)) * self._bin_hz


def _is_same(found: tuple[float, float], before: tuple[float, float]) -> bool:
    are_double = bool(found[1] and before[1])
    return abs(found[0] - before[0]) <= (_DRIFT_BEATING_HZ if are_double else _DRIFT_HZ)
