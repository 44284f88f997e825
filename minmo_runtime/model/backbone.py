"""The text LLM of the figure: Qwen2 under Qwen2's own key names, with a key/value cache of fixed slots.

Rows of one batch belong to different calls: each has its own length, may bring many new positions (prefill), one
(decode) or none (stall), and joins or leaves without moving the others. It knows nothing of text, of audio or of
sampling. Walk: step 8 (reads the caller) and step 9 (says the answer); the voice LM uses the same class as its trunk.
Source: Qwen2 (arXiv 2407.10671), keys as in its released checkpoints.

Legend: B rows of this batch, T new positions (padded to the longest row), S cached positions, D hidden_size,
H attention heads, G heads per key/value head, N key/value heads, K head_dim, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from minmo_runtime.model.dims import BackboneDims
from minmo_runtime.model.layers import RMSNorm, RotaryTable, apply_rotary
from minmo_runtime.model.linear_forms import Joined, by_columns

MASKED = -1e30  # finite, so that a row that sees nothing gives numbers, not NaN


class KvCache:
    """Keys and values of `num_slots` rows, each with its own length. The engine owns one and hands out slots."""

    def __init__(
        self,
        dims: BackboneDims,
        num_slots: int,
        max_length: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (num_slots, dims.num_key_value_heads, max_length, dims.head_dim)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(dims.num_hidden_layers)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(dims.num_hidden_layers)]
        self.lengths = [0] * num_slots
        self.max_length = max_length

    @property
    def num_bytes(self) -> int:
        """As allocated."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def reset(self, slot: int) -> None:
        """Empty a slot. Zeroed, not only shortened: a NaN left behind would reach its next owner through 0 * NaN."""
        for keys, values in zip(self.keys, self.values, strict=True):
            keys[slot].zero_()
            values[slot].zero_()
        self.lengths[slot] = 0

    def truncate(self, slot: int, length: int) -> None:
        """Forget everything from position `length` on."""
        if not 0 <= length <= self.lengths[slot]:
            raise ValueError(f"kv cache: cannot cut slot {slot} of length {self.lengths[slot]} to {length}")
        self.lengths[slot] = length

    def fork(self, source: int, target: int, length: int) -> None:
        """Make `target` continue from the first `length` positions of `source`."""
        if not 0 <= length <= self.lengths[source]:
            raise ValueError(f"kv cache: cannot fork slot {source} of length {self.lengths[source]} at {length}")
        for keys, values in zip(self.keys, self.values, strict=True):
            keys[target, :, :length] = keys[source, :, :length]
            values[target, :, :length] = values[source, :, :length]
        self.lengths[target] = length


