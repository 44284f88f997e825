"""The flow's estimator: given a noisy mel, its mean and a time, the direction towards the clean mel.

A U-Net without real down-sampling: one block down, `num_mid_blocks`, one up with a skip; each is a causal residual
convolution with the time added, followed by `n_blocks` Transformer blocks. As in flow_encoder, whole rows with a mask
or one aligned chunk with a cache give the same numbers; each Euler step owns its cache. Key names are CosyVoice 2's
(`decoder.estimator.*`).
Source: CosyVoice `flow/decoder.py` and Matcha-TTS (arXiv 2309.03199), as described in facts/minmo.md 2.2.

Legend: B rows, T mel frames, C channels, M mel bins.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minmo_runtime.model.dims import Dims
from minmo_runtime.model.flow_cache import LeftContext
from minmo_runtime.model.flow_encoder import with_left_context, with_left_keys
from minmo_runtime.model.linear_forms import Joined

_MASKED = -1e10
_TIME_SCALE = 1000.0


@dataclass(frozen=True)
class FlowEstimatorDims(Dims):
    """CosyVoice 2's own names. `channels` is one number: the U-Net has a single level."""

    channels: int = 256
    attention_head_dim: int = 64
    num_heads: int = 8
    n_blocks: int = 4
    num_mid_blocks: int = 12


class TimeMlp(nn.Module):
    def __init__(self, in_size: int, size: int) -> None:
        super().__init__()
        self.in_size = in_size
        self.linear_1 = nn.Linear(in_size, size)
        self.linear_2 = nn.Linear(size, size)

    def forward(self, time: Tensor) -> Tensor:
        """time [B] in [0, 1] → [B, size]; sines first, then cosines."""
        half = self.in_size // 2
        steps = torch.arange(half, device=time.device, dtype=torch.float32)
        angle = _TIME_SCALE * time[:, None].float() * torch.exp(steps * -(math.log(10000.0) / (half - 1)))[None]
        x = torch.cat((angle.sin(), angle.cos()), dim=-1).to(self.linear_1.weight.dtype)
        return self.linear_2(nn.functional.silu(self.linear_1(x)))


class CausalConv3(nn.Conv1d):
    """Kernel 3, looks two frames back."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3)

    def run(self, x: Tensor, cache: LeftContext | None) -> Tensor:
        return self(with_left_context(x, 2, self, cache))


class ConvBlock(nn.Module):
    """Causal convolution, LayerNorm over channels, Mish. `block.1` has no weights: the checkpoint counts a transpose
    there.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.block = nn.ModuleList((CausalConv3(in_channels, out_channels), nn.Identity(), nn.LayerNorm(out_channels)))

    def run(self, x: Tensor, valid: Tensor | None, cache: LeftContext | None) -> Tensor:
        y = self.block[0].run(_masked(x, valid), cache)
        y = nn.functional.mish(self.block[2](y.transpose(1, 2))).transpose(1, 2)
        return _masked(y, valid)


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, time_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Mish(), nn.Linear(time_size, out_channels))
        self.block1 = ConvBlock(in_channels, out_channels)
        self.block2 = ConvBlock(out_channels, out_channels)
        self.res_conv = nn.Conv1d(in_channels, out_channels, 1)

    def run(self, x: Tensor, valid: Tensor | None, time: Tensor, cache: LeftContext | None) -> Tensor:
        y = self.block1.run(x, valid, cache) + self.mlp(time)[..., None]
        return self.block2.run(y, valid, cache) + self.res_conv(_masked(x, valid))


