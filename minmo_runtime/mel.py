"""Log-mel spectrogram of the voice side (24 kHz, 50 frames a second): what the flow makes and the vocoder reads.

Offline only: it is a training target and the analysis of a prompt voice; nothing on the walk of a caller's frame
calls it. It does not know the caller's features (Kaldi fbank at 16 kHz, `features.py`).
Source: Matcha-TTS `matcha/utils/audio.py` as CosyVoice 2 configures it; mel scale and area normalisation of Slaney
(1998).
Legend: B batch, S samples, F mel frames, M mel bins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_LINEAR_HZ_PER_MEL = 200.0 / 3.0  # Slaney: linear below 1 kHz ...
_LOG_START_HZ = 1000.0
_LOG_START_MEL = _LOG_START_HZ / _LINEAR_HZ_PER_MEL
_LOG_STEP = math.log(6.4) / 27.0  # ... 27 steps per factor 6.4 above


@dataclass(frozen=True)
class MelConfig:
    """Defaults are CosyVoice 2's: the mel that every flow and vocoder of the family speaks."""

    sample_rate_hz: int = 24_000
    num_fft_samples: int = 1920
    hop_samples: int = 480
    num_mel_bins: int = 80
    low_hz: float = 0.0
    high_hz: float = 8000.0
    floor: float = 1e-5


def _hz_to_mel(hz: Tensor) -> Tensor:
    above = _LOG_START_MEL + torch.log((hz / _LOG_START_HZ).clamp_min(1e-10)) / _LOG_STEP
    return torch.where(hz >= _LOG_START_HZ, above, hz / _LINEAR_HZ_PER_MEL)


def _mel_to_hz(mel: Tensor) -> Tensor:
    above = _LOG_START_HZ * torch.exp(_LOG_STEP * (mel - _LOG_START_MEL))
    return torch.where(mel >= _LOG_START_MEL, above, mel * _LINEAR_HZ_PER_MEL)


def mel_filterbank(config: MelConfig) -> Tensor:
    """Triangles of unit area in Hz, [M, bins]; computed in float64 as the reference's library does."""
    bins_hz = torch.linspace(0, config.sample_rate_hz / 2, config.num_fft_samples // 2 + 1, dtype=torch.float64)
    ends = _hz_to_mel(torch.tensor([config.low_hz, config.high_hz], dtype=torch.float64))
    edges_hz = _mel_to_hz(torch.linspace(float(ends[0]), float(ends[1]), config.num_mel_bins + 2, dtype=torch.float64))
    widths = edges_hz.diff()
    slopes = edges_hz[:, None] - bins_hz[None]  # [M + 2, bins]
    rising = -slopes[:-2] / widths[:-1, None]
    falling = slopes[2:] / widths[1:, None]
    triangles = torch.minimum(rising, falling).clamp_min(0)
    return (triangles * (2.0 / (edges_hz[2:] - edges_hz[:-2]))[:, None]).float()


class MelSpectrogram(nn.Module):
    """waveform [B, S] in [-1, 1] → natural-log mel [B, M, F], F = S // hop. Holds no weights."""

    def __init__(self, config: MelConfig | None = None) -> None:
        super().__init__()
        self.config = config or MelConfig()
        self.register_buffer("filterbank", mel_filterbank(self.config), persistent=False)
        self.register_buffer("window", torch.hann_window(self.config.num_fft_samples), persistent=False)

    def forward(self, waveform: Tensor) -> Tensor:
        config = self.config
        pad = (config.num_fft_samples - config.hop_samples) // 2
        padded = nn.functional.pad(waveform[:, None], (pad, pad), mode="reflect")[:, 0]
        spectrum = torch.stft(
            padded, config.num_fft_samples, config.hop_samples, window=self.window, center=False, return_complex=True
        )
        magnitude = torch.sqrt(spectrum.real.square() + spectrum.imag.square() + 1e-9)
        return torch.log((self.filterbank @ magnitude).clamp_min(config.floor))
