"""How many calls hold: the whole agent with the fake runtime under more and more SIP callers, until something gives.

    minmo bench media --ramp [--calls 100] [--step 8] [--seconds 8]

Every process of `minmo serve` but the page is there: as many SIP workers as the calls need, the agent with its call
loops, journal and recordings, the engine process with the fake runtime (minmo_runtime/fake.py), so no figure here is
the model's. Callers (agent/bench_callers.py) are added step by step; a level holds when every call was answered,
nobody's audio stopped, nine sentences of ten had an answer within 2.5 s, and the packets' spacing as the kernel stamped
them has its 99th percentile below 25 ms. The last level that holds is the result, with the CPU of every role and what
gave way at the next one; the ramp goes on until the packets themselves come late. The last line is JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agent.app import Stack
from agent.bench_callers import Crowd
from agent.bench_wire import cpu_s
from agent.config import load_config
from agent.lab.run import write_fake_checkpoint

MAX_GAP_P99_MS = 25.0
MIN_DELIVERED = 0.98  # of the packets due
MIN_ANSWERED = 0.9  # of the callers' sentences, within bench_callers.ANSWERED_WITHIN_S
_SETTLE_S = 3.0  # after the last one was answered: the greeting has begun
_PTIME_S = 0.02
_FULL_MACHINE, _FULL_CORE = 0.92, 92.0


@dataclass(frozen=True)
class Level:
    """One number of calls, measured."""

    calls: int
    refused: tuple[str, ...]
    answered_per_s: float
    gap_p50_ms: float
    gap_p99_ms: float
    gap_max_ms: float
    delivered: float  # packets that came, of those due
    audible: float  # share of packets with sound
    cpu_percent: dict[str, float]  # of one core, by role
    machine_busy: float  # share of all cores, everything that runs
    answers_s: tuple[float | None, ...] = ()  # each sentence's wait; None: too long

    @property
    def answered(self) -> float:
        """Share of the callers' sentences that were answered in time."""
        return 1 - sum(wait is None for wait in self.answers_s) / max(1, len(self.answers_s))

    @property
    def is_steady(self) -> bool:
        """The wire: every call is up and its packets come in time, whoever may be late behind it."""
        return not self.refused and self.gap_p99_ms < MAX_GAP_P99_MS and self.delivered >= MIN_DELIVERED

    @property
    def holds(self) -> bool:
        """The conversation too."""
        return self.is_steady and self.answered >= MIN_ANSWERED

    def limit(self) -> str:
        """What gave way, in words."""
        if self.refused:
            return f"{len(self.refused)} refused: {', '.join(sorted(set(self.refused)))}"
        busiest = max(self.cpu_percent, key=lambda role: self.cpu_percent[role])
        if self.machine_busy > _FULL_MACHINE:
            return f"all {os.cpu_count()} cores are busy; the most of it: {busiest} {self.cpu_percent[busiest]:.0f} %"
        one_process = {role: share for role, share in self.cpu_percent.items() if role in ("agent", "engine")}
        full = [role for role, share in one_process.items() if share > _FULL_CORE]
        if full:
            return f"one core is full: {', '.join(full)} (one process, one thread of Python)"
        return (
            f"packet spacing p99 {self.gap_p99_ms:.1f} ms, {100 * self.delivered:.1f} % delivered, "
            f"{100 * self.answered:.0f} % of the sentences answered in time"
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "calls": self.calls, "holds": self.holds, "is_steady": self.is_steady,
            "answered_per_s": round(self.answered_per_s, 1),
            "gap_ms": {"p50": self.gap_p50_ms, "p99": self.gap_p99_ms, "max": self.gap_max_ms},
            "delivered": round(self.delivered, 4), "audible": round(self.audible, 3),
            "answered": round(self.answered, 3), "answer_ms": _median_ms(self.answers_s),
            "sentences": len(self.answers_s),
            "cpu_percent": self.cpu_percent, "machine_busy": round(self.machine_busy, 3),
            "refused": list(self.refused),
        }  # fmt: skip


def _median_ms(waits: tuple[float | None, ...]) -> int | None:
    known = [wait for wait in waits if wait is not None]
    return round(1000 * float(np.median(known))) if known else None


def role_of(name: str) -> str:
    return "workers" if name.startswith("worker") else name


def machine_s() -> tuple[float, float]:
    """(busy, total) CPU seconds of the machine since it started (proc(5)); what the host took counts as busy."""
    fields = [int(word) for word in Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:9]]
    idle = fields[3] + fields[4]
    ticks = os.sysconf("SC_CLK_TCK")
    return (sum(fields) - idle) / ticks, sum(fields) / ticks


