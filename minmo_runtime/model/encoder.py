"""Voice encoder: SAN-M blocks over fbank features, with a CTC head and utterance tags. First box of the figure.

One code path for two kinds of checkpoint, told apart only by data (`EncoderDims`):

* SenseVoice-Small (arXiv 2407.04051; keys `encoder.encoders0.0.…`, `ctc.ctc_lo`, `embed`): stacked frames, sinusoid
  positions, symmetric FSMN taps, full context, four query rows in front whose outputs are the tags.
* streaming encoders: two causal stride-2 convolutions in front (SenseVoice-Large's rate, 25 Hz), causal FSMN taps,
  attention within a chunk and a bounded left context, tags from linear heads on the frames. Streaming equals offline.

Letters: B batch, T encoder frames, F fbank frames, D width, H heads, M mel bins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minmo_runtime.model.dims import EncoderDims

TAG_GROUPS = ("language", "emotion", "event")


class SanmAttention(nn.Module):
    """Multi-head attention plus a depth-wise FSMN memory over the values (SAN-M)."""

    def __init__(self, input_size: int, dims: EncoderDims) -> None:
        super().__init__()
        size = dims.output_size
        self.num_heads = dims.attention_heads
        self.taps = dims.kernel_size
        self.is_causal = dims.fsmn_padding == "causal"
        self.linear_q_k_v = nn.Linear(input_size, 3 * size)
        self.linear_out = nn.Linear(size, size)
        self.fsmn_block = nn.Conv1d(size, size, dims.kernel_size, groups=size, bias=False)

    def memory(self, values: Tensor, past: Tensor | None) -> Tensor:
        """FSMN branch: depth-wise convolution of the values in time, plus the values. [B, T, D]; `past` [B,
        taps - 1, D]."""
        x = values.transpose(1, 2)
        if past is not None:
            x = torch.cat([past.transpose(1, 2), x], dim=2)
        elif self.is_causal:
            x = F.pad(x, (self.taps - 1, 0))
        else:
            left = (self.taps - 1) // 2
            x = F.pad(x, (left, self.taps - 1 - left))
        return self.fsmn_block(x).transpose(1, 2) + values

    def forward(self, x: Tensor, mask: Tensor | None, valid: Tensor | None) -> Tensor:
        """[B, T, D_in] -> [B, T, D]. `mask` [B or 1, 1, T, T] True where attention is allowed; `valid` [B, T,
        1] zeroes padding."""
        query, key, value = self.linear_q_k_v(x).chunk(3, dim=-1)
        if valid is not None:
            value = value * valid
        memory = self.memory(value, None)
        if valid is not None:
            memory = memory * valid
        context = F.scaled_dot_product_attention(
            self._heads(query), self._heads(key), self._heads(value), attn_mask=mask
        )
        return self.linear_out(self._join(context)) + memory

    def forward_chunk(self, x: Tensor, state: LayerState, mask: Tensor) -> tuple[Tensor, LayerState]:
        """One chunk with cached left context; `mask` [B, 1, 1, L + T] True where a key exists."""
        query, key, value = self.linear_q_k_v(x).chunk(3, dim=-1)
        memory = self.memory(value, state.memory)
        keys, values = torch.cat([state.key, key], dim=1), torch.cat([state.value, value], dim=1)
        context = F.scaled_dot_product_attention(
            self._heads(query), self._heads(keys), self._heads(values), attn_mask=mask
        )
        length = x.shape[1]
        past = torch.cat([state.memory, value], dim=1)[:, length:]
        return self.linear_out(self._join(context)) + memory, LayerState(keys[:, length:], values[:, length:], past)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, H, T, D / H]

    def _join(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(-2)


class FeedForward(nn.Module):
    def __init__(self, dims: EncoderDims) -> None:
        super().__init__()
        self.w_1 = nn.Linear(dims.output_size, dims.linear_units)
        self.w_2 = nn.Linear(dims.linear_units, dims.output_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_2(F.relu(self.w_1(x), inplace=True))


class EncoderLayer(nn.Module):
    """Pre-norm block; the first block of SenseVoice changes the width and then has no residual round its attention."""

    def __init__(self, input_size: int, dims: EncoderDims) -> None:
        super().__init__()
        self.self_attn = SanmAttention(input_size, dims)
        self.feed_forward = FeedForward(dims)
        self.norm1 = nn.LayerNorm(input_size)
        self.norm2 = nn.LayerNorm(dims.output_size)
        self.has_residual = input_size == dims.output_size

    def forward(self, x: Tensor, mask: Tensor | None, valid: Tensor | None) -> Tensor:
        attended = self.self_attn(self.norm1(x), mask, valid)
        x = x + attended if self.has_residual else attended
        return x + self.feed_forward(self.norm2(x))

    def forward_chunk(self, x: Tensor, state: LayerState, mask: Tensor) -> tuple[Tensor, LayerState]:
        attended, state = self.self_attn.forward_chunk(self.norm1(x), state, mask)
        x = x + attended if self.has_residual else attended
        return x + self.feed_forward(self.norm2(x)), state


class ConvFront(nn.Module):
    """Two causal convolutions of stride 2: fbank frames at 100 Hz -> encoder frames at 25 Hz."""

    KERNEL = 5

    def __init__(self, num_mel_bins: int, size: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(num_mel_bins, size, self.KERNEL, stride=2)
        self.conv2 = nn.Conv1d(size, size, self.KERNEL, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, F, M] -> [B, ceil(F / 4), D]"""
        x = F.gelu(self.conv1(F.pad(x.transpose(1, 2), (self.KERNEL - 1, 0))))
        return F.gelu(self.conv2(F.pad(x, (self.KERNEL - 1, 0)))).transpose(1, 2)

    def forward_chunk(self, x: Tensor, past: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """`x` [B, 4 n, M]; `past` = the last four inputs of either convolution. A zero `past` is the offline
        padding."""
        first = torch.cat([past[0], x.transpose(1, 2)], dim=2)
        middle = torch.cat([past[1], F.gelu(self.conv1(first))], dim=2)
        keep = self.KERNEL - 1
        return F.gelu(self.conv2(middle)).transpose(1, 2), (first[:, :, -keep:], middle[:, :, -keep:])


@dataclass
class LayerState:
    """Left context of one block for B rows: key, value [B, L, D] and FSMN inputs [B, taps - 1, D]."""

    key: Tensor
    value: Tensor
    memory: Tensor


@dataclass
class EncoderState:
    """Everything a stream's encoder remembers. `num_frames` [B] counts encoder frames seen, so that a young row
    masks its empty context."""

    front: tuple[Tensor, Tensor]
    layers: list[LayerState]
    num_frames: Tensor

    @staticmethod
    def stack(states: list[EncoderState]) -> EncoderState:
        """Rows of several calls as one batch."""
        return EncoderState(
            (torch.cat([s.front[0] for s in states]), torch.cat([s.front[1] for s in states])),
            [
                LayerState(
                    *(torch.cat(parts) for parts in zip(*((s.key, s.value, s.memory) for s in rows), strict=True))
                )
                for rows in zip(*(s.layers for s in states), strict=True)
            ],
            torch.cat([s.num_frames for s in states]),
        )

    def row(self, index: int) -> EncoderState:
        """One call's state out of a batch (copies: rows share no memory)."""
        keep = slice(index, index + 1)
        return EncoderState(
            (self.front[0][keep].clone(), self.front[1][keep].clone()),
            [LayerState(s.key[keep].clone(), s.value[keep].clone(), s.memory[keep].clone()) for s in self.layers],
            self.num_frames[keep].clone(),
        )


class SanmEncoder(nn.Module):
    """The blocks, under SenseVoice's names: `encoders0` (1), `encoders`, `after_norm`, `tp_encoders`, `tp_norm`."""

    def __init__(self, dims: EncoderDims) -> None:
        super().__init__()
        self.dims = dims
        is_conv = dims.front_end == "conv"
        self.front = ConvFront(dims.num_mel_bins, dims.output_size) if is_conv else None
        input_size = dims.output_size if is_conv else dims.num_mel_bins * dims.lfr_m
        self.encoders0 = nn.ModuleList([EncoderLayer(input_size, dims)])
        self.encoders = nn.ModuleList([EncoderLayer(dims.output_size, dims) for _ in range(dims.num_blocks - 1)])
        self.after_norm = nn.LayerNorm(dims.output_size)
        self.tp_encoders = nn.ModuleList([EncoderLayer(dims.output_size, dims) for _ in range(dims.tp_blocks)])
        self.tp_norm = nn.LayerNorm(dims.output_size) if dims.tp_blocks else None

    def blocks(self) -> list[EncoderLayer]:
        """Blocks before `after_norm`, in order."""
        return [*self.encoders0, *self.encoders]  # type: ignore[list-item]

    def attention_mask(self, length: int, lengths: Tensor | None, device: torch.device | None = None) -> Tensor | None:
        """[B or 1, 1, T, T]: own chunk and `left_context_frames` before it; padding is never attended."""
        mask = None
        index = torch.arange(length, device=device)
        if self.dims.chunk_frames:
            chunk = index // self.dims.chunk_frames
            start = chunk.unsqueeze(1) * self.dims.chunk_frames - self.dims.left_context_frames
            mask = (chunk.unsqueeze(0) <= chunk.unsqueeze(1)) & (index.unsqueeze(0) >= start)
            mask = mask[None, None]
        if lengths is not None:
            exists = (index < lengths.unsqueeze(1))[:, None, None, :]
            # A padded query keeps itself as a key: an all-masked row would give NaN.
            exists = exists | torch.eye(length, dtype=torch.bool, device=device)[None, None]
            mask = exists if mask is None else mask & exists
        return mask

    def embed(self, x: Tensor) -> Tensor:
        """Front end of the stack: convolution, or SenseVoice's scale and sinusoid positions."""
        if self.front is not None:
            return self.front(x)
        return x * math.sqrt(self.dims.output_size) + sinusoid(x.shape[1], x.shape[2]).to(x)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Features [B, F or T, D_in] -> hidden [B, T, D]. `lengths` [B] in encoder frames."""
        x = self.embed(x)
        lengths = None if lengths is None else lengths.to(x.device)
        mask = self.attention_mask(x.shape[1], lengths, x.device)
        steps = torch.arange(x.shape[1], device=x.device)
        valid = None if lengths is None else (steps < lengths.unsqueeze(1)).unsqueeze(2).to(x.dtype)
        for block in self.blocks():
            x = block(x, mask, valid)
        x = self.after_norm(x)
        for block in self.tp_encoders:
            x = block(x, mask, valid)
        return x if self.tp_norm is None else self.tp_norm(x)


class VoiceEncoder(nn.Module):
    """Encoder, CTC head and tags under the parents' key names (`encoder.`, `ctc.ctc_lo.`, `embed.`)."""

    def __init__(self, dims: EncoderDims) -> None:
        super().__init__()
        self.dims = dims
        self.encoder = SanmEncoder(dims)
        self.ctc = nn.ModuleDict({"ctc_lo": nn.Linear(dims.output_size, dims.vocab_size)})
        self.embed = nn.Embedding(dims.num_queries, dims.num_mel_bins * dims.lfr_m) if dims.num_queries else None
        self.tags = nn.ModuleDict(
            {group: nn.Linear(dims.output_size, len(names)) for group, names in self._tag_names() if names}
        )
        width = dims.num_mel_bins * dims.lfr_m  # normalised as they enter: frame by frame, or stacked
        self.register_buffer("cmvn_shift", torch.zeros(width), persistent=dims.has_cmvn)
        self.register_buffer("cmvn_scale", torch.ones(width), persistent=dims.has_cmvn)

    def _tag_names(self) -> list[tuple[str, tuple[str, ...]]]:
        return [("language", self.dims.languages), ("emotion", self.dims.emotions), ("event", self.dims.events)]

    def normalise(self, features: Tensor) -> Tensor:
        """Global mean and variance: (x + shift) * scale, the form of SenseVoice's am.mvn."""
        return (features + self.cmvn_shift) * self.cmvn_scale if self.dims.has_cmvn else features

    def forward(self, features: Tensor, lengths: Tensor | None = None, queries: Tensor | None = None) -> Tensor:
        """[B, F, M] (or stacked [B, T, m*M]) -> hidden [B, T, D]; `queries` [B, Q] rows of `embed` put in front."""
        features = self.normalise(features)
        if queries is not None:
            assert self.embed is not None, "this checkpoint has no query rows"
            features = torch.cat([self.embed(queries.to(features.device)), features], dim=1)
        return self.encoder(features, lengths)

    def ctc_log_probs(self, hidden: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, V]"""
        return F.log_softmax(self.ctc["ctc_lo"](hidden), dim=-1)

    def tag_logits(self, hidden: Tensor, lengths: Tensor | None = None) -> dict[str, Tensor]:
        """Mean over frames, then one linear head a group: {"language": [B, n], …}."""
        if lengths is None:
            pooled = hidden.mean(1)
        else:
            valid = (torch.arange(hidden.shape[1]) < lengths.unsqueeze(1)).unsqueeze(2).to(hidden.dtype)
            pooled = (hidden * valid).sum(1) / valid.sum(1).clamp(min=1)
        return {group: head(pooled) for group, head in self.tags.items()}

    # ------------------------------------------------------------------ streaming

    @property
    def fbank_frames_per_chunk(self) -> int:
        """Fbank frames that one chunk eats (conv front only)."""
        return 4 * self.dims.chunk_frames

    def init_state(self, batch_size: int = 1) -> EncoderState:
        """State of a call that has heard nothing."""
        dims = self.dims
        if dims.front_end != "conv" or not dims.chunk_frames or dims.fsmn_padding != "causal":
            raise ValueError(
                f"front_end = {dims.front_end!r}: a full-context encoder cannot stream; re-run it per segment"
            )
        keep = ConvFront.KERNEL - 1
        weight = self.ctc["ctc_lo"].weight
        zeros = partial(torch.zeros, device=weight.device, dtype=weight.dtype)
        layers = [
            LayerState(
                zeros(batch_size, dims.left_context_frames, dims.output_size),
                zeros(batch_size, dims.left_context_frames, dims.output_size),
                zeros(batch_size, dims.kernel_size - 1, dims.output_size),
            )
            for _ in range(dims.num_blocks)
        ]
        front = (zeros(batch_size, dims.num_mel_bins, keep), zeros(batch_size, dims.output_size, keep))
        return EncoderState(front, layers, torch.zeros(batch_size, dtype=torch.long, device=weight.device))

    def forward_chunk(self, features: Tensor, state: EncoderState) -> tuple[Tensor, EncoderState]:
        """One chunk of every row: [B, 4 * chunk_frames, M] -> hidden [B, chunk_frames, D] and the new state."""
        assert features.shape[1] == self.fbank_frames_per_chunk, f"chunk of {features.shape[1]} fbank frames"
        assert self.encoder.front is not None and self.encoder.tp_norm is None
        x, front = self.encoder.front.forward_chunk(self.normalise(features), state.front)
        length, context = x.shape[1], self.dims.left_context_frames
        first_real = context - state.num_frames.clamp(max=context)  # [B]
        mask = (torch.arange(context + length, device=x.device) >= first_real.unsqueeze(1))[:, None, None, :]
        layers = []
        for block, layer_state in zip(self.encoder.blocks(), state.layers, strict=True):
            x, layer_state = block.forward_chunk(x, layer_state, mask)
            layers.append(layer_state)
        return self.encoder.after_norm(x), EncoderState(front, layers, state.num_frames + length)


def sinusoid(length: int, depth: int) -> Tensor:
    """SenseVoice's positions: count from 1, sines then cosines. # [T, depth]"""
    position = torch.arange(1, length + 1, dtype=torch.float32).unsqueeze(1)
    rate = torch.exp(torch.arange(depth // 2, dtype=torch.float32) * (-math.log(10000.0) / (depth / 2 - 1)))
    return torch.cat([torch.sin(position * rate), torch.cos(position * rate)], dim=1)


def collapse(ids: Tensor, blank: int = 0) -> list[int]:
    """Greedy CTC: drop repeats, then blanks. [T] -> ids"""
    previous, kept = blank, []
    for token in ids.tolist():
        if token not in (previous, blank):
            kept.append(token)
        previous = token
    return kept
