"""Left context of the flow's layers, between two chunks of a turn. Two forms with the same two questions.

- `GrowingCache`: one turn, everything kept (or the last `keep` frames): the plain form.
- `FlowCache`: many turns at once in fixed tensors, a bounded window of whole chunks each. A turn's chunk number says
  where its next keys go (a ring of chunks) and which of two places holds a convolution's last frames; so nothing
  moves, rows of different ages and of different Euler steps share one pass, and a pass that failed half-way can
  simply be run again. `CacheRows` is one batch's view of it in the order of time, for layers with relative positions;
  `RingRows` the view in the order of places, for layers that do not ask which key is older: it copies nothing.

A prompt's own chunks are pinned: they keep their places before the ring, so that a voice that was given by example
stays in reach however long the turn. The encoder has no pinned places but a ring longer by as many chunks (its keys
cost a hundredth), so that inside the window both see all that there was.

Full-size CosyVoice 2 keeps 115 MB of keys and values per second of window and call in bfloat16, which is why the
window is bounded. Knows nothing of what the layers compute. Part of step 9 of the walk; layout is ours.

Legend: B rows, T frames of one chunk, P pinned chunks, R chunks of the ring, C chunks looked at, S = C * T, H heads,
K head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from minmo_runtime.model.fixed_shapes import FixedCall


class LeftContext(Protocol):
    def left_frames(self, module: nn.Module, x: Tensor, frames: int) -> Tensor:
        """x [B, C, T] with `frames` earlier frames in front; remembers the last ones for the next chunk."""
        ...

    def left_keys(self, module: nn.Module, key: Tensor, value: Tensor, keep: int) -> tuple[Tensor, Tensor]:
        """key, value [B, H, T, K] with the earlier ones in front; remembers them (`keep` frames, -1: all)."""
        ...


class GrowingCache:
    """One turn; exact for any left context. The first `pinned` frames of keys are never dropped."""

    def __init__(self, pinned: int = 0) -> None:
        self.pinned = pinned
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
        if start > self.pinned > 0:
            kept = [torch.cat((part[:, :, : self.pinned], part[:, :, start:]), dim=2) for part in (key, value)]
        else:
            kept = [part[:, :, 0 if self.pinned else start :] for part in (key, value)]
        self.keys[module] = (kept[0], kept[1])
        return key, value


class SlotCopy:
    """All that a FlowCache holds of one slot."""

    def __init__(self, parts: list[tuple[Tensor, Tensor]]) -> None:
        self.parts = parts  # (the cache's tensor, this slot's share of it)

    def is_finite(self) -> bool:
        return all(bool(torch.isfinite(part).all()) for _, part in self.parts)


class FlowCache:
    """`num_rows` rows; row = slot for the encoder, (step, slot, guided?) for the estimator: `Flow` numbers them.

    Tensors are made at the first use of each layer, for all rows at once. Owned by the engine's sound jobs.
    """

    def __init__(self, num_slots: int, num_left_chunks: int, num_pinned: int = 0) -> None:
        if num_left_chunks < 0:
            raise ValueError("flow cache: the window must be bounded")
        self.num_slots = num_slots
        self.num_left_chunks = num_left_chunks
        self.num_pinned = num_pinned
        self.num_places = num_left_chunks + 1  # R
        self.fixed: FixedCall | None = None  # passes in fixed shapes; the last slot is then their spare one
        self._frames: dict[nn.Module, Tensor] = {}  # [rows, 2, C, frames]
        self._keys: dict[nn.Module, tuple[Tensor, Tensor]] = {}  # each [rows, places, T, H, K]

    def view(
        self, rows: Sequence[int], num_rows: int, chunks: Sequence[int], pinned: Sequence[int], device: torch.device
    ) -> CacheRows:
        """Batch row i is cache row rows[i] of `num_rows`, at its turn's chunk number chunks[i], whose first pinned[i]
        chunks stay in reach."""
        return CacheRows(self, list(rows), num_rows, list(chunks), self._with_places(pinned), device)

    def ring_view(
        self, rows: Sequence[int], num_rows: int, chunks: Sequence[int], pinned: Sequence[int], device: torch.device
    ) -> RingRows:
        """The same for layers that do not ask which key is older."""
        return RingRows.of(self, list(rows), num_rows, list(chunks), self._with_places(pinned), device)

    def _with_places(self, pinned: Sequence[int]) -> list[int]:
        if max(pinned) > self.num_pinned:
            raise ValueError(f"flow cache: a prompt of {max(pinned)} chunks, but places for {self.num_pinned}")
        return list(pinned)

    @torch.inference_mode()
    def reset(self, slot: int) -> None:
        """Empty a slot: a NaN left behind would reach its next owner through 0 * NaN."""
        for tensor in self._tensors():
            self._of_slot(tensor, slot).zero_()

    def copy(self, slot: int) -> SlotCopy:
        """What the slot holds now."""
        return SlotCopy([(tensor, self._of_slot(tensor, slot).clone()) for tensor in self._tensors()])

    @torch.inference_mode()
    def paste(self, copy: SlotCopy, slot: int) -> None:
        """The slot holds what `copy` was taken from."""
        for tensor, part in copy.parts:
            self._of_slot(tensor, slot).copy_(part)

    def _tensors(self) -> list[Tensor]:
        return [*self._frames.values(), *(part for pair in self._keys.values() for part in pair)]

    def _of_slot(self, tensor: Tensor, slot: int) -> Tensor:
        """Rows of one slot: the encoder's, or those of every Euler step, guided and not."""
        return tensor.view(-1, self.num_slots, *tensor.shape[1:])[:, slot]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors())

    def frames_of(self, module: nn.Module, num_rows: int, like: Tensor, frames: int) -> Tensor:
        if module not in self._frames:
            self._frames[module] = like.new_zeros(num_rows, 2, like.shape[1], frames)
        return self._frames[module]

    def keys_of(self, module: nn.Module, num_rows: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """`like` [B, T, H, K]."""
        if module not in self._keys:
            shape = (num_rows, self.num_pinned + self.num_places, *like.shape[1:])
            self._keys[module] = (like.new_zeros(shape), like.new_zeros(shape))
        return self._keys[module]


class CacheRows:
    """One batch's view, keys in the order of time. Chunks are as wide as the first layer's x says; a turn's last one is
    padded to that width.

    Example, a ring of 3, a row at chunk 4: its keys go to place 4 % 3 = 1, and it looks at places 2, 0, 1 (chunks 2, 3,
    4).
    """

    def __init__(
        self, cache: FlowCache, rows: list[int], num_rows: int, chunks: list[int], pinned: list[int], device: Any
    ) -> None:
        self.cache, self.num_rows = cache, num_rows
        ring = cache.num_pinned + cache.num_places
        reach = [min(chunk, cache.num_left_chunks + count) + 1 for chunk, count in zip(chunks, pinned, strict=True)]
        self.num_seen = max(reach)  # C
        order = [[(chunk + 1 - self.num_seen + offset) % ring for offset in range(self.num_seen)] for chunk in chunks]
        self.rows = torch.tensor(rows, device=device)
        self.place = torch.tensor([chunk % ring for chunk in chunks], device=device)
        self.order = torch.tensor(order, device=device)  # [B, C]
        self.is_first = torch.tensor([chunk == 0 for chunk in chunks], device=device)[:, None, None]
        self.now = torch.tensor([chunk % 2 for chunk in chunks], device=device)
        self.then = 1 - self.now
        # Of chunks before the turn's beginning, or out of this row's reach, nothing may be seen.
        self.num_missing = [self.num_seen - count for count in reach]

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


class RingRows:
    """One batch's view, keys in the order of their places: pinned ones, then the ring. Made of tensors only, so that a
    CUDA graph can read them again; of plain numbers where all rows are alike, and then nothing is gathered.

    Example, P = 2 pinned, R = 3, a row at chunk 6 of a turn with two pinned: chunk 6 is the fifth of the ring, so its
    keys go to place 2 + 4 % 3 = 3, and it looks at places 0, 1 (the prompt) and 2, 3, 4 (chunks 5, 6, 4).
    """

    def __init__(
        self,
        cache: FlowCache,
        num_rows: int,
        index: Tensor | slice,
        place: Tensor | int,
        now: Tensor | int,
        is_first: Tensor,
        num_seen: int,
    ) -> None:
        self.cache, self.num_rows = cache, num_rows
        self.index, self.place, self.now, self.is_first, self.num_seen = index, place, now, is_first, num_seen
        self.seen_places: list[list[bool]] = []  # of each row, up to num_seen

    @classmethod
    def of(
        cls, cache: FlowCache, rows: list[int], num_rows: int, chunks: list[int], pinned: list[int], device: Any
    ) -> RingRows:
        places = [_place(cache, chunk, count) for chunk, count in zip(chunks, pinned, strict=True)]
        all_seen = [_seen(cache, chunk, count) for chunk, count in zip(chunks, pinned, strict=True)]
        is_first = torch.tensor([chunk == 0 for chunk in chunks], device=device)[:, None, None]
        step = rows[1] - rows[0] if len(rows) > 1 else 1
        is_alike = len(set(chunks)) == len(set(places)) == 1 and step > 0
        if cache.fixed is None and is_alike and rows == list(range(rows[0], rows[-1] + 1, step)):
            index, place, now = slice(rows[0], rows[-1] + 1, step), places[0], chunks[0] % 2
            made = cls(cache, num_rows, index, place, now, is_first, max(map(len, all_seen)))
        else:
            index, place, now = (
                torch.tensor(part, device=device) for part in (rows, places, [chunk % 2 for chunk in chunks])
            )
            most = cache.num_pinned + cache.num_places if cache.fixed is not None else max(map(len, all_seen))
            made = cls(cache, num_rows, index, place, now, is_first, most)
        made.seen_places = [seen + [False] * (made.num_seen - len(seen)) for seen in all_seen]
        made.places = places
        return made

    places: list[int]  # where each row's keys go

    def left_frames(self, module: nn.Module, x: Tensor, frames: int) -> Tensor:
        if not frames:
            return x
        stored = self.cache.frames_of(module, self.num_rows, x, frames)
        x = torch.cat((stored[self.index, self.now].masked_fill(self.is_first, 0.0), x), dim=-1)
        stored[self.index, 1 - self.now] = x[..., x.shape[-1] - frames :]
        return x

    def left_keys(self, module: nn.Module, key: Tensor, value: Tensor, keep: int) -> tuple[Tensor, Tensor]:
        """`keep` is the cache's own window here."""
        pair = (key.transpose(1, 2), value.transpose(1, 2))  # [B, T, H, K]
        whole = []
        for stored, new in zip(self.cache.keys_of(module, self.num_rows, pair[0]), pair, strict=True):
            stored[self.index, self.place] = new
            seen = stored[self.index][:, : self.num_seen]  # [B, C, T, H, K]
            whole.append(seen.flatten(1, 2).transpose(1, 2))
        return whole[0], whole[1]

    def visible(self, width: int, lengths: Sequence[int]) -> Tensor | None:
        """As CacheRows.visible, by places; never None in fixed shapes."""
        is_full = all(length == width for length in lengths)
        if self.cache.fixed is None and is_full and all(map(all, self.seen_places)):
            return None
        mask = torch.tensor(self.seen_places).repeat_interleave(width, dim=1)  # [B, S]
        for row, (place, length) in enumerate(zip(self.places, lengths, strict=True)):
            mask[row, place * width + length : (place + 1) * width] = False
        return mask[:, None].to(self.is_first.device)


def _place(cache: FlowCache, chunk: int, pinned: int) -> int:
    return chunk if chunk < pinned else cache.num_pinned + (chunk - pinned) % cache.num_places


def _seen(cache: FlowCache, chunk: int, pinned: int) -> list[bool]:
    """Of the places up to the last one that holds a chunk of this turn, whether each holds one."""
    if chunk < pinned:
        return [True] * (chunk + 1)
    in_ring = min(chunk - pinned + 1, cache.num_places)
    return [True] * pinned + [False] * (cache.num_pinned - pinned) + [True] * in_ring
