"""Left context of the flow's layers, between two chunks of a turn. Two forms with the same two questions.

- `GrowingCache`: one turn, everything kept (or the last `keep` frames): the plain form.
- `FlowCache`: many turns at once in fixed tensors, a bounded window of whole chunks each. A turn's chunk number says
  where its next keys go (a ring of chunks) and which of two places holds a convolution's last frames; so nothing
  moves, rows of different ages and of different Euler steps share one pass, and a pass that failed half-way can
  simply be run again. `CacheRows` is one batch's view of it.

Full-size CosyVoice 2 keeps 115 MB of keys and values per second of window and call in bfloat16, which is why the
window is bounded. Knows nothing of what the layers compute. Part of step 9 of the walk; layout is ours.

Legend: B rows, T frames of one chunk, R chunks of the ring, C chunks looked at, S = C * T, H heads, K head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn


class LeftContext(Protocol):
    def left_frames(self, module: nn.Module, x: Tensor, frames: int) -> Tensor:
        """x [B, C, T] with `frames` earlier frames in front; remembers the last ones for the next chunk."""
        ...

    def left_keys(self, module: nn.Module, key: Tensor, value: Tensor, keep: int) -> tuple[Tensor, Tensor]:
        """key, value [B, H, T, K] with the earlier ones in front; remembers them (`keep` frames, -1: all)."""
        ...


class GrowingCache:
    """One turn; exact for any left context."""

    def __init__(self) -> None:
        self.frames: dict[nn.Module, Tensor] = {}
        self.keys: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def left_frames(self, module: nn.Module, x: Tensor, frames: int) -> Tensor:
        left = self.frames.get(module)
        x = torch.cat((x.new_zeros(x.shape[0], x.shape[1], frames) if left is None else left, x), dim=-1)
        self.frames[module] = x[..., x.shape[-1] - frames :]
        return x

    def left_keys(self, module: nn.Module, key: Tensor, value: Tensor, keep: int) -> tuple[Tensor, Tensor]:
        if module in self.keys:
            earlier = self.keys[module]
            key, value = torch.cat((earlier[0], key), dim=2), torch.cat((earlier[1], value), dim=2)
        start = 0 if keep < 0 else max(0, key.shape[2] - keep)
        self.keys[module] = (key[:, :, start:], value[:, :, start:])
        return key, value


class FlowCache:
    """`num_rows` rows; row = slot for the encoder, (step, slot, guided?) for the estimator: `Flow` numbers them.

    Tensors are made at the first use of each layer, for all rows at once. Owned by the engine's sound jobs.
    """

    def __init__(self, num_slots: int, num_left_chunks: int) -> None:
        if num_left_chunks < 0:
            raise ValueError("flow cache: the window must be bounded")
        self.num_slots = num_slots
        self.num_left_chunks = num_left_chunks
        self.num_places = num_left_chunks + 1
        self._frames: dict[nn.Module, Tensor] = {}  # [rows, 2, C, frames]
        self._keys: dict[nn.Module, tuple[Tensor, Tensor]] = {}  # each [rows, R, T, H, K]

    def view(self, rows: Sequence[int], num_rows: int, chunks: Sequence[int], device: torch.device) -> CacheRows:
        """Batch row i is cache row rows[i] of `num_rows`, at its turn's chunk number chunks[i]."""
        return CacheRows(self, list(rows), num_rows, list(chunks), device)

    @torch.inference_mode()
    def reset(self, slot: int) -> None:
        """Empty a slot: a NaN left behind would reach its next owner through 0 * NaN."""
        tensors = [*self._frames.values(), *(part for pair in self._keys.values() for part in pair)]
        for tensor in tensors:
            per_slot = tensor.view(-1, self.num_slots, *tensor.shape[1:])
            per_slot[:, slot].zero_()

    @property
    def num_bytes(self) -> int:
        tensors = [*self._frames.values(), *(part for pair in self._keys.values() for part in pair)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def frames_of(self, module: nn.Module, num_rows: int, like: Tensor, frames: int) -> Tensor:
        if module not in self._frames:
            self._frames[module] = like.new_zeros(num_rows, 2, like.shape[1], frames)
        return self._frames[module]

    def keys_of(self, module: nn.Module, num_rows: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """`like` [B, T, H, K]."""
        if module not in self._keys:
            shape = (num_rows, self.num_places, *like.shape[1:])
            self._keys[module] = (like.new_zeros(shape), like.new_zeros(shape))
        return self._keys[module]


class CacheRows:
    """One batch's view. Chunks are as wide as the first layer's x says; a turn's last one is padded to that width.

    Example, R = 3, a row at chunk 4: its keys go to place 4 % 3 = 1, and it looks at places 2, 0, 1 (chunks 2, 3, 4).
    """

    def __init__(
        self, cache: FlowCache, rows: list[int], num_rows: int, chunks: list[int], device: torch.device
    ) -> None:
        self.cache, self.num_rows = cache, num_rows
        self.num_seen = min(max(chunks) + 1, cache.num_places)  # C
        first = [chunk - self.num_seen + 1 for chunk in chunks]
        order = [[(begin + offset) % cache.num_places for offset in range(self.num_seen)] for begin in first]
        self.rows = torch.tensor(rows, device=device)
        self.place = torch.tensor([chunk % cache.num_places for chunk in chunks], device=device)
        self.order = torch.tensor(order, device=device)  # [B, C]
        self.is_first = torch.tensor([chunk == 0 for chunk in chunks], device=device)[:, None, None]
        self.now = torch.tensor([chunk % 2 for chunk in chunks], device=device)
        self.then = 1 - self.now
        # Of chunks before the turn's beginning nothing may be seen.
        self.num_missing = [max(0, -begin) for begin in first]

    def left_frames(self, module: nn.Module, x: Tensor, frames: int) -> Tensor:
        if not frames:
            return x
        stored = self.cache.frames_of(module, self.num_rows, x, frames)
        x = torch.cat((stored[self.rows, self.now].masked_fill(self.is_first, 0.0), x), dim=-1)
        stored[self.rows, self.then] = x[..., x.shape[-1] - frames :]
        return x

    def left_keys(self, module: nn.Module, key: Tensor, value: Tensor, keep: int) -> tuple[Tensor, Tensor]:
        """`keep` is the cache's own window here."""
        pair = (key.transpose(1, 2), value.transpose(1, 2))  # [B, T, H, K]
        whole = []
        for stored, new in zip(self.cache.keys_of(module, self.num_rows, pair[0]), pair, strict=True):
            stored[self.rows, self.place] = new
            seen = stored[self.rows[:, None], self.order]  # [B, C, T, H, K]
            whole.append(seen.flatten(1, 2).transpose(1, 2))
        return whole[0], whole[1]

    def visible(self, width: int, lengths: Sequence[int]) -> Tensor | None:
        """[B, 1, S] true where a key may be seen, for chunks of `width` frames of which lengths[i] are real; None =
        all."""
        if not any(self.num_missing) and all(length == width for length in lengths):
            return None
        device = self.rows.device
        index = torch.arange(self.num_seen * width, device=device)[None]
        begin = torch.tensor([missing * width for missing in self.num_missing], device=device)[:, None]
        padding = torch.tensor([width - length for length in lengths], device=device)[:, None]
        return ((index >= begin) & (index < self.num_seen * width - padding))[:, None]
