"""Residual-echo gate: is this piece of caller audio only our own voice coming back?

It compares what came in with what was really sent (ducked, paused and flushed as it was) over the last
`echo_max_delay_ms`: a line echo is a quieter, delayed copy, so somewhere in that window the two correlate strongly. It
decides, it does not subtract: under double talk the correlation falls and the frame counts as the caller's. A full
echo canceller, and echo that a speakerphone has distorted, are not handled here. Walk: hop 2.
"""

from __future__ import annotations

import numpy as np

from telephony.config import TelephonyConfig
from telephony.wire_metrics import dbov

_WINDOW_MS = 40  # compared at once: two frames, long enough that two voices seldom look alike
_MIN_CORRELATION = 0.75
_MIN_RETURN_LOSS_DB = 3.0  # an echo is at least so much weaker than its source (ITU-T G.122 asks far more of a line)
_SILENT_DBOV = -60.0


class EchoGate:
    """One leg. `push` is given both directions of the same tick."""

    def __init__(self, config: TelephonyConfig) -> None:
        rate = config.sample_rate_hz
        self._window = rate * _WINDOW_MS // 1000
        self._max_delay = rate * config.echo_max_delay_ms // 1000
        self._fft_size = 1 << (2 * self._window + self._max_delay - 1).bit_length()
        self._sent = np.zeros(self._window + self._max_delay, np.float32)
        self._received = np.zeros(self._window, np.float32)

    def push(self, received: bytes, sent: bytes) -> bool:
        """True when the received samples are explained by our own voice."""
        if not self._max_delay:
            return False
        self._sent = _shift_in(self._sent, sent)
        self._received = _shift_in(self._received, received)
        level = dbov(float(np.mean(self._received**2)))
        sent_level = dbov(float(np.max(_window_power(self._sent, self._window))))
        if level < _SILENT_DBOV or sent_level < _SILENT_DBOV or level > sent_level - _MIN_RETURN_LOSS_DB:
            return False
        return self._correlation() >= _MIN_CORRELATION

    def _correlation(self) -> float:
        """Highest normalised correlation of the received window with any delay of what was sent."""
        spectrum = np.fft.rfft(self._sent, self._fft_size) * np.conj(np.fft.rfft(self._received, self._fft_size))
        products = np.fft.irfft(spectrum, self._fft_size)[: self._max_delay + 1]  # [delay, counted from the oldest]
        energy = _window_power(self._sent, self._window)[: self._max_delay + 1] * self._window
        scale = np.sqrt(np.maximum(energy, 1.0) * max(float(np.sum(self._received**2)), 1.0))
        return float(np.max(np.abs(products) / scale))


def _shift_in(history: np.ndarray, pcm: bytes) -> np.ndarray:
    new = np.frombuffer(pcm, "<i2").astype(np.float32)
    shifted: np.ndarray = np.concatenate([history, new])[-len(history) :]
    return shifted


def _window_power(samples: np.ndarray, window: int) -> np.ndarray:
    """Mean square of every window of `window` samples."""
    total = np.concatenate([[0.0], np.cumsum(samples.astype(np.float64) ** 2)])
    power: np.ndarray = (total[window:] - total[:-window]) / window
    return power