class Ramp:
    """One stack, one crowd, level after level."""

    def __init__(self, stack: Stack, crowd: Crowd, calls_per_worker: int) -> None:
        self._stack, self._crowd, self._per_worker = stack, crowd, calls_per_worker

    def _addresses(self, first: int, last: int) -> list[str]:
        host, port = self._stack.sip_address.rsplit(":", 1)
        return [f"{host}:{int(port) + index // self._per_worker}" for index in range(first, last)]

    def _cpu_s(self) -> dict[str, float]:
        used: dict[str, float] = {"callers": time.process_time()}
        for name, child in self._stack.children.items():
            used[role_of(name)] = used.get(role_of(name), 0.0) + cpu_s(child.pid)
        return used

    async def level(self, num_calls: int, seconds: float) -> Level:
        crowd = self._crowd
        began_s, before = time.monotonic(), len(crowd.callers)
        refused = await asyncio.to_thread(crowd.dial, self._addresses(before, num_calls))
        answered_per_s = (len(crowd.callers) - before) / (time.monotonic() - began_s)
        await asyncio.sleep(_SETTLE_S)
        used, machine, from_s, began_s = self._cpu_s(), machine_s(), time.time(), time.monotonic()
        await asyncio.sleep(seconds)
        took_s = time.monotonic() - began_s
        now_used, now_machine, to_s = self._cpu_s(), machine_s(), time.time()
        heard = [caller.arrivals.between(from_s, to_s) for caller in crowd.callers]
        gaps = np.concatenate([[0.0], *(1000 * np.diff([at for at, _ in packets]) for packets in heard)])[1:]
        p50, p99, most = np.percentile(gaps, [50, 99, 100]) if len(gaps) else (float("nan"),) * 3
        num_packets = sum(map(len, heard))
        return Level(
            len(crowd.callers), tuple(refused), answered_per_s, round(float(p50), 2), round(float(p99), 2),
            round(float(most), 2), num_packets / max(1.0, len(heard) * took_s / _PTIME_S),
            sum(is_voiced for packets in heard for _, is_voiced in packets) / max(1, num_packets),
            {role: round(100 * (now_used[role] - used[role]) / took_s, 1) for role in used},
            (now_machine[0] - machine[0]) / (now_machine[1] - machine[1]),
            tuple(wait for caller in crowd.callers for wait in caller.answers_s(from_s, to_s)),
        )  # fmt: skip


def levels_of(most: int, step: int) -> list[int]:
    """step, 2 step, ... and the last one exactly `most`."""
    return [*range(step, most, step), most]


async def run_ramp(most: int, step: int, seconds: float) -> dict[str, Any]:
    found: list[Level] = []
    with tempfile.TemporaryDirectory(prefix="minmo-bench-") as name:
        checkpoint = write_fake_checkpoint(Path(name))
        config = load_config(None, {
            "agent": {"checkpoint": str(checkpoint), "log_level": "error"},
            "telephony": {"sip_port": _free_ports(), "pool_calls": most},
            "runtime": {"max_streams": most}, "storage": {"folder": str(Path(name) / "var")},
        })  # fmt: skip
        command = ("-m", "agent.lab.fake_engine", "--scenario", "many")
        async with Stack(config, has_web=False, engine_command=command) as stack:
            per_worker = int(json.loads(stack.children["worker"].ready_line)["max_calls"])
            crowd = Crowd()
            crowd.start()
            try:
                ramp = Ramp(stack, crowd, per_worker)
                for num_calls in levels_of(most, step):
                    found.append(await ramp.level(num_calls, seconds))
                    print(json.dumps(found[-1].as_dict()), file=sys.stderr, flush=True)
                    if not found[-1].is_steady:
                        break
            finally:
                await asyncio.to_thread(crowd.stop)
            num_workers, late_ms = stack.num_sip_workers, 1000 * crowd.most_late_s
    return result_of(found) | {
        "workers": num_workers, "calls_per_worker": per_worker, "callers_most_late_ms": round(late_ms, 1),
        "machine": {"cpus": os.cpu_count(), "kernel": platform.release()},
    }  # fmt: skip


def result_of(found: list[Level]) -> dict[str, Any]:
    """The bench's figures: the last level before the first that does not hold, and what gave way there; the same for
    the packets alone; the cost of a call between the first level and the last that holds."""
    held, failed = _until([level.holds for level in found], found)
    steady, unsteady = _until([level.is_steady for level in found], found)
    result: dict[str, Any] = {
        "bench": "media_ramp", "calls_held": held[-1].calls if held else 0, "limited_by": _limit(failed),
        "calls_with_steady_packets": steady[-1].calls if steady else 0, "packets_limited_by": _limit(unsteady),
        "levels": [level.as_dict() for level in found],
    }  # fmt: skip
    if held:
        last = held[-1]
        result |= {"gap_p99_ms": last.gap_p99_ms, "answered_per_s": round(last.answered_per_s, 1)}
    if len(held) > 1:
        more = held[-1].calls - held[0].calls
        result["cpu_percent_per_call"] = {
            role: round((held[-1].cpu_percent[role] - held[0].cpu_percent[role]) / more, 2)
            for role in held[0].cpu_percent
        }
    return result


def _until(verdicts: list[bool], found: list[Level]) -> tuple[list[Level], Level | None]:
    """(levels before the first that fails, that one)."""
    first = verdicts.index(False) if False in verdicts else len(found)
    return found[:first], found[first] if first < len(found) else None


def _limit(level: Level | None) -> str:
    return "the number asked for" if level is None else level.limit()


def _free_ports() -> int:
    """A base for as many SIP ports in a row as there may be workers; below Linux's ephemeral ports."""
    return 16_000 + (os.getpid() % 40) * 100
