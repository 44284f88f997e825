"""One new position for many rows of a Qwen2 trunk, in fixed shapes: on a GPU each shape is one CUDA graph.

Rows are padded to a bucket with a spare cache slot that belongs to nobody, lengths to a bucket that masks what lies
behind each row. A graph replays the whole step as one launch; on a CPU the same padded step runs eagerly (tests compare
it with the plain forward pass). Which rows come is the caller's business; a graph is captured at the first use of its
shape. Walk: steps 8 and 9.

Legend: B rows of the bucket, S positions of the bucket, D hidden_size, N key/value heads, K head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minmo_runtime.model.backbone import MASKED, Backbone, KvCache
from minmo_runtime.model.fixed_shapes import ROW_BUCKETS, bucket, captured

FIRST_LENGTH_BUCKET = 256


def length_buckets(longest: int) -> tuple[int, ...]:
    """Doubling from 256 to the cache's length."""
    sizes = [FIRST_LENGTH_BUCKET]
    while sizes[-1] < longest:
        sizes.append(2 * sizes[-1])
    return (*(size for size in sizes if size < longest), longest)


class _FixedBatch:
    """What `Attention.forward_cached` needs, from tensors that a graph can read again."""

    def __init__(self, cache: KvCache, slots: Tensor, positions: Tensor, length: int, dtype: torch.dtype) -> None:
        self.cache, self.slots, self.positions, self.length = cache, slots, positions, length
        visible = torch.arange(length, device=slots.device)[None] <= positions[:, None]
        self.mask = torch.where(visible, 0.0, MASKED).to(dtype)[:, None, None, None]  # [B, 1, 1, 1, S]

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        stored_keys, stored_values = self.cache.keys[layer], self.cache.values[layer]
        stored_keys[self.slots, :, self.positions] = keys[:, :, 0].to(stored_keys.dtype)
        stored_values[self.slots, :, self.positions] = values[:, :, 0].to(stored_values.dtype)
        return stored_keys[self.slots, :, : self.length], stored_values[self.slots, :, : self.length]


class DecodeStep:
    """Owns the fixed inputs and the graphs of one trunk and one cache, whose last slot is the spare one."""

    def __init__(self, trunk: Backbone, cache: KvCache, has_graphs: bool) -> None:
        self.trunk, self.cache, self.has_graphs = trunk, cache, has_graphs
        self.spare_slot = len(cache.lengths) - 1
        self.rows = tuple(size for size in ROW_BUCKETS if size < self.spare_slot) + (max(1, self.spare_slot),)
        self.lengths = length_buckets(cache.max_length)
        weight = trunk.model.norm.weight
        most = self.rows[-1]
        self._x = torch.zeros(most, trunk.dims.hidden_size, device=weight.device, dtype=weight.dtype)
        self._slots = torch.full((most,), self.spare_slot, device=weight.device)
        self._positions = torch.zeros(most, dtype=torch.long, device=weight.device)
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        trunk.rotary(self._positions[:1], cache.max_length)  # the tables must not grow inside a graph

    @torch.inference_mode()
    def run(self, embeds: Tensor, slots: Sequence[int]) -> Tensor:
        """embeds [n, D], one new position of each slot → hidden [n, D], valid until the next step."""
        count, starts = len(slots), [self.cache.lengths[slot] for slot in slots]
        if max(starts) >= self.cache.max_length:
            full = [slot for slot, start in zip(slots, starts, strict=True) if start >= self.cache.max_length]
            raise ValueError(f"kv cache: slots {full} are full: {self.cache.max_length} positions")
        rows, length = bucket(count, self.rows), bucket(max(starts) + 1, self.lengths)
        padding = [self.spare_slot] * (rows - count), [0] * (rows - count)
        self._x[:count].copy_(embeds)
        self._slots[:rows].copy_(torch.tensor([*slots, *padding[0]]))
        self._positions[:rows].copy_(torch.tensor([*starts, *padding[1]]))
        hidden = self._replay(rows, length) if self.has_graphs else self._forward(rows, length)
        for slot, start in zip(slots, starts, strict=True):
            self.cache.lengths[slot] = start + 1
        return hidden[:count]

    def _forward(self, rows: int, length: int) -> Tensor:
        positions = self._positions[:rows]
        batch = _FixedBatch(self.cache, self._slots[:rows], positions, length, self._x.dtype)
        bound = self.cache.max_length
        return self.trunk._run(self._x[:rows, None], positions[:, None], bound, None, batch)[:, 0]  # type: ignore[arg-type]

    def _replay(self, rows: int, length: int) -> Tensor:
        shape = (rows, length)
        if shape not in self._graphs:
            self._graphs[shape] = captured(lambda: self._forward(rows, length))
        graph, hidden = self._graphs[shape]
        graph.replay()
        return hidden
