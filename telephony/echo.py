"""Line echo: our own voice that comes back on the caller's direction is removed, and what is left of it is not speech.

Two parts, both fed with exactly what was sent (ducked, paused and flushed as it was). The *canceller* (libspeexdsp,
telephony/speexdsp.py) subtracts the echo; it needs some seconds of our voice to learn the line, which the notice at
the start of a call gives it. The *gate* decides whether a frame is only echo: before the canceller has learned, because
the frame correlates with what was sent over the last `echo_max_delay_ms`; afterwards, because what is left lies well
below the echo that was taken out. Under double talk both tests fail and the frame counts as the caller's. Echo
distorted by a speakerphone is only partly handled. Walk: hop 2.
"""

from __future__ import annotations

import numpy as np

from telephony.config import TelephonyConfig
from telephony.speexdsp import SpeexEchoCanceller, SpeexMissing
from telephony.wire_metrics import dbov

_WINDOW_MS = 40  # compared at once: two frames, long enough that two voices seldom look alike
_MIN_CORRELATION = 0.75
_MIN_RETURN_LOSS_DB = 3.0  # an echo is at least so much weaker than its source (ITU-T G.122 asks far more of a line)
_SILENT_DBOV = -60.0
_RESIDUAL_MARGIN_DB = 6.0  # the caller is louder than this much below the echo estimate; a learned line leaves 15-30 dB
_TAIL_AFTER_DELAY_MS = 64  # the line's own dispersion after its longest delay


class LineEcho:
    """One leg: canceller and gate. `push` is given both directions of the same tick, whole frames."""

    def __init__(self, config: TelephonyConfig) -> None:
        self._gate = EchoGate(config)
        tail_ms = config.echo_max_delay_ms + _TAIL_AFTER_DELAY_MS
        self._tail_bytes = 2 * config.sample_rate_hz * tail_ms // 1000
        self._canceller = _canceller(config, self._tail_bytes // 2)
        self._silent_bytes = self._tail_bytes  # sent so far without a sound

    @property
    def is_cancelling(self) -> bool:
        """False: the library is missing or the canceller is switched off, and only the gate works."""
        return self._canceller is not None

    def push(self, received: bytes, sent: bytes) -> tuple[bytes, bool]:
        """The received samples without our echo, and True when they hold nothing else.

        While we are silent they come back bit for bit.
        """
        self._silent_bytes = 0 if any(sent) else min(self._tail_bytes, self._silent_bytes + len(sent))
        if self._canceller is None or self._silent_bytes >= self._tail_bytes:
            return received, self._gate.push(received, sent)
        cleaned = self._canceller.cancel(received, sent)
        is_echo = _is_residual(received, cleaned)
        return cleaned, self._gate.push(received, sent, is_asked=not is_echo) or is_echo


def _canceller(config: TelephonyConfig, tail_samples: int) -> SpeexEchoCanceller | None:
    if config.echo_canceller == "off" or not config.echo_max_delay_ms:
        return None
    try:
        return SpeexEchoCanceller(config.samples_per_frame, tail_samples, config.sample_rate_hz)
    except SpeexMissing:
        if config.echo_canceller == "speexdsp":
            raise
        return None


def _is_residual(received: bytes, cleaned: bytes) -> bool:
    """True when what is left lies well below the echo that was taken out."""
    left = np.frombuffer(cleaned, "<i2").astype(np.float32)
    removed = np.frombuffer(received, "<i2").astype(np.float32) - left
    estimate_dbov = _level_dbov(removed)
    if estimate_dbov < _SILENT_DBOV:
        return False
    return _level_dbov(left) < estimate_dbov - _RESIDUAL_MARGIN_DB


def _level_dbov(samples: np.ndarray) -> float:
    return dbov(float(samples @ samples) / len(samples))


class EchoGate:
    """One leg. `push` is given both directions of the same tick."""

    def __init__(self, config: TelephonyConfig) -> None:
        rate = config.sample_rate_hz
        self._window = rate * _WINDOW_MS // 1000
        self._max_delay = rate * config.echo_max_delay_ms // 1000
        self._fft_size = 1 << (2 * self._window + self._max_delay - 1).bit_length()
        self._sent = np.zeros(self._window + self._max_delay, np.float32)
        self._received = np.zeros(self._window, np.float32)

    def push(self, received: bytes, sent: bytes, *, is_asked: bool = True) -> bool:
        """True when the received samples are explained by our own voice. Not `is_asked`: only remembered (cheap)."""
        if not self._max_delay:
            return False
        self._sent = _shift_in(self._sent, sent)
        self._received = _shift_in(self._received, received)
        if not is_asked:
            return False
        level = _level_dbov(self._received)
        if level < _SILENT_DBOV:
            return False
        sent_level = dbov(float(np.max(_window_power(self._sent, self._window))))
        if sent_level < _SILENT_DBOV or level > sent_level - _MIN_RETURN_LOSS_DB:
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
