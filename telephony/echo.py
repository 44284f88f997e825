"""Line echo: our own voice that comes back on the caller's direction is removed, and what is left of it is not speech.

Two parts, both fed with exactly what was sent (ducked, paused and flushed as it was). The *canceller* (libspeexdsp,
telephony/speexdsp.py) subtracts the echo; it needs some seconds of our voice to learn the line, which the notice at
the start of a call gives it. The *gate* decides whether a frame is only echo: because what is left lies well below the
echo that was taken out, or because the last 120 ms correlate with what was sent within `echo_max_delay_ms`. How much
likeness is asked for follows what the canceller achieves: little before it has learned the line, much afterwards. Under
double talk both tests fail and the frame counts as the caller's. Double talk can also teach the canceller a line that
is not there; what it then adds is not let through. Echo distorted by a speakerphone is only partly handled. Walk:
hop 2.
"""

from __future__ import annotations

import math

import numpy as np

from telephony.config import TelephonyConfig
from telephony.echo_return import WINDOW_MS, EchoReturnMeter, Likeness
from telephony.leg import EchoMeasured
from telephony.speexdsp import SpeexEchoCanceller, SpeexMissing
from telephony.wire_metrics import dbov, pcm_dbov

# Windows of 120 ms are compared, after pre-emphasis (voices differ least in their bass). Measured on lines of 20-400 ms
# with 10 ms of dispersion, over G.711: 95 % of the echo's correlate by 0.5 and more, 1 % of another speaker's by 0.5.
_PRE_EMPHASIS = 0.95
MIN_CORRELATION = 0.48
_SURE_CORRELATION = 0.65
_LEARNT_DB = 9.0
_FOLLOW = 0.03  # of each such frame: about 0.7 s
_MAX_GAIN_DB = 3.0  # an echo is seldom louder than its source (ITU-T G.122 asks of a line that it be far weaker)
_SILENT_DBOV = -60.0  # comfort noise is below it: nothing of ours that could come back as an echo
_RESIDUAL_MARGIN_DB = 6.0  # the caller is louder than this much below the echo estimate; a learned line leaves 15-30 dB
# A frame with less echo is not louder, but for one in which caller and echo happen to be opposite in phase. A filter
# that two voices at once have led astray added up to 0.7 s of noise at -31 dBov to a silent line.
_MAX_ADDED_DB = 3.0
_ASTRAY_MS = 300  # of frames that it made louder, less those that it did not: then it is quicker to learn anew
_TAIL_AFTER_DELAY_MS = 64  # the line's own dispersion after its longest delay