class SelfAttention(nn.Module):
    """No bias on query, key, value; the inner width differs from the channel count."""

    def __init__(self, channels: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        inner = num_heads * head_dim
        self.to_q = nn.Linear(channels, inner, bias=False)
        self.to_k = nn.Linear(channels, inner, bias=False)
        self.to_v = nn.Linear(channels, inner, bias=False)
        self.to_out = nn.ModuleList((nn.Linear(inner, channels),))
        self.fused: Joined | None = None  # query, key, value in one

    def fuse(self, make: Callable[[Tensor, Tensor | None], nn.Module]) -> None:
        """One product for the three, in the form `make`; the plain weights are let go. Serving only."""
        if self.fused is None:
            weights = [part.weight for part in (self.to_q, self.to_k, self.to_v)]
            self.fused = make(torch.cat(weights), None).forward
            self.to_q = self.to_k = self.to_v = None  # type: ignore[assignment]

    def run(self, x: Tensor, bias: Tensor | None, keep: int, cache: LeftContext | None) -> Tensor:
        rows, length = x.shape[:2]
        heads = (rows, length, self.num_heads, self.head_dim)
        if self.fused is None:
            parts = [to(x) for to in (self.to_q, self.to_k, self.to_v)]
        else:
            parts = list(self.fused(x).chunk(3, dim=-1))
        query, key, value = (part.view(heads).transpose(1, 2) for part in parts)
        key, value = with_left_keys(key, value, keep, self, cache)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.to_out[0](mixed.transpose(1, 2).reshape(rows, length, -1))


class GeluProjection(nn.Module):
    def __init__(self, in_size: int, out_size: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_size, out_size)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(self.proj(x))


class EstimatorFeedForward(nn.Module):
    """`net.1` is the checkpoint's dropout place."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            GeluProjection(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    def __init__(self, dims: FlowEstimatorDims) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dims.channels)
        self.attn1 = SelfAttention(dims.channels, dims.num_heads, dims.attention_head_dim)
        self.norm3 = nn.LayerNorm(dims.channels)
        self.ff = EstimatorFeedForward(dims.channels)

    def run(self, x: Tensor, bias: Tensor | None, keep: int, cache: LeftContext | None) -> Tensor:
        x = x + self.attn1.run(self.norm1(x), bias, keep, cache)
        return x + self.ff(self.norm3(x))


def _stage(in_channels: int, dims: FlowEstimatorDims, has_conv: bool) -> nn.ModuleList:
    """The checkpoint's numbering: 0 the residual convolution, 1 the Transformer blocks, 2 (down and up only) a
    convolution.
    """
    parts: list[nn.Module] = [
        ResnetBlock(in_channels, dims.channels, 4 * dims.channels),
        nn.ModuleList(TransformerBlock(dims) for _ in range(dims.n_blocks)),
    ]
    if has_conv:
        parts.append(CausalConv3(dims.channels, dims.channels))
    return nn.ModuleList(parts)


class FlowEstimator(nn.Module):
    """x, mu, speaker, condition, each [B, M, T], and time [B] → direction [B, M, T]."""

    def __init__(self, dims: FlowEstimatorDims, num_mel_bins: int) -> None:
        super().__init__()
        self.dims = dims
        in_channels = 4 * num_mel_bins
        self.time_mlp = TimeMlp(in_channels, 4 * dims.channels)
        self.down_blocks = nn.ModuleList([_stage(in_channels, dims, has_conv=True)])
        self.mid_blocks = nn.ModuleList(_stage(dims.channels, dims, has_conv=False) for _ in range(dims.num_mid_blocks))
        self.up_blocks = nn.ModuleList([_stage(2 * dims.channels, dims, has_conv=True)])
        self.final_block = ConvBlock(dims.channels, dims.channels)
        self.final_proj = nn.Conv1d(dims.channels, num_mel_bins, 1)

    def forward(
        self,
        x: Tensor,
        mu: Tensor,
        time: Tensor,
        speaker: Tensor,
        condition: Tensor,
        valid: Tensor | None = None,
        attention: Tensor | None = None,
        keep: int = -1,
        cache: LeftContext | None = None,
    ) -> Tensor:
        """`speaker` [B, M]; `valid` [B, T] marks frames inside their row; `attention` [B, T, T] or [T, T] true = may
        see.

        With `cache`, x is one aligned chunk; `keep` frames of keys stay for the next one (-1: all).
        """
        bias = self._bias(valid, attention, x)
        embedded = self.time_mlp(time)
        x = torch.cat((x, mu, speaker[..., None].expand(-1, -1, x.shape[-1]), condition), dim=1)
        x = self._stage(self.down_blocks[0], x, valid, embedded, bias, keep, cache)
        skip = x
        x = self.down_blocks[0][2].run(_masked(x, valid), cache)
        for stage in self.mid_blocks:
            x = self._stage(stage, x, valid, embedded, bias, keep, cache)
        x = self._stage(self.up_blocks[0], torch.cat((x, skip), dim=1), valid, embedded, bias, keep, cache)
        x = self.up_blocks[0][2].run(_masked(x, valid), cache)
        x = self.final_proj(_masked(self.final_block.run(x, valid, cache), valid))
        return _masked(x, valid)

    def _stage(
        self,
        stage: nn.ModuleList,
        x: Tensor,
        valid: Tensor | None,
        time: Tensor,
        bias: Tensor | None,
        keep: int,
        cache: LeftContext | None,
    ) -> Tensor:
        x = stage[0].run(x, valid, time, cache).transpose(1, 2)  # [B, T, C]
        for block in stage[1]:
            x = block.run(x, bias, keep, cache)
        return x.transpose(1, 2)

    @staticmethod
    def _bias(valid: Tensor | None, attention: Tensor | None, like: Tensor) -> Tensor | None:
        """One additive mask for all blocks, [B or 1, 1, T or 1, S]; S is T, or with a cache the window and T."""
        if valid is None and attention is None:
            return None
        allowed = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=like.device)
        if valid is not None:
            allowed = allowed & valid[:, None, None, :]
        if attention is not None:
            allowed = allowed & (attention if attention.dim() == 3 else attention[None])[:, None]
        return torch.zeros(allowed.shape, dtype=like.dtype, device=like.device).masked_fill(~allowed, _MASKED)


def _masked(x: Tensor, valid: Tensor | None) -> Tensor:
    return x if valid is None else x * valid[:, None, :]
