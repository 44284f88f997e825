"""What a bad line does to packets, decided by a seed and a clock that is an argument: no socket, no sleep.

Loss in bursts follows Gilbert and Elliott's two states: in the good one nothing is lost, in the bad one everything; the
mean loss and the mean burst length fix both transition probabilities. Jitter is an extra delay drawn per packet
(exponential, as queues give it); packets keep their order unless `reorder` lets one overtake. Echo and noise are the
caller's end of the line: our voice comes back delayed and quieter, and a room or a car is mixed into the caller's
packets. Used by agent/lab/relay.py in real time and by the tests in virtual time.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, fields

LINE_RANGES: dict[str, tuple[float, float]] = {
    "delay_ms": (0, 2000),
    "jitter_ms": (0, 500),
    "loss": (0, 0.5),
    "burst_ms": (20, 2000),
    "reorder": (0, 0.5),
    "duplicate": (0, 0.5),
    "echo_delay_ms": (0, 1000),
    "echo_return_loss_db": (0, 60),
    "noise_dbov": (-90, -10),
}
MAX_JITTER = 8.0  # times the mean: the tail of a queue ends somewhere
NO_NOISE_DBOV = -90.0


@dataclass(frozen=True, kw_only=True)
class LineProfile:
    """One line, both directions alike; all of it zero is a perfect one."""

    name: str = "clean"
    delay_ms: float = 0.0
    """One-way delay, 0-2000."""
    jitter_ms: float = 0.0
    """Mean extra delay of a packet, 0-500."""
    loss: float = 0.0
    """Share of packets lost, 0-0.5."""
    burst_ms: float = 20.0
    """Mean length of a loss in ms of audio; one packet (20) = independent losses."""
    reorder: float = 0.0
    """Share of packets that are overtaken by the next one, 0-0.5."""
    duplicate: float = 0.0
    """Share of packets sent twice, 0-0.5."""
    echo_delay_ms: float = 0.0
    """Delay of our own voice's echo from the caller's end; counts only with a return loss."""
    echo_return_loss_db: float = 0.0
    """How much quieter the echo is than what we sent; 0 = no echo."""
    noise_dbov: float = NO_NOISE_DBOV
    """Noise in the caller's direction; -90 = none."""

    def __post_init__(self) -> None:
        for key, (low, high) in LINE_RANGES.items():
            if not low <= getattr(self, key) <= high:
                raise ValueError(f"{key} = {getattr(self, key):g}: must be {low:g} to {high:g}")

    @property
    def has_echo(self) -> bool:
        return self.echo_return_loss_db > 0


PROFILES = {
    profile.name: profile
    for profile in (
        LineProfile(name="clean"),
        LineProfile(name="loss1", loss=0.01),
        LineProfile(name="loss3", loss=0.03),
        LineProfile(name="loss5", loss=0.05),
        LineProfile(name="bursts", loss=0.03, burst_ms=80),
        LineProfile(name="jitter", delay_ms=20, jitter_ms=20),
        LineProfile(name="wifi", delay_ms=10, jitter_ms=15, loss=0.01, burst_ms=60, reorder=0.01),
        LineProfile(name="mobile", delay_ms=60, jitter_ms=25, loss=0.02, burst_ms=100, reorder=0.005, duplicate=0.002),
        LineProfile(name="satellite", delay_ms=300, jitter_ms=10, loss=0.005),
        LineProfile(name="echo", echo_delay_ms=120, echo_return_loss_db=12),
        LineProfile(name="late-echo", echo_delay_ms=380, echo_return_loss_db=9),
        LineProfile(name="noisy", noise_dbov=-38),
        LineProfile(name="worst", delay_ms=80, jitter_ms=30, loss=0.05, burst_ms=80, reorder=0.01, duplicate=0.005,
                    echo_delay_ms=200, echo_return_loss_db=15, noise_dbov=-45),
    )
}  # fmt: skip


@dataclass
class LineCounts:
    """What was really done, for the report."""

    packets: int = 0
    lost: int = 0
    reordered: int = 0
    duplicated: int = 0

    def as_dict(self) -> dict[str, int]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


class LossyDirection:
    """One direction of a line. The same seed and the same arrivals give the same fate to every packet."""

    def __init__(self, profile: LineProfile, seed: int, ptime_ms: float = 20.0) -> None:
        self._profile = profile
        self._rng = random.Random(seed)
        self._is_bad = False
        # A burst of one packet means independent losses: after a lost one the next is lost as often as any.
        self._to_good = min(ptime_ms / max(ptime_ms, profile.burst_ms), 1 - profile.loss)
        self._to_bad = profile.loss * self._to_good / (1 - profile.loss)
        self._last_due_s = 0.0
        self.counts = LineCounts()

    def pass_on(self, now_s: float) -> list[float]:
        """When the packet that arrives now comes out: [] = never, two times = twice."""
        profile, rng = self._profile, self._rng
        self.counts.packets += 1
        self._is_bad = rng.random() >= self._to_good if self._is_bad else rng.random() < self._to_bad
        extra_ms = min(rng.expovariate(1.0), MAX_JITTER) * profile.jitter_ms
        is_overtaken, is_twice = rng.random() < profile.reorder, rng.random() < profile.duplicate
        if self._is_bad:
            self.counts.lost += 1
            return []
        due_s = now_s + (profile.delay_ms + extra_ms) / 1000
        if is_overtaken:
            self.counts.reordered += 1
            due_s = max(due_s, self._last_due_s) + 0.025  # more than one packet later, and the next one need not wait
        else:
            due_s = self._last_due_s = max(due_s, self._last_due_s)
        if is_twice:
            self.counts.duplicated += 1
            return [due_s, due_s + 0.001]
        return [due_s]
