"""A small causal Transformer layer with bounded memory, used by the input projector and the duplex predictor.

Offline it sees the last `left_context` frames by a band mask; streamed it carries their keys and values. Both give the
same numbers for any chunk sizes. State is one object per call, apart from the weights. Knows nothing of what the frames
mean.

Legend: B batch, T frames, D width, H heads, K head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minmo_runtime.model.layers import RotaryTable, apply_rotary

ROPE_THETA = 10_000.0


@dataclass
class LayerState:
    """Keys and values of the frames still in reach, [1, H, <= left_context - 1, K], and the next frame's position."""

    keys: Tensor
    values: Tensor
    position: int = 0


class CausalLayer(nn.Module):
    """Pre-norm self-attention (rotary positions) and feed-forward. Frame t sees frames t - left_context + 1 .. t."""

    def __init__(self, size: int, num_heads: int, ffn_size: int, left_context: int) -> None:
        super().__init__()
        self.num_heads, self.left_context = num_heads, left_context
        self.norm_attention = nn.LayerNorm(size)
        self.qkv = nn.Linear(size, 3 * size)
        self.attention_out = nn.Linear(size, size)
        self.norm_ffn = nn.LayerNorm(size)
        self.ffn_in = nn.Linear(size, ffn_size)
        self.ffn_out = nn.Linear(ffn_size, size)
        self.rotary = RotaryTable(size // num_heads, ROPE_THETA)

    def init_state(self) -> LayerState:
        weight = self.qkv.weight
        empty = weight.new_zeros(1, self.num_heads, 0, weight.shape[1] // self.num_heads)
        return LayerState(empty, empty)

    def forward(self, x: Tensor) -> Tensor:
        """Offline: [B, T, D]; padding may stand on the right only."""
        steps = torch.arange(x.shape[1], device=x.device)
        behind = steps[:, None] - steps[None]
        visible = (behind >= 0) & (behind < self.left_context)  # [T, T]
        q, k, v = self._project(x, 0)
        return self._finish(x, q, k, v, visible)

    def forward_chunk(self, x: Tensor, state: LayerState) -> Tensor:
        """Streaming, one call: [1, T, D], any T >= 0; `state` moves on."""
        if not x.shape[1]:
            return x
        q, k, v = self._project(x, state.position)
        keys, values = torch.cat([state.keys, k], dim=2), torch.cat([state.values, v], dim=2)
        num_old = state.keys.shape[2]
        rows = torch.arange(x.shape[1], device=x.device)[:, None] + num_old
        behind = rows - torch.arange(keys.shape[2], device=x.device)[None]
        out = self._finish(x, q, keys, values, (behind >= 0) & (behind < self.left_context))
        keep = min(self.left_context - 1, keys.shape[2])
        first = keys.shape[2] - keep
        state.keys, state.values, state.position = keys[:, :, first:], values[:, :, first:], state.position + x.shape[1]
        return out

    def forward_rows(self, x: Tensor, states: Sequence[LayerState]) -> tuple[Tensor, list[LayerState]]:
        """Streaming, one chunk of each of B calls of any age: [B, T, D] and the states after it; none is changed."""
        length = x.shape[1]
        positions = torch.tensor([state.position for state in states], device=x.device)[:, None]
        positions = positions + torch.arange(length, device=x.device)
        q, k, v = self._project_at(x, positions, max(state.position for state in states) + length)
        num_old = [state.keys.shape[2] for state in states]
        most = max(num_old)
        pad = [(0, 0, most - count, 0) for count in num_old]
        old_keys = torch.cat([nn.functional.pad(s.keys, p) for s, p in zip(states, pad, strict=True)])
        old_values = torch.cat([nn.functional.pad(s.values, p) for s, p in zip(states, pad, strict=True)])
        keys, values = torch.cat([old_keys, k], dim=2), torch.cat([old_values, v], dim=2)
        places = torch.arange(most + length, device=x.device)
        behind = (places[most:, None] - places[None])[None, None]  # [1, 1, T, S]
        first = torch.tensor([most - count for count in num_old], device=x.device)[:, None, None, None]
        visible = (behind >= 0) & (behind < self.left_context) & (places >= first)
        out = self._finish(x, q, keys, values, visible)
        after = []
        for row, (state, count) in enumerate(zip(states, num_old, strict=True)):
            start = most + length - min(self.left_context - 1, count + length)
            own = slice(row, row + 1)
            after.append(
                LayerState(keys[own, :, start:].clone(), values[own, :, start:].clone(), state.position + length)
            )
        return out, after

    def _project(self, x: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        positions = torch.arange(start, start + x.shape[1], device=x.device)[None]
        return self._project_at(x, positions, start + x.shape[1])

    def _project_at(self, x: Tensor, positions: Tensor, bound: int) -> tuple[Tensor, Tensor, Tensor]:
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm_attention(x)).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        cos, sin = self.rotary(positions, bound)
        cos, sin = cos[:, None], sin[:, None]
        return apply_rotary(q, cos, sin), apply_rotary(k, cos, sin), v

    def _finish(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        attended = nn.functional.scaled_dot_product_attention(q, k, v.to(q.dtype), attn_mask=visible)
        x = x + self.attention_out(attended.transpose(1, 2).flatten(2))
        return x + self.ffn_out(nn.functional.gelu(self.ffn_in(self.norm_ffn(x))))