class LineEcho:
    """One leg: canceller and gate. `push` is given both directions of the same tick, whole frames."""

    def __init__(self, config: TelephonyConfig) -> None:
        self._config = config
        self._gate = EchoGate(config)
        self._meter: EchoReturnMeter | None = None
        self._measured: EchoMeasured | None = None
        tail_ms = config.echo_max_delay_ms + _TAIL_AFTER_DELAY_MS
        self._tail_bytes = 2 * config.sample_rate_hz * tail_ms // 1000
        self._canceller = _canceller(config, self._tail_bytes // 2)
        self._max_astray = max(1, _ASTRAY_MS // config.ptime_ms)
        self._num_astray = 0
        self._silent_bytes = self._tail_bytes  # sent so far without a sound
        self._enhancement_db = 0.0  # how much quieter the canceller makes what is surely echo (ERLE, ITU-T G.168)

    @property
    def is_cancelling(self) -> bool:
        """False: the library is missing or the canceller is switched off, and only the gate works."""
        return self._canceller is not None

    def measure_return(self, leg_id: str) -> None:
        """From now on, once: how strong is the echo of this line?"""
        if self._config.echo_max_delay_ms:
            self._meter = EchoReturnMeter(leg_id, self._config)

    def take_measured(self) -> EchoMeasured | None:
        """The answer to that, once."""
        measured, self._measured = self._measured, None
        return measured

    def push(self, received: bytes, sent: bytes) -> tuple[bytes, bool]:
        """The received samples without our echo, and True when they hold nothing else.

        While we are silent they come back bit for bit.
        """
        cleaned, is_echo = self._push(received, sent)
        if self._meter is not None:
            self._measured = self._meter.push(received, cleaned, sent, self._gate.likeness)
            if self._measured is not None:
                self._meter = None
        return cleaned, is_echo

    def _push(self, received: bytes, sent: bytes) -> tuple[bytes, bool]:
        is_silent = pcm_dbov(sent) < _SILENT_DBOV
        self._silent_bytes = min(self._tail_bytes, self._silent_bytes + len(sent)) if is_silent else 0
        if self._canceller is None or self._silent_bytes >= self._tail_bytes:
            return received, self._gate.push(received, sent) >= MIN_CORRELATION
        cleaned = self._cancelled(self._canceller, received, sent)
        is_residual = _is_residual(received, cleaned)
        correlation = self._gate.push(received, sent, is_asked=not is_residual)
        if is_residual or correlation >= _SURE_CORRELATION:
            self._follow(received, cleaned)
        is_learnt = self._enhancement_db >= _LEARNT_DB
        return cleaned, is_residual or correlation >= (_SURE_CORRELATION if is_learnt else MIN_CORRELATION)

    def _cancelled(self, canceller: SpeexEchoCanceller, received: bytes, sent: bytes) -> bytes:
        """Without the echo, or as it came where the canceller would add sound."""
        cleaned = canceller.cancel(received, sent)
        if pcm_dbov(cleaned) <= pcm_dbov(received) + _MAX_ADDED_DB:
            self._num_astray = max(0, self._num_astray - 1)
            return cleaned
        self._num_astray += 1
        if self._num_astray >= self._max_astray:
            canceller.reset()
            self._num_astray, self._enhancement_db = 0, 0.0
        return received

    def _follow(self, received: bytes, cleaned: bytes) -> None:
        """A canceller that has learned the line is trusted: what it leaves is the caller's, unless it surely is not."""
        achieved_db = pcm_dbov(received) - max(pcm_dbov(cleaned), _SILENT_DBOV)
        self._enhancement_db += _FOLLOW * (achieved_db - self._enhancement_db)


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
        self._window = rate * WINDOW_MS // 1000
        self._max_delay = rate * config.echo_max_delay_ms // 1000
        self._fft_size = 1 << (2 * self._window + self._max_delay - 1).bit_length()
        self._sent = np.zeros(self._window + self._max_delay, np.float32)  # both after pre-emphasis
        self._received = np.zeros(self._window, np.float32)
        self._last_sent = self._last_received = np.float32(0)
        self._likeness: Likeness | None = None
        self._is_compared = False  # the present window was

    def push(self, received: bytes, sent: bytes, *, is_asked: bool = True) -> float:
        """How well our own voice explains the received samples, 0-1. Not `is_asked`: only remembered (cheap)."""
        if not self._max_delay:
            return 0.0
        new_sent, new_received = (np.frombuffer(pcm, "<i2").astype(np.float32) for pcm in (sent, received))
        self._sent = _shift_in(self._sent, _emphasised(new_sent, self._last_sent))
        self._received = _shift_in(self._received, _emphasised(new_received, self._last_received))
        self._last_sent, self._last_received = new_sent[-1], new_received[-1]
        self._likeness, self._is_compared = None, False
        if not is_asked or _level_dbov(new_received) < _SILENT_DBOV:
            return 0.0
        found = self.likeness()
        return 0.0 if found is None else found.correlation

    def likeness(self) -> Likeness | None:
        """Of the present window; None where nothing that was sent can be in it. Computed at most once a tick."""
        if not self._is_compared:
            self._likeness, self._is_compared = self._compared(), True
        return self._likeness

    def _compared(self) -> Likeness | None:
        power = _window_power(self._sent, self._window)[: self._max_delay + 1]  # by delay, from the longest
        loudest = float(np.max(power))
        if loudest < 1.0 or _level_dbov(self._received) > dbov(loudest) + _MAX_GAIN_DB:
            return None
        spectrum = np.fft.rfft(self._sent, self._fft_size) * np.conj(np.fft.rfft(self._received, self._fft_size))
        products = np.abs(np.fft.irfft(spectrum, self._fft_size)[: self._max_delay + 1])
        energy = max(float(self._received @ self._received), 1.0)
        sent_energy = np.maximum(power, 1.0) * self._window
        correlations = products / np.sqrt(sent_energy * energy)
        best = int(np.argmax(correlations))
        loss_db = 10 * math.log10(float(sent_energy[best]) / energy)
        return Likeness(float(correlations[best]), self._max_delay - best, loss_db)


def _emphasised(samples: np.ndarray, before: np.float32) -> np.ndarray:
    """Pre-emphasis, first order; `before` is the sample before the first."""
    emphasised = samples.copy()
    emphasised[1:] -= _PRE_EMPHASIS * samples[:-1]
    emphasised[0] -= _PRE_EMPHASIS * before
    return emphasised


def _shift_in(history: np.ndarray, new: np.ndarray) -> np.ndarray:
    shifted: np.ndarray = np.concatenate([history, new])[-len(history) :]
    return shifted


def _window_power(samples: np.ndarray, window: int) -> np.ndarray:
    """Mean square of every window of `window` samples."""
    total = np.concatenate([[0.0], np.cumsum(samples.astype(np.float64) ** 2)])
    power: np.ndarray = (total[window:] - total[:-window]) / window
    return power
