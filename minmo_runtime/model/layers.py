"""Small layers that several boxes of the figure share: RMSNorm and rotary positions.

Legend: B batch, T new positions, H heads, K head width. Knows nothing of caches or of modules.
Source: Qwen2 (arXiv 2407.10671), RoFormer (arXiv 2104.09864) with the two halves rotated, not neighbouring pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root-mean-square norm; computed in float32 whatever the input is, as the reference does."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
        normed = nn.functional.rms_norm(x.float(), self.weight.shape, None, self.eps)
        return self.weight * normed.to(x.dtype)


class RotaryTable(nn.Module):
    """cos and sin of every position so far; grows by doubling, holds no weights.

    Example, head width 4, theta 10000: frequencies are 1 and 0.01, so position 3 has angles (3, 0.03, 3, 0.03).
    """

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.theta = theta
        self.cos: Tensor = torch.empty(0)
        self.sin: Tensor = torch.empty(0)

    def forward(self, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """cos, sin [B, T, K] for integer `positions` [B, T], all below `length` (an upper bound, to avoid a sync)."""
        if self.cos.shape[0] < length or self.cos.device != positions.device:
            self._grow(max(length, 2 * self.cos.shape[0], 256), positions.device)
        return self.cos[positions], self.sin[positions]

    def _grow(self, length: int, device: torch.device) -> None:
        exponent = torch.arange(0, self.head_dim, 2, device=device, dtype=torch.float32) / self.head_dim
        angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * (1.0 / self.theta**exponent)[None]
        self.cos = torch.cat([angles.cos()] * 2, dim=-1)
        self.sin = torch.cat([angles.sin()] * 2, dim=-1)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, H, T, K] by cos, sin [B, 1, T, K]."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return (x * cos + turned * sin).to(x.dtype)