class _Batch:
    """Where each row of this forward pass reads and writes: computed once, used by every layer."""

    def __init__(self, cache: KvCache, slots: Sequence[int], num_new: Sequence[int], width: int, device: torch.device):
        starts = [cache.lengths[slot] for slot in slots]
        ends = [start + new for start, new in zip(starts, num_new, strict=True)]
        for slot, end in zip(slots, ends, strict=True):
            if end > cache.max_length:
                raise ValueError(f"kv cache: slot {slot} is full: {end} > {cache.max_length} positions")
        if any(not 0 <= new <= width for new in num_new) or len(set(slots)) != len(slots):
            raise ValueError(f"backbone: bad rows: slots {list(slots)}, num_new {list(num_new)}, width {width}")
        self.cache = cache
        self.slots = list(slots)
        self.starts = starts
        self.ends = ends
        self.length = max(ends)  # S
        self.bound = max(starts) + width
        self.positions = torch.tensor(starts, device=device)[:, None] + torch.arange(width, device=device)  # [B, T]
        # Neighbouring slots need no copy of the cache; others are gathered.
        self.is_range = self.slots == list(range(self.slots[0], self.slots[0] + len(slots)))
        self.slot_index = torch.tensor(self.slots, device=device)
        self.is_plain_decode = width == 1 and all(new == 1 for new in num_new)
        visible = torch.arange(self.length, device=device) <= self.positions[:, :, None]  # [B, T, S]
        all_visible = width == 1 and len(set(ends)) == 1
        self.mask = None if all_visible else torch.where(visible, 0.0, MASKED)[:, None, None]  # [B, 1, 1, T, S]

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys, values [B, N, T, K]; return what the rows may look at, [B, N, S, K]."""
        stored_keys, stored_values = self.cache.keys[layer], self.cache.values[layer]
        if self.is_plain_decode and len(self.slots) > 1:
            stored_keys[self.slot_index, :, self.positions[:, 0]] = keys[:, :, 0].to(stored_keys.dtype)
            stored_values[self.slot_index, :, self.positions[:, 0]] = values[:, :, 0].to(stored_values.dtype)
        else:
            for row, (slot, start, end) in enumerate(zip(self.slots, self.starts, self.ends, strict=True)):
                stored_keys[slot, :, start:end] = keys[row, :, : end - start]
                stored_values[slot, :, start:end] = values[row, :, : end - start]
        if self.is_range:
            rows = slice(self.slots[0], self.slots[0] + len(self.slots))
            return stored_keys[rows, :, : self.length], stored_values[rows, :, : self.length]
        return stored_keys[self.slot_index, :, : self.length], stored_values[self.slot_index, :, : self.length]


class Attention(nn.Module):
    """Grouped-query attention; q, k, v have a bias, the output has none."""

    def __init__(self, dims: BackboneDims) -> None:
        super().__init__()
        self.num_heads, self.num_key_value_heads, self.head_dim = (
            dims.num_attention_heads,
            dims.num_key_value_heads,
            dims.head_dim,
        )
        self.q_proj = nn.Linear(dims.hidden_size, self.num_heads * self.head_dim)
        self.k_proj = nn.Linear(dims.hidden_size, self.num_key_value_heads * self.head_dim)
        self.v_proj = nn.Linear(dims.hidden_size, self.num_key_value_heads * self.head_dim)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, dims.hidden_size, bias=False)
        self.fused: Joined | None = None  # q, k, v in one

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, D] -> q [B, H, T, K], k and v [B, N, T, K]."""
        batch, width, _ = x.shape
        if self.fused is None:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        else:
            kv_size = self.num_key_value_heads * self.head_dim
            sizes = [self.num_heads * self.head_dim, kv_size, kv_size]
            q, k, v = self.fused(x).split(sizes, dim=-1)
        return (
            q.view(batch, width, self.num_heads, self.head_dim).transpose(1, 2),
            k.view(batch, width, self.num_key_value_heads, self.head_dim).transpose(1, 2),
            v.view(batch, width, self.num_key_value_heads, self.head_dim).transpose(1, 2),
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        """No cache. mask [B, 1, T, T] or None for plain causal."""
        q, k, v = self.project(x)
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        attended = nn.functional.scaled_dot_product_attention(
            q, k, v.to(q.dtype), attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        return self.o_proj(attended.transpose(1, 2).flatten(2))

    @torch.no_grad()
    def look_back(self, rope_theta: float, sharpness: float = 9.0, num_frequencies: int = 10) -> None:
        """Start head h as "the token g back", g = 1, 2, 1, 3 for h = 0, 1, 2, 3 and so on, by its biases alone.

        A key bias (a, 0) and a query bias turned by -g * f for each rotary frequency f give a score of
        a^2 * cos(f * (distance - g)): highest at distance g; the ten fastest frequencies tell neighbours apart.
        """
        half = self.head_dim // 2
        count = min(num_frequencies, half)
        frequencies = rope_theta ** (-torch.arange(count, dtype=torch.float32) / half)
        amplitude = (sharpness * self.head_dim**0.5 / (1.0 - frequencies.cos()).sum()).sqrt()
        self.q_proj.weight.mul_(0.1)
        self.k_proj.weight.mul_(0.1)
        self.k_proj.bias.view(-1, self.head_dim)[:, :count] = amplitude
        for head, bias in enumerate(self.q_proj.bias.view(-1, self.head_dim)):
            gap = 1 if head % 2 == 0 else 2 + head // 2 % 2
            bias[:count] = amplitude * (gap * frequencies).cos()
            bias[half : half + count] = -amplitude * (gap * frequencies).sin()

    def forward_cached(self, x: Tensor, cos: Tensor, sin: Tensor, batch: _Batch, layer: int) -> Tensor:
        rows, width, _ = x.shape
        q, k, v = self.project(x)
        keys, values = batch.write(layer, apply_rotary(k, cos, sin), v)
        q = apply_rotary(q, cos, sin).reshape(rows, self.num_key_value_heads, -1, self.head_dim)  # [B, N, G*T, K]
        scores = q.to(keys.dtype) @ keys.transpose(-1, -2) * self.head_dim**-0.5  # [B, N, G*T, S]
        if batch.mask is not None:
            shape = scores.shape
            scores = (scores.view(*shape[:2], -1, width, shape[-1]) + batch.mask).view(shape)
        attended = scores.softmax(-1, dtype=torch.float32).to(values.dtype) @ values  # [B, N, G*T, K]
        attended = attended.view(rows, self.num_heads, width, self.head_dim).transpose(1, 2).flatten(2)
        return self.o_proj(attended.to(x.dtype))


class Mlp(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, dims: BackboneDims) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dims.hidden_size, dims.intermediate_size, bias=False)
        self.up_proj = nn.Linear(dims.hidden_size, dims.intermediate_size, bias=False)
        self.down_proj = nn.Linear(dims.intermediate_size, dims.hidden_size, bias=False)
        self.fused: Joined | None = None  # gate and up in one

    def forward(self, x: Tensor) -> Tensor:
        if self.fused is None:
            gate, up = self.gate_proj(x), self.up_proj(x)
        else:
            gate, up = self.fused(x).chunk(2, dim=-1)
        return self.down_proj(nn.functional.silu(gate) * up)


class DecoderLayer(nn.Module):
    """Pre-norm block."""

    def __init__(self, dims: BackboneDims) -> None:
        super().__init__()
        self.self_attn = Attention(dims)
        self.mlp = Mlp(dims)
        self.input_layernorm = RMSNorm(dims.hidden_size, dims.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(dims.hidden_size, dims.rms_norm_eps)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, batch: _Batch | None, layer: int
    ) -> Tensor:
        normed = self.input_layernorm(x)
        if batch is None:
            x = x + self.self_attn(normed, cos, sin, mask)
        else:
            x = x + self.self_attn.forward_cached(normed, cos, sin, batch, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """`model.*` of a Qwen2 checkpoint: table, layers, final norm."""

    def __init__(self, dims: BackboneDims) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(dims.vocab_size, dims.hidden_size)
        self.layers = nn.ModuleList([DecoderLayer(dims) for _ in range(dims.num_hidden_layers)])
        self.norm = RMSNorm(dims.hidden_size, dims.rms_norm_eps)


class Backbone(nn.Module):
    """Qwen2. `forward` gives hidden states after the final norm; `logits` maps them to words only where asked."""

    def __init__(self, dims: BackboneDims) -> None:
        super().__init__()
        self.dims = dims
        self.model = Trunk(dims)
        self.lm_head = None if dims.tie_word_embeddings else nn.Linear(dims.hidden_size, dims.vocab_size, bias=False)
        self.rotary = RotaryTable(dims.head_dim, dims.rope_theta)

    def embed(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_tokens(input_ids)

    def logits(self, hidden: Tensor) -> Tensor:
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return nn.functional.linear(hidden, head.weight)

    def new_cache(self, num_slots: int, max_length: int) -> KvCache:
        weight = self.model.norm.weight
        return KvCache(self.dims, num_slots, max_length, weight.device, weight.dtype)

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        embeds: Tensor | None = None,
        cache: KvCache | None = None,
        slots: Sequence[int] | None = None,
        num_new: Sequence[int] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """[B, T] ids or [B, T, D] vectors -> last hidden [B, T, D], after the final norm.

        Without `cache`: causal over T; `attention_mask` [B, T] (1 = real) hides padding, `position_ids` [B, T] for left
        padding. With `cache`: row b continues slot `slots[b]` (default b) by its first `num_new[b]` positions (default
        T); what stands behind them is padding, and its output is meaningless. The slots' lengths grow by `num_new`.
        """
        if (input_ids is None) == (embeds is None):
            raise ValueError("backbone: give input_ids or embeds")
        x = self.embed(input_ids) if embeds is None else embeds
        rows, width = x.shape[:2]
        if cache is None:
            return self._run_full(x, attention_mask, position_ids)
        slots = range(rows) if slots is None else slots
        num_new = [width] * rows if num_new is None else num_new
        batch = _Batch(cache, slots, num_new, width, x.device)
        hidden = self._run(x, batch.positions, batch.bound, None, batch)
        for slot, end in zip(batch.slots, batch.ends, strict=True):
            cache.lengths[slot] = end
        return hidden

    def _run_full(self, x: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Tensor:
        rows, width = x.shape[:2]
        positions = torch.arange(width, device=x.device).expand(rows, width) if position_ids is None else position_ids
        bound = width if position_ids is None else int(position_ids.max()) + 1
        mask = None
        if attention_mask is not None:
            causal = torch.ones(width, width, dtype=torch.bool, device=x.device).tril()
            visible = causal[None] & attention_mask[:, None].bool()  # [B, T, T]
            mask = torch.where(visible, 0.0, MASKED)[:, None].to(x.dtype)
        return self._run(x, positions, bound, mask, None)

    def _run(self, x: Tensor, positions: Tensor, bound: int, mask: Tensor | None, batch: _Batch | None) -> Tensor:
        cos, sin = self.rotary(positions, bound)
        cos, sin = cos[:, None], sin[:, None]  # [B, 1, T, K]
        if x.dtype != torch.float32:
            cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        for index, layer in enumerate(self.model.layers):
            x = layer(x, cos, sin, mask, batch, index)
        return self.model.norm(x)

    @torch.no_grad()
    def fuse(self, make: Callable[[Tensor, Tensor | None], nn.Module] | None = None) -> Backbone:
        """Join q, k, v and gate, up for fewer, larger products. Serving only: later weight changes are not seen.

        With `make` every linear layer of the blocks takes that form (linear_forms.py) and the plain weights are let go;
        without, the parts stay as views into the joined weight.
        """
        for layer in self.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            if attention.q_proj is None:  # has its form already
                continue
            qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
            attention.fused = _joined(qkv, torch.cat([part.bias for part in qkv]), make)
            mlp.fused = _joined([mlp.gate_proj, mlp.up_proj], None, make)
            if make is not None:
                attention.q_proj = attention.k_proj = attention.v_proj = mlp.gate_proj = mlp.up_proj = None
                attention.o_proj = make(attention.o_proj.weight, None)
                mlp.down_proj = make(mlp.down_proj.weight, None)
        return self

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator, embedding_std: float = 0.1) -> Backbone:
        """For training from nothing: layers add nothing at first, and layer 0 already looks at the tokens just before.

        Copying a value needs a head that knows its predecessor; found by training it takes most of the run, given it is
        there in tens of steps.
        """
        for name, parameter in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "bias")):
                parameter.zero_()
            elif name.endswith(("embed_tokens.weight", "lm_head.weight")):
                parameter.normal_(0.0, embedding_std, generator=generator)
            elif parameter.dim() == 2:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
        first = self.model.layers[0].self_attn
        first.look_back(self.dims.rope_theta)
        first.o_proj.weight.normal_(0.0, embedding_std * self.dims.head_dim**-0.5, generator=generator)
        return self


def _joined(
    parts: Sequence[nn.Linear], bias: Tensor | None, make: Callable[[Tensor, Tensor | None], nn.Module] | None
) -> Joined:
    """These layers as one product."""
    weight = torch.cat([part.weight for part in parts])
    if make is not None:
        return make(weight, bias).forward
    if weight.device.type == "cpu":
        weight = by_columns(weight)
    for part, piece in zip(parts, weight.split([len(part.weight) for part in parts]), strict=True):
        part.weight.data = piece  # no second copy in memory
    return functools.partial(nn.functional.linear, weight=weight, bias=bias)
