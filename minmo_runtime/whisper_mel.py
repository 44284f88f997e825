"""Features of the two ONNX parents: Whisper's log-mel for the speech tokenizer, Kaldi fbank for the speaker encoder.

Offline only, when a prompt voice or training targets are prepared; nothing of the walk calls it. It does not know what
reads them (prompt_voice.py does). Sources: openai-whisper `audio.py` (`log_mel_spectrogram`, 128 mels of Slaney),
CosyVoice `cosyvoice/cli/frontend.py` (Kaldi fbank 80 without dither, the mean over time taken out).

Letters: S samples at 16 kHz, T frames of 10 ms, M mel bins.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from minmo_runtime import features
from minmo_runtime.mel import MelConfig, mel_filterbank

NUM_FFT_SAMPLES = 400
HOP_SAMPLES = 160
_FLOOR = 1e-10
_DYNAMIC_RANGE = 8.0  # decades below the loudest bin of the clip
_POVEY_EXPONENT = 0.85


@functools.cache
def whisper_filters(num_mel_bins: int = 128) -> Tensor:
    """Triangles of unit area, [M, 201]."""
    return mel_filterbank(
        MelConfig(
            sample_rate_hz=features.SAMPLE_RATE_HZ,
            num_fft_samples=NUM_FFT_SAMPLES,
            hop_samples=HOP_SAMPLES,
            num_mel_bins=num_mel_bins,
            high_hz=features.SAMPLE_RATE_HZ / 2,
        )
    )


def whisper_mel(waveform: Tensor, num_mel_bins: int = 128) -> Tensor:
    """[S] in [-1, 1] -> [M, S // 160], base-10 logarithm scaled to about [-1, 1]."""
    window = torch.hann_window(NUM_FFT_SAMPLES, device=waveform.device)
    spectrum = torch.stft(waveform, NUM_FFT_SAMPLES, HOP_SAMPLES, window=window, return_complex=True)
    power = spectrum[..., :-1].abs().square()  # the last frame is dropped
    log = (whisper_filters(num_mel_bins).to(waveform.device) @ power).clamp_min(_FLOOR).log10()
    return (torch.maximum(log, log.max() - _DYNAMIC_RANGE) + 4.0) / 4.0


@functools.cache
def povey_window() -> Tensor:
    n = torch.arange(features.WINDOW_SAMPLES, dtype=torch.float64)
    return (0.5 - 0.5 * torch.cos(2 * math.pi * n / (features.WINDOW_SAMPLES - 1))).pow(_POVEY_EXPONENT).float()


def campplus_fbank(waveform: Tensor, num_mel_bins: int = 80) -> Tensor:
    """[S] in [-1, 1] -> [T, M]; NOT scaled to int16 (as the parent feeds it), the mean over time taken out."""
    frames = features.log_mel(waveform, povey_window(), num_mel_bins)
    return frames - frames.mean(0, keepdim=True)
