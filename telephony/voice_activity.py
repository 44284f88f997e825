"""Is the caller speaking in this frame: WebRTC voice activity, an energy floor, a debounced onset and a hangover.

Decides frame by frame without delaying audio, so it knows nothing of what comes next; whoever needs the beginning of a
word keeps a pre-roll (`pre_roll_samples` says how much the onset decision may have cost). Walk: hop 2, after echo.
"""

from __future__ import annotations

import warnings
from collections import deque

import numpy as np

with warnings.catch_warnings():  # webrtcvad-wheels asks pkg_resources for its own version; that import is deprecated
    warnings.simplefilter("ignore")
    import webrtcvad

from telephony.config import TelephonyConfig
from telephony.wire_metrics import dbov

_VAD_FRAME_MS = 10  # webrtcvad takes 10, 20 or 30 ms


class VoiceActivity:
    """One leg's caller. `push` takes whole frames of the leg's rate."""

    def __init__(self, config: TelephonyConfig) -> None:
        self._rate = config.sample_rate_hz
        self._vad = webrtcvad.Vad(config.vad_mode)
        self._min_dbov = config.vad_min_dbov
        self._onset_frames = max(1, config.vad_onset_ms // _VAD_FRAME_MS)
        window_frames = max(1, config.vad_onset_window_ms // _VAD_FRAME_MS)
        self._window: deque[bool] = deque(maxlen=window_frames)
        self._hangover_frames = config.vad_hangover_ms // _VAD_FRAME_MS
        self._unvoiced_frames = 0
        self._rest = b""
        self.is_voiced = False
        self.pre_roll_samples = window_frames * self._rate * _VAD_FRAME_MS // 1000

    def push(self, pcm: bytes, is_echo: bool = False) -> bool:
        """True while the caller speaks. `is_echo`: the frame is our own voice coming back, so it is not speech."""
        self._rest += pcm
        size = 2 * self._rate * _VAD_FRAME_MS // 1000
        while len(self._rest) >= size:
            frame, self._rest = self._rest[:size], self._rest[size:]
            self._frame(self._is_speech(frame) and not is_echo)
        return self.is_voiced

    def _is_speech(self, frame: bytes) -> bool:
        if not self._vad.is_speech(frame, self._rate):  # always asked: it adapts to the noise
            return False
        samples = np.frombuffer(frame, "<i2").astype(np.float32)
        return dbov(float(samples @ samples) / len(samples)) > self._min_dbov

    def _frame(self, is_speech: bool) -> None:
        self._window.append(is_speech)
        if not self.is_voiced:
            self.is_voiced = sum(self._window) >= self._onset_frames
            self._unvoiced_frames = 0
            return
        self._unvoiced_frames = 0 if is_speech else self._unvoiced_frames + 1
        if self._unvoiced_frames > self._hangover_frames:
            self.is_voiced = False
            self._window.clear()
