"""Who owns which row of a key/value cache. The tensors are `model.backbone.KvCache`; this hands out their slots.

A stream holds one slot of the LLM's cache for its life and one of the voice LM's for a turn. A freed slot is emptied
at once: a NaN left behind by a failed call would reach its next owner.
"""

from __future__ import annotations

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
