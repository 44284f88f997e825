"""Who owns which row of a key/value cache, and beginnings that calls share. The tensors are `model.backbone.KvCache`.

A stream holds one slot of the LLM's cache for its life and one of the voice LM's for a turn. A freed slot is emptied
at once: a NaN left behind by a failed call would reach its next owner. Calls of one campaign begin alike (system
prompt, greeting): the first one computes that beginning, the others get a copy of its keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from minmo_runtime.conversation import Position
from minmo_runtime.model.backbone import KvCache


class SlotPool:
    """Slots of one cache, lowest free one first (neighbouring slots need no gather in a batch)."""

    def __init__(self, cache: KvCache, num_slots: int) -> None:
        """`num_slots` of the cache's are handed out; what lies behind them is decode_step's spare one."""
        self.cache = cache
        self._free = sorted(range(num_slots), reverse=True)
        self._owners: dict[int, str] = {}

    def take(self, owner: str) -> int:
        """A free, empty slot; the engine admits no more streams than there are, so none left is our own fault."""
        assert self._free, f"no free slot for {owner}; owners: {self._owners}"
        slot = self._free.pop()
        self._owners[slot] = owner
        return slot

    def give_back(self, slot: int) -> None:
        assert slot in self._owners, f"slot {slot} is not taken"
        del self._owners[slot]
        self.cache.reset(slot)
        self._free.append(slot)
        self._free.sort(reverse=True)

    @property
    def num_free(self) -> int:
        return len(self._free)


@dataclass(eq=False)
class Prefix:
    """The keys and values of `ids`, [N, L, K] per layer, and the slots of the calls that began with them."""

    ids: list[Position]
    keys: list[Tensor]
    values: list[Tensor]
    slots: set[int] = field(default_factory=set)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))


class PrefixStore:
    """At most `max_prefixes` beginnings. One that an open call began with stays; of the others the one that was not
    used for longest makes room."""

    def __init__(self, cache: KvCache, max_prefixes: int) -> None:
        self.cache, self.max_prefixes = cache, max_prefixes
        self.prefixes: list[Prefix] = []  # least recently used first
        self.num_hits = 0
        self.num_positions_saved = 0

    @property
    def num_bytes(self) -> int:
        return sum(prefix.num_bytes for prefix in self.prefixes)

    def longest(self, ids: Sequence[Position], beyond: int, limit: int) -> Prefix | None:
        """The longest beginning of `ids` with more than `beyond` and at most `limit` positions."""
        fitting = [
            prefix
            for prefix in self.prefixes
            if beyond < len(prefix.ids) <= limit and ids[: len(prefix.ids)] == prefix.ids
        ]
        return max(fitting, key=lambda prefix: len(prefix.ids), default=None)

    def copy_into(self, slot: int, prefix: Prefix, start: int) -> None:
        """Positions from `start` to the prefix's end come into the slot; those before `start` are there already."""
        end = len(prefix.ids)
        for layer, (keys, values) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
            self.cache.keys[layer][slot, :, start:end] = keys[:, start:]
            self.cache.values[layer][slot, :, start:end] = values[:, start:]
        self.cache.lengths[slot] = end
        self.num_hits += 1
        self.num_positions_saved += end - start
        self._use(slot, prefix)

    def keep(self, slot: int, ids: Sequence[Position]) -> None:
        """The slot begins with `ids`, just computed: others may begin so too."""
        known = next((prefix for prefix in self.prefixes if prefix.ids == ids), None)
        if known is not None:
            self._use(slot, known)
            return
        if not self.max_prefixes or not self._make_room():
            return
        length, cache = len(ids), self.cache
        keys = [layer[slot, :, :length].clone() for layer in cache.keys]
        values = [layer[slot, :, :length].clone() for layer in cache.values]
        self.prefixes.append(Prefix(list(ids), keys, values, {slot}))

    def release(self, slot: int) -> None:
        """The call in this slot has ended."""
        for prefix in self.prefixes:
            prefix.slots.discard(slot)

    def _use(self, slot: int, prefix: Prefix) -> None:
        prefix.slots.add(slot)
        self.prefixes.remove(prefix)
        self.prefixes.append(prefix)

    def _make_room(self) -> bool:
        if len(self.prefixes) < self.max_prefixes:
            return True
        unused = next((prefix for prefix in self.prefixes if not prefix.slots), None)
        if unused is None:
            return False
        self.prefixes.remove(unused)
        return True
