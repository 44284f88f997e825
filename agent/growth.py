"""What a process holds, read from /proc, and whether it holds more with every call. Arithmetic beside one read.

Memory is what a process has made for itself: anonymous and shared pages, swapped ones too (proc(5): RssAnon, RssShmem,
VmSwap). Mapped files are left out: their pages come with the first use of a library and go when the machine wants them.
A slope is the median of the slopes between all pairs of readings (Theil 1950, Sen 1968): an allocator that takes a new
arena once, or one odd reading, does not tilt it. A leak rises behind the warm-up and still in the second half: memory
that levels off is none.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

MEMORY = "memory"  # bytes; every other quantity is a count
LEAST_READINGS = 6  # three in each half
_OWN = ("RssAnon", "RssShmem", "VmSwap")
_RING = "memfd:minmo-leg"

Reading = tuple[int, Mapping[str, float]]  # calls so far, quantity -> value


def held_by(pid: int) -> dict[str, float]:
    """Of one process, as the kernel sees it. `rings`: call memory that is mapped (telephony/ring.py)."""
    folder = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (folder / "status").read_text(encoding="utf-8").splitlines())
    maps = (folder / "maps").read_text(encoding="utf-8", errors="replace")
    return {
        MEMORY: 1024 * sum(int(status[name].split()[0]) for name in _OWN),
        "rss": 1024 * int(status["VmRSS"].split()[0]),
        "fds": len(list((folder / "fd").iterdir())),
        "threads": int(status["Threads"]),
        "rings": maps.count(_RING),
    }  # fmt: skip


def slope(points: Iterable[tuple[float, float]]) -> float:
    """Theil-Sen. ValueError for fewer than two different positions."""
    slopes = [(after - before) / (to - at) for (at, before), (to, after) in combinations(points, 2) if to != at]
    if not slopes:
        raise ValueError("a slope needs readings at two places")
    return statistics.median(slopes)


@dataclass(frozen=True)
class Budget:
    """What may be held more with each call."""

    bytes_per_call: float = 2048.0
    objects_per_call: float = 1.0  # of Python; a call that is kept keeps hundreds

    def of(self, quantity: str, num_calls: float) -> float:
        """Per call, over so many: one thing more in all that time is too much of whatever can be counted."""
        if quantity == MEMORY:
            return self.bytes_per_call
        return self.objects_per_call if quantity == "objects" else 1 / num_calls


@dataclass(frozen=True)
class Growth:
    """One quantity of one process over a soak."""

    quantity: str
    first: float  # of the readings behind the warm-up
    last: float
    per_call: float  # behind the warm-up
    per_call_late: float  # over the second half
    budget: float
    is_judged: bool

    @property
    def is_leak(self) -> bool:
        """Both slopes: memory that levels off has a flat second half, an arena taken late tilts that one alone."""
        return self.is_judged and min(self.per_call, self.per_call_late) >= self.budget

    def as_dict(self) -> dict[str, float | bool]:
        return {
            "first": self.first, "last": self.last, "per_call": round(self.per_call, 4),
            "per_call_late": round(self.per_call_late, 4), "budget": round(self.budget, 4), "is_leak": self.is_leak,
        }  # fmt: skip


def growth_of(readings: Sequence[Reading], budget: Budget, warm_up: float = 0.2) -> list[Growth]:
    """Of each quantity that every reading has; ValueError for too few. The resident size that tools show (`rss`) is
    told, but not judged: it counts mapped files."""
    if len(readings) < LEAST_READINGS:
        raise ValueError(f"{len(readings)} readings, at least {LEAST_READINGS} are needed")
    total = readings[-1][0]
    warm = [reading for reading in readings if reading[0] > warm_up * total]
    late = [reading for reading in readings if reading[0] >= total / 2]
    names = set(readings[0][1]).intersection(*(held for _, held in readings))
    return [
        Growth(
            name, warm[0][1][name], warm[-1][1][name], slope((at, held[name]) for at, held in warm),
            slope((at, held[name]) for at, held in late), budget.of(name, late[-1][0] - late[0][0]), name != "rss",
        )
        for name in sorted(names)
    ]  # fmt: skip
