"""The flow's encoder: voice tokens at 25 Hz become hidden vectors at 50 Hz (two rows of Conformer blocks, x2 between
them).

Each attention block sees its own chunk and whole chunks to the left; three look-ahead tokens enter through one
convolution only. Offline forms take a mask over everything; `step` takes one aligned chunk and a `LeftContext` with
the left context: the same numbers. Key names are CosyVoice 2's (`encoder.*` of flow.pt). Part of step 9 of the walk;
knows nothing of mels or calls.
Source: CosyVoice `transformer/upsample_encoder.py` as described in facts/minmo.md 2.2; relative positions as in ESPnet.

Legend: B rows, T new frames, S frames with left context, D width, H heads, K head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minmo_runtime.model.dims import Dims
from minmo_runtime.model.flow_cache import LeftContext

_MASKED = -1e10  # finite, so that a row of padding only stays a number


@dataclass(frozen=True)
class FlowEncoderDims(Dims):
    """CosyVoice 2's own names; `static_chunk_size` and `pre_lookahead_len` count tokens."""

    output_size: int = 512
    attention_heads: int = 8
    linear_units: int = 2048
    num_blocks: int = 6
    num_up_blocks: int = 4
    static_chunk_size: int = 25
    pre_lookahead_len: int = 3
    up_stride: int = 2


def chunk_mask(
    length: int, chunk: int, num_left_chunks: int, device: torch.device | None = None, num_pinned: int = 0
) -> Tensor:
    """[T, T] true where query (row) may see key: the same chunk, and `num_left_chunks` before it (-1: all), and the
    first `num_pinned` chunks.

    Example, chunk 2, one left chunk, T = 6: row 4 sees keys 2..5.
    """
    index = torch.arange(length, device=device) // chunk
    mask = index[None, :] <= index[:, None]
    if num_left_chunks >= 0:
        mask &= (index[None, :] >= index[:, None] - num_left_chunks) | (index[None, :] < num_pinned)
    return mask


def padding_mask(lengths: Tensor, length: int) -> Tensor:
    """[B, T] true where a frame is inside its row."""
    return torch.arange(length, device=lengths.device)[None] < lengths[:, None]


def with_left_context(x: Tensor, frames: int, module: nn.Module, cache: LeftContext | None) -> Tensor:
    """x [B, C, T] with `frames` earlier frames in front: zeros at the start of a turn, the cached ones later."""
    return nn.functional.pad(x, (frames, 0)) if cache is None else cache.left_frames(module, x, frames)


def with_left_keys(
    key: Tensor, value: Tensor, keep: int, module: nn.Module, cache: LeftContext | None
) -> tuple[Tensor, Tensor]:
    """key, value [B, H, T, K] with the cached ones in front; keeps the last `keep` frames (-1: all) for the next
    chunk.
    """
    return (key, value) if cache is None else cache.left_keys(module, key, value, keep)


def relative_positions(num_new: int, num_keys: int, size: int, like: Tensor) -> Tensor:
    """Sinusoids of query position minus key position, from num_keys - 1 down to -(num_new - 1): [num_keys + num_new -
    1, size].
    """
    offset = torch.arange(num_keys - 1, -num_new, -1.0, device=like.device, dtype=torch.float32)
    rate = torch.exp(torch.arange(0, size, 2, device=like.device, dtype=torch.float32) * -(math.log(10000.0) / size))
    angle = offset[:, None] * rate[None]
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1).to(like.dtype)


