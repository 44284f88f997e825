"""Which 20 ms of a caller's audio the leg would call voiced: WebRTC voice activity at 8 kHz, level floor, debounced
onset, hangover.

Training has to hear calls through the same gate as service, and islands do not import each other: this repeats the rule
of telephony/voice_activity.py with that file's default settings, over a whole waveform, and a test holds the two equal.
Knows no model.
"""

from __future__ import annotations

import warnings
from collections import deque

import numpy as np
import soxr

with warnings.catch_warnings():  # webrtcvad-wheels asks pkg_resources for its own version; that import is deprecated
    warnings.simplefilter("ignore")
    import webrtcvad

LEG_RATE_HZ = 8_000
PACKET_MS = 20
_FRAME_SAMPLES = LEG_RATE_HZ // 100  # 10 ms
# Defaults of telephony/config.py.
_MODE, _MIN_DBOV, _ONSET_FRAMES, _WINDOW_FRAMES, _HANGOVER_FRAMES = 2, -50.0, 4, 8, 16


def voiced_packets(pcm: np.ndarray, rate_hz: int = 16_000) -> np.ndarray:
    """One flag per whole packet of 20 ms, as the leg's `AudioFrame.voiced` says it. `pcm` int16 at `rate_hz`."""
    narrow = pcm if rate_hz == LEG_RATE_HZ else soxr.resample(pcm, rate_hz, LEG_RATE_HZ)
    frames = narrow[: len(narrow) // _FRAME_SAMPLES * _FRAME_SAMPLES].astype("<i2").reshape(-1, _FRAME_SAMPLES)
    power = np.mean(frames.astype(np.float32) ** 2, axis=1)
    is_loud = 10 * np.log10(np.maximum(power, 1e-9) / 32768.0**2) > _MIN_DBOV
    detector = webrtcvad.Vad(_MODE)
    window: deque[bool] = deque(maxlen=_WINDOW_FRAMES)
    is_voiced, num_unvoiced = False, 0
    flags = np.zeros(len(frames), bool)
    for index, frame in enumerate(frames):
        is_speech = detector.is_speech(frame.tobytes(), LEG_RATE_HZ) and bool(is_loud[index])
        window.append(is_speech)
        if not is_voiced:
            is_voiced, num_unvoiced = sum(window) >= _ONSET_FRAMES, 0
        else:
            num_unvoiced = 0 if is_speech else num_unvoiced + 1
            if num_unvoiced > _HANGOVER_FRAMES:
                is_voiced = False
                window.clear()
        flags[index] = is_voiced
    return flags[1::2]
