"""The speaker encoder: any length of speech to one vector of 192 values that says whose voice it is.

Our own small TDNN with squeeze-excitation and attentive statistics pooling, in the place of CosyVoice's CAM++ (whose
vector has the same width, so the flow takes either). It hears 16 kHz Kaldi fbank with the utterance mean removed, and
knows nothing of words. Used when a voice is prepared, not in the walk. Source: x-vectors (Snyder 2018) and ECAPA-TDNN
(arXiv 2005.07143), reduced.

Legend: B utterances, T fbank frames (10 ms), M mel bins, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minmo_runtime.model.dims import Dims


@dataclass(frozen=True)
class SpeakerDims(Dims):
    num_mel_bins: int = 80
    channels: int = 128
    pooled_channels: int = 256
    embedding_size: int = 192
    dilations: tuple[int, ...] = (1, 2, 3)


class _Block(nn.Module):
    """Dilated convolution with a gate from the whole utterance, residual."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)  # over channels, frame by frame: padding stays out of it
        self.conv = nn.Conv1d(channels, channels, 3, dilation=dilation, padding=dilation)
        self.mix = nn.Conv1d(channels, channels, 1)
        self.gate = nn.Sequential(
            nn.Linear(channels, channels // 4), nn.ReLU(), nn.Linear(channels // 4, channels), nn.Sigmoid()
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.mix(nn.functional.relu(self.conv(self.norm(x.transpose(1, 2)).transpose(1, 2) * mask))) * mask
        mean = y.sum(2) / mask.sum(2)
        return x + y * self.gate(mean)[..., None]


class SpeakerEncoder(nn.Module):
    """fbank -> unit vector."""

    def __init__(self, dims: SpeakerDims) -> None:
        super().__init__()
        self.dims = dims
        self.conv_in = nn.Conv1d(dims.num_mel_bins, dims.channels, 5, padding=2)
        self.blocks = nn.ModuleList([_Block(dims.channels, dilation) for dilation in dims.dilations])
        self.widen = nn.Conv1d(dims.channels, dims.pooled_channels, 1)
        self.attention = nn.Sequential(
            nn.Conv1d(dims.pooled_channels, 64, 1), nn.Tanh(), nn.Conv1d(64, dims.pooled_channels, 1)
        )
        self.linear_out = nn.Linear(2 * dims.pooled_channels, dims.embedding_size)

    def forward(self, fbank: Tensor, lengths: Tensor | None = None) -> Tensor:
        """[B, T, M] with T >= 1, `lengths` [B] valid frames -> [B, embedding_size], L2 norm 1. Padding does not
        change the result.
        """
        batch, length, _ = fbank.shape
        lengths = torch.full((batch,), length, device=fbank.device) if lengths is None else lengths
        mask = (torch.arange(length, device=fbank.device)[None] < lengths[:, None])[:, None].to(
            fbank.dtype
        )  # [B, 1, T]
        x = fbank.transpose(1, 2)
        x = (x - (x * mask).sum(2, keepdim=True) / mask.sum(2, keepdim=True)) * mask
        x = nn.functional.relu(self.conv_in(x)) * mask
        for block in self.blocks:
            x = block(x, mask)
        x = nn.functional.relu(self.widen(x)) * mask
        weights = self.attention(x).masked_fill(mask == 0, -torch.inf).softmax(2)
        mean = (x * weights).sum(2)
        spread = ((x - mean[..., None]).square() * weights).sum(2).clamp_min(1e-6).sqrt()
        return nn.functional.normalize(self.linear_out(torch.cat([mean, spread], 1)), dim=1)