class InputLayer(nn.Module):
    """Linear and LayerNorm, then times sqrt(D). The names of its parts are the checkpoint's (`out.0`, `out.1`)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.out = nn.Sequential(nn.Linear(size, size), nn.LayerNorm(size, eps=1e-5))
        self.scale = math.sqrt(size)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x) * self.scale


class RelativeAttention(nn.Module):
    """Attention with relative positions and two learned biases (Transformer-XL)."""

    def __init__(self, size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, size // num_heads
        self.linear_q = nn.Linear(size, size)
        self.linear_k = nn.Linear(size, size)
        self.linear_v = nn.Linear(size, size)
        self.linear_out = nn.Linear(size, size)
        self.linear_pos = nn.Linear(size, size, bias=False)
        self.pos_bias_u = nn.Parameter(torch.zeros(num_heads, self.head_dim))
        self.pos_bias_v = nn.Parameter(torch.zeros(num_heads, self.head_dim))

    def forward(self, x: Tensor, mask: Tensor | None, keep: int, cache: LeftContext | None) -> Tensor:
        rows, length, size = x.shape
        heads = (rows, length, self.num_heads, self.head_dim)
        query = self.linear_q(x).view(heads)
        key, value = self.linear_k(x).view(heads).transpose(1, 2), self.linear_v(x).view(heads).transpose(1, 2)
        key, value = with_left_keys(key, value, keep, self, cache)  # [B, H, S, K]
        num_keys = key.shape[2]
        positions = self.linear_pos(relative_positions(length, num_keys, size, x))
        positions = positions.view(-1, self.num_heads, self.head_dim).permute(1, 2, 0)  # [H, K, S + T - 1]
        by_offset = (query + self.pos_bias_v).transpose(1, 2) @ positions  # [B, H, T, S + T - 1]
        bias = _shift(by_offset, num_keys) / math.sqrt(self.head_dim)
        if mask is not None:
            bias = bias.masked_fill(~mask[:, None], _MASKED)
        mixed = nn.functional.scaled_dot_product_attention(
            (query + self.pos_bias_u).transpose(1, 2), key, value, attn_mask=bias
        )
        return self.linear_out(mixed.transpose(1, 2).reshape(rows, length, size))


def _shift(by_offset: Tensor, num_keys: int) -> Tensor:
    """[B, H, T, S + T - 1], columns by falling offset → [B, H, T, S], columns by key.

    Example, T = 2, S = 3 (one frame of left context): columns are offsets 2, 1, 0, -1; row 0 (query 1) wants keys
    0, 1, 2 = offsets 1, 0, -1 = columns 1..3; row 1 (query 2) wants offsets 2, 1, 0 = columns 0..2. One padded column
    and one flat re-cut do it for all rows.
    """
    rows, heads, length, width = by_offset.shape
    flat = nn.functional.pad(by_offset, (1, 0)).reshape(rows, heads, length * (width + 1))
    return flat[..., length:].reshape(rows, heads, length, width)[..., :num_keys]


class FeedForward(nn.Module):
    def __init__(self, size: int, hidden: int) -> None:
        super().__init__()
        self.w_1 = nn.Linear(size, hidden)
        self.w_2 = nn.Linear(hidden, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_2(nn.functional.silu(self.w_1(x)))


class ConformerBlock(nn.Module):
    """Attention and feed-forward, each after its norm; CosyVoice 2 uses neither the convolution nor the second half-
    FFN.
    """

    def __init__(self, size: int, num_heads: int, hidden: int) -> None:
        super().__init__()
        self.self_attn = RelativeAttention(size, num_heads)
        self.feed_forward = FeedForward(size, hidden)
        self.norm_ff = nn.LayerNorm(size, eps=1e-12)
        self.norm_mha = nn.LayerNorm(size, eps=1e-12)

    def forward(self, x: Tensor, mask: Tensor | None, keep: int, cache: LeftContext | None) -> Tensor:
        x = x + self.self_attn(self.norm_mha(x), mask, keep, cache)
        return x + self.feed_forward(self.norm_ff(x))


class LookAheadLayer(nn.Module):
    """The only place where a token sees the next ones: a convolution `pre_lookahead_len` ahead, then a causal one,
    residual.
    """

    def __init__(self, size: int, look_ahead: int) -> None:
        super().__init__()
        self.look_ahead = look_ahead
        self.conv1 = nn.Conv1d(size, size, look_ahead + 1)
        self.conv2 = nn.Conv1d(size, size, 3)

    def forward(self, x: Tensor, context: Tensor | None, cache: LeftContext | None) -> Tensor:
        """x [B, T, D]; context [B, <= look_ahead, D], missing frames count as zero."""
        ahead = x if context is None else torch.cat((x, context), dim=1)
        missing = x.shape[1] + self.look_ahead - ahead.shape[1]
        y = nn.functional.pad(ahead.transpose(1, 2), (0, missing))
        y = nn.functional.leaky_relu(self.conv1(y))
        y = self.conv2(with_left_context(y, 2, self.conv2, cache))
        return x + y.transpose(1, 2)


class UpsampleLayer(nn.Module):
    """Every frame `stride` times, then a causal convolution."""

    def __init__(self, size: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv1d(size, size, 2 * stride + 1)

    def forward(self, x: Tensor, cache: LeftContext | None) -> Tensor:
        y = x.transpose(1, 2).repeat_interleave(self.stride, dim=-1)
        return self.conv(with_left_context(y, 2 * self.stride, self.conv, cache)).transpose(1, 2)


class UpsampleConformerEncoder(nn.Module):
    """[B, T, D] embedded tokens → [B, 2T, D]."""

    def __init__(self, dims: FlowEncoderDims) -> None:
        super().__init__()
        size = dims.output_size
        self.dims = dims
        self.embed = InputLayer(size)
        self.pre_lookahead_layer = LookAheadLayer(size, dims.pre_lookahead_len)
        self.encoders = nn.ModuleList(
            ConformerBlock(size, dims.attention_heads, dims.linear_units) for _ in range(dims.num_blocks)
        )
        self.up_layer = UpsampleLayer(size, dims.up_stride)
        self.up_embed = InputLayer(size)
        self.up_encoders = nn.ModuleList(
            ConformerBlock(size, dims.attention_heads, dims.linear_units) for _ in range(dims.num_up_blocks)
        )
        self.after_norm = nn.LayerNorm(size, eps=1e-5)

    def forward(
        self,
        x: Tensor,
        lengths: Tensor,
        context: Tensor | None = None,
        is_streaming: bool = False,
        num_left_chunks: int = -1,
    ) -> tuple[Tensor, Tensor]:
        """Whole rows at once. Returns hidden [B, 2T, D] and its padding mask [B, 2T]. Without `is_streaming`: full
        attention.
        """
        dims, length, stride = self.dims, x.shape[1], self.dims.up_stride
        valid = padding_mask(lengths, length)
        mask = valid[:, None, :].expand(-1, length, -1)
        up_mask = padding_mask(lengths * stride, length * stride)[:, None, :].expand(-1, length * stride, -1)
        if is_streaming:
            mask = mask & chunk_mask(length, dims.static_chunk_size, num_left_chunks, x.device)
            up_mask = up_mask & chunk_mask(length * stride, dims.static_chunk_size * stride, num_left_chunks, x.device)
        return self._run(x, context, mask, up_mask, -1, None), padding_mask(lengths * stride, length * stride)

    def step(self, x: Tensor, context: Tensor | None, cache: LeftContext, keep: int) -> Tensor:
        """One aligned chunk [B, T, D] (the last one may be shorter), with its look-ahead tokens; `keep` tokens of keys
        stay for the next one (-1: all)."""
        return self._run(x, context, None, None, keep, cache)

    def step_rows(
        self, x: Tensor, real: Tensor, length: int, cache: LeftContext, masks: tuple[Tensor | None, Tensor | None]
    ) -> Tensor:
        """One chunk of several turns, padded to `length`, behind it the look-ahead: x [B, length + look-ahead, D].

        `real` [B, length + look-ahead] is true where there is a token; `masks` say which keys each row may see, at
        token and at mel rate ([B, 1, S]).
        """
        embedded = self.embed(x) * real[..., None].to(x.dtype)  # a missing token counts as zero BEHIND the input layer
        x, ahead = embedded[:, :length], embedded[:, length:]
        return self._run_embedded(x, ahead, masks[0], masks[1], -1, cache)

    def _run(
        self,
        x: Tensor,
        context: Tensor | None,
        mask: Tensor | None,
        up_mask: Tensor | None,
        keep: int,
        cache: LeftContext | None,
    ) -> Tensor:
        context = None if context is None else self.embed(context)
        return self._run_embedded(self.embed(x), context, mask, up_mask, keep, cache)

    def _run_embedded(
        self,
        x: Tensor,
        context: Tensor | None,
        mask: Tensor | None,
        up_mask: Tensor | None,
        keep: int,
        cache: LeftContext | None,
    ) -> Tensor:
        x = self.pre_lookahead_layer(x, context, cache)
        for block in self.encoders:
            x = block(x, mask, keep, cache)
        x = self.up_embed(self.up_layer(x, cache))
        for block in self.up_encoders:
            x = block(x, up_mask, keep * self.dims.up_stride, cache)
        return self.after_norm(x)
