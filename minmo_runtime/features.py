"""Kaldi log-mel filterbank features at 16 kHz, offline and streaming, and SenseVoice's frame stacking.

Step 8 of the walk starts here: waveform -> fbank frames (10 ms) -> the encoder's front end. Golden against
`sensevoice_io.safetensors` (frontendN, lfr). It knows no model and no call.

Letters: B batch, S samples, T fbank frames (10 ms), M mel bins.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

SAMPLE_RATE_HZ = 16_000
WINDOW_SAMPLES = 400  # 25 ms
HOP_SAMPLES = 160  # 10 ms
FRAMES_PER_S = SAMPLE_RATE_HZ // HOP_SAMPLES
FFT_SIZE = 512
PREEMPHASIS = 0.97
LOW_HZ = 20.0
_PCM_SCALE = 32768.0  # Kaldi works on int16-sized floats
_LOG_FLOOR = torch.finfo(torch.float32).eps


def _mel_scale(hz: Tensor) -> Tensor:
    return 1127.0 * torch.log1p(hz / 700.0)


@functools.cache
def mel_filters(num_mel_bins: int) -> Tensor:
    """Kaldi's triangles, linear on the mel scale. # [FFT_SIZE / 2 + 1, M]"""
    low, high = _mel_scale(torch.tensor([LOW_HZ, SAMPLE_RATE_HZ / 2], dtype=torch.float64))
    edges = low + (high - low) * torch.arange(num_mel_bins + 2, dtype=torch.float64) / (num_mel_bins + 1)
    bins = _mel_scale(torch.arange(FFT_SIZE // 2, dtype=torch.float64) * SAMPLE_RATE_HZ / FFT_SIZE).unsqueeze(1)
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    rising, falling = (bins - left) / (centre - left), (right - bins) / (right - centre)
    triangles = torch.minimum(rising, falling).clamp(min=0.0)
    return torch.cat(
        [triangles, torch.zeros(1, num_mel_bins, dtype=torch.float64)]
    ).float()  # Nyquist bin carries nothing


@functools.cache
def hamming_window() -> Tensor:
    n = torch.arange(WINDOW_SAMPLES, dtype=torch.float64)
    return (0.54 - 0.46 * torch.cos(2 * math.pi * n / (WINDOW_SAMPLES - 1))).float()


def num_frames(num_samples: int) -> int:
    """Whole windows only (Kaldi's snip_edges): 400 samples give 1 frame, 560 give 2."""
    return 0 if num_samples < WINDOW_SAMPLES else 1 + (num_samples - WINDOW_SAMPLES) // HOP_SAMPLES


def fbank(waveform: Tensor, num_mel_bins: int = 80) -> Tensor:
    """Log-mel energies without dither. [..., S] in [-1, 1] -> [..., T, M]"""
    return log_mel(waveform * _PCM_SCALE, hamming_window(), num_mel_bins)


def log_mel(samples: Tensor, window: Tensor, num_mel_bins: int) -> Tensor:
    """Kaldi's fbank of samples on any scale with any window of 25 ms. [..., S] -> [..., T, M]"""
    frames = samples.unfold(-1, WINDOW_SAMPLES, HOP_SAMPLES)  # [..., T, 400]
    frames = frames - frames.mean(-1, keepdim=True)
    previous = torch.cat([frames[..., :1], frames[..., :-1]], dim=-1)
    frames = (frames - PREEMPHASIS * previous) * window.to(samples.device)
    power = torch.fft.rfft(frames, n=FFT_SIZE).abs().square()
    return (power @ mel_filters(num_mel_bins).to(samples.device)).clamp(min=_LOG_FLOOR).log()


def stack_frames(features: Tensor, lfr_m: int, lfr_n: int) -> Tensor:
    """Low frame rate: windows of `lfr_m` frames every `lfr_n`, first frame repeated in front, last one behind.
    [T, M] -> [ceil(T / n), m * M]

    Worked example, m 7, n 6, T 8: three copies of frame 0 go in front, so window 0 = 0 0 0 0 1 2 3 and window 1 =
    3 4 5 6 7 7 7.
    """
    length = features.shape[0]
    count = math.ceil(length / lfr_n)
    front = (lfr_m - 1) // 2
    index = torch.arange(count).unsqueeze(1) * lfr_n + torch.arange(lfr_m) - front
    return features[index.clamp(0, length - 1)].reshape(count, -1)


@dataclass
class FbankStream:
    """Streaming fbank of one call: feed any number of samples, get the frames that became whole. Equal to `fbank`
    over all samples."""

    num_mel_bins: int = 80
    _tail: Tensor = field(default_factory=lambda: torch.zeros(0))

    def push(self, waveform: Tensor) -> Tensor:
        """[S] -> [T_new, M] (T_new may be 0)."""
        samples = torch.cat([self._tail, waveform])
        count = num_frames(len(samples))
        if count == 0:
            self._tail = samples
            return torch.zeros(0, self.num_mel_bins)
        self._tail = samples[count * HOP_SAMPLES :]
        return fbank(samples[: (count - 1) * HOP_SAMPLES + WINDOW_SAMPLES], self.num_mel_bins)
