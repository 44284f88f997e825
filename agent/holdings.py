"""What our processes hold, asked of each from outside (/proc) and from inside (SIGUSR1), kept reading by reading, and
judged. For the soaks; agent/growth.py has the arithmetic.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import Mapping
from typing import Any

from agent.growth import MEMORY, Budget, Growth, Reading, growth_of, held_by
from agent.processes import Child

TOLD_WITHIN_S = 10.0
_MOST_NAMED = 5
_RATES = ("per_call", "per_call_late", "budget")
Told = dict[str, dict[str, int]]


class Inquiry:
    """Asks children what they hold; `on_line` must be given every line that they print."""

    def __init__(self) -> None:
        self._waiting: dict[str, asyncio.Future[Told]] = {}

    def on_line(self, who: str, line: str) -> None:
        waiting = self._waiting.get(who)
        if waiting is not None and not waiting.done() and line.startswith('{"holds"'):
            waiting.set_result(json.loads(line))

    async def ask(self, who: str, child: Child) -> tuple[dict[str, float], dict[str, int]]:
        """(quantities, Python types), the memory as it was before the question; TimeoutError when it does not tell."""
        held = held_by(child.pid)
        waiting = self._waiting[who] = asyncio.get_running_loop().create_future()
        child.signal(signal.SIGUSR1)
        told = await asyncio.wait_for(waiting, TOLD_WITHIN_S)
        return held | told["holds"], told["types"]


class Ledger:
    """Readings by role."""

    def __init__(self) -> None:
        self.readings: dict[str, list[Reading]] = {}
        self._types: dict[str, list[dict[str, int]]] = {}

    def note(self, role: str, num_calls: int, held: Mapping[str, float], types: dict[str, int] | None = None) -> None:
        self.readings.setdefault(role, []).append((num_calls, dict(held)))
        if types:
            self._types.setdefault(role, []).append(types)

    def judged(self, budget: Budget, warm_up: float) -> dict[str, list[Growth]]:
        return {role: growth_of(readings, budget, warm_up) for role, readings in self.readings.items()}

    def grown_types(self, role: str) -> dict[str, int]:
        """Which Python objects became more over the second half, most first."""
        told = self._types.get(role, [])
        if len(told) < 2:
            return {}
        before, after = told[len(told) // 2], told[-1]
        more = {name: after[name] - before[name] for name in after.keys() & before.keys()}
        ordered = sorted((name for name in more if more[name] > 0), key=lambda name: -more[name])
        return {name: more[name] for name in ordered[:_MOST_NAMED]}


def result_of(ledger: Ledger, budget: Budget, warm_up: float) -> dict[str, Any]:
    """Figures and verdict, ready for JSON. `leaks`: "role: quantity", which decide the exit status."""
    judged = ledger.judged(budget, warm_up)
    leaks = [f"{role}: {growth.quantity}" for role, found in judged.items() for growth in found if growth.is_leak]
    return {
        "leaks": leaks, "budget_bytes_per_call": budget.bytes_per_call, "warm_up": warm_up,
        "readings": len(next(iter(ledger.readings.values()))),
        "roles": {role: {growth.quantity: growth.as_dict() for growth in found} for role, found in judged.items()},
        "grown_types": {role: ledger.grown_types(role) for role, found in judged.items() if _is_leaking(found)},
    }  # fmt: skip


def _is_leaking(found: list[Growth]) -> bool:
    return any(growth.is_leak for growth in found)


def table_of(result: Mapping[str, Any]) -> str:
    """The same for people."""
    rows = [f"{'role':<12}{'quantity':<14}{'first':>10}{'last':>10}{'a call':>12}{'2nd half':>12}{'budget':>12}"]
    for role, quantities in result["roles"].items():
        for name, found in quantities.items():
            is_memory = name in (MEMORY, "rss")
            ends = [f"{found[end] / 2**20:.1f} MiB" if is_memory else f"{found[end]:.0f}" for end in ("first", "last")]
            per_call = [f"{found[key]:.0f} B" if is_memory else f"{found[key]:.3f}" for key in _RATES]
            rows.append(
                f"{role:<12}{name:<14}{ends[0]:>10}{ends[1]:>10}{per_call[0]:>12}{per_call[1]:>12}{per_call[2]:>12}"
                f"{'  GROWS' if found['is_leak'] else ''}"
            )
        if grown := result["grown_types"].get(role):
            rows.append(f"{role:<12}more of: {', '.join(f'{name} {more:+d}' for name, more in grown.items())}")
    return "\n".join(rows)


def say_progress(ledger: Ledger, num_calls: int) -> None:
    """One line on standard error for each reading of a soak that takes minutes."""
    held = {role: readings[-1][1] for role, readings in ledger.readings.items()}
    shown = {role: {"mib": round(it[MEMORY] / 2**20, 2), "fds": it["fds"]} for role, it in held.items()}
    print(json.dumps({"calls": num_calls, **shown}), file=sys.stderr, flush=True)
