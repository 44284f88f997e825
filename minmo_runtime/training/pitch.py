"""F0 of clean synthetic speech, as a training target of the vocoder: windowed autocorrelation with a continuity pass.

Made for one clear voice without noise; it is no pitch tracker for telephone audio. Training only.
Source: Boersma 1993 (autocorrelation divided by the window's own), with a small dynamic programme over its peaks.
"""

from __future__ import annotations

import numpy as np

_WINDOW_S = 0.040
_NUM_CANDIDATES = 4
_VOICING_THRESHOLD = 0.55
_SILENCE_RMS = 0.002
_JUMP_COST = 1.2  # per octave between neighbouring frames
_VOICING_COST = 0.25  # for switching voiced/unvoiced
_SHORT_LAG_BONUS = 0.04  # per octave: prefers the fundamental over its sub-harmonics


def track_f0(
    waveform: np.ndarray, sample_rate_hz: int, hop_samples: int, low_hz: float = 70.0, high_hz: float = 420.0
) -> np.ndarray:
    """F0 in Hz at the END of each hop (sample (n + 1) * hop), 0 where unvoiced; length = samples // hop."""
    num_frames = len(waveform) // hop_samples
    if num_frames == 0:
        return np.zeros(0, np.float32)
    correlation, rms = _autocorrelation(waveform, sample_rate_hz, hop_samples, num_frames)
    lag_low, lag_high = int(sample_rate_hz / high_hz), int(sample_rate_hz / low_hz) + 1
    lags, strengths = _peaks(correlation, lag_low, lag_high)
    strengths[rms < _SILENCE_RMS] = 0.0
    return _best_path(sample_rate_hz / lags, strengths).astype(np.float32)


def _autocorrelation(waveform: np.ndarray, rate_hz: int, hop: int, num_frames: int) -> tuple[np.ndarray, np.ndarray]:
    size = int(_WINDOW_S * rate_hz)
    padded = np.pad(waveform, (size // 2, size))
    starts = hop * np.arange(1, num_frames + 1)
    frames = np.lib.stride_tricks.sliding_window_view(padded, size)[starts]
    window = np.hanning(size + 2)[1:-1].astype(np.float32)
    frames = (frames - frames.mean(axis=1, keepdims=True)) * window
    num_fft = 1 << (2 * size - 1).bit_length()
    power = np.abs(np.fft.rfft(frames, num_fft)) ** 2
    raw = np.fft.irfft(power)[:, : size // 2 + 1]
    of_window = np.fft.irfft(np.abs(np.fft.rfft(window, num_fft)) ** 2)[: size // 2 + 1]
    rms = np.sqrt(np.maximum(raw[:, 0], 0) / np.sum(window**2))
    return (raw / np.maximum(raw[:, :1], 1e-9)) * (of_window[0] / of_window), rms


def _peaks(correlation: np.ndarray, lag_low: int, lag_high: int) -> tuple[np.ndarray, np.ndarray]:
    """The strongest local maxima per frame: refined lags and strengths [frames, candidates]."""
    lag_high = min(lag_high, correlation.shape[1] - 2)
    middle = correlation[:, lag_low : lag_high + 1]
    left, right = correlation[:, lag_low - 1 : lag_high], correlation[:, lag_low + 1 : lag_high + 2]
    height = np.where((middle >= left) & (middle > right), middle, 0.0)
    height = height * (height > 0)
    bonus = _SHORT_LAG_BONUS * np.log2(lag_high / np.arange(lag_low, lag_high + 1))
    order = np.argsort(-(height + bonus * (height > 0)), axis=1)[:, :_NUM_CANDIDATES]
    rows = np.arange(len(middle))[:, None]
    curve = left[rows, order] - 2 * middle[rows, order] + right[rows, order]
    shift = 0.5 * (left[rows, order] - right[rows, order]) / np.where(np.abs(curve) < 1e-9, -1.0, curve)
    strength = np.where(height[rows, order] > 0, height[rows, order] + bonus[order], 0.0)
    return lag_low + order + np.clip(shift, -0.5, 0.5), strength


def _best_path(f0_hz: np.ndarray, strengths: np.ndarray) -> np.ndarray:
    """Viterbi over [candidates..., unvoiced]."""
    num_frames, num_candidates = f0_hz.shape
    octaves = np.log2(f0_hz)
    local = np.concatenate((strengths, np.full((num_frames, 1), _VOICING_THRESHOLD)), axis=1)
    back = np.zeros((num_frames, num_candidates + 1), np.int64)
    score = local[0]
    for frame in range(1, num_frames):
        cost = np.full((num_candidates + 1, num_candidates + 1), _VOICING_COST)
        cost[:-1, :-1] = _JUMP_COST * np.abs(octaves[frame - 1][:, None] - octaves[frame][None])
        cost[-1, -1] = 0.0
        total = score[:, None] - cost
        back[frame] = total.argmax(axis=0)
        score = total.max(axis=0) + local[frame]
    result, state = np.zeros(num_frames), int(score.argmax())
    for frame in range(num_frames - 1, -1, -1):
        result[frame] = f0_hz[frame, state] if state < num_candidates else 0.0
        state = int(back[frame, state])
    return result
