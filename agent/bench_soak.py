"""Does anything grow with the calls? A soak: the whole product in a private folder, short calls, and what each process
holds, read again and again while no call runs.

    minmo bench soak [--calls 1000] [--at-once 3] [--seconds-per-call 1.0] [--fake] [--every 50] [--seed 1]
    minmo bench soak --engine [--streams 1000] [--fake]        the engine's process alone, as fast as it goes

Calls of every kind are drawn from the seed (agent/bench_short_calls.py). Readings are each role's own memory,
descriptors, threads and rings (agent/growth.py), and what the process counts of itself: tasks, calls, streams, dialogs,
Python objects (agent/holdings.py). Nothing is given back to the kernel by hand (no malloc_trim): what is read is what
an operator sees. A slope is fitted to each, behind the first fifth and again to the second half; exit status 1, and the
role's name, where both are above the budget. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from agent.app import Stack
from agent.bench_short_calls import Outcome, ShortCall, kinds, speech
from agent.bench_streams import engine_alone, run_streams
from agent.checkpoint import SHIPPED_CHECKPOINT
from agent.config import Config, load_config
from agent.growth import LEAST_READINGS, Budget
from agent.holdings import Inquiry, Ledger, result_of, say_progress, table_of
from agent.lab.run import write_fake_checkpoint

REST_S = 2.6  # the last of a call is freed two seconds after its end (telephony/media_worker.py, sip/endpoint.py)
MIN_EXPECTED = 0.9  # of the calls must come to what they should: a soak of refusals soaks nothing
_ENGINE = ("-m", "minmo_runtime.server")
_FAKE_ENGINE = ("-m", "agent.lab.fake_engine", "--scenario", "many")
_DIALLED_AGAIN_S = (0.2, 0.5)  # after 503: the call before is still being taken down


class Soak:
    """One stack; batch after batch of calls, a reading behind each."""

    def __init__(self, stack: Stack, seconds: float, at_once: int, seed: int) -> None:
        self._stack, self._seconds, self._at_once = stack, seconds, at_once
        self._kinds, self._sentence = kinds(seed), speech()
        self._inquiry = Inquiry()
        stack.on_line = self._inquiry.on_line
        self.ledger = Ledger()
        self.outcomes: Counter[str] = Counter()
        self.num_expected = 0

    async def run(self, num_calls: int, every: int) -> None:
        with ThreadPoolExecutor(self._at_once, thread_name_prefix="caller") as callers:
            loop = asyncio.get_running_loop()
            for begin in range(0, num_calls, every):
                end = min(begin + every, num_calls)
                wanted = [(self._address(index), next(self._kinds)) for index in range(begin, end)]
                found = [loop.run_in_executor(callers, self._call, *each) for each in wanted]
                for outcome in await asyncio.gather(*found):
                    self.outcomes[f"{outcome.kind}: {outcome.text}"] += 1
                    self.num_expected += outcome.is_expected
                await asyncio.sleep(REST_S)
                await self._read(end)

    def _address(self, index: int) -> str:
        host, port = self._stack.sip_address.rsplit(":", 1)
        return f"{host}:{int(port) + index % self._stack.num_sip_workers}"

    def _call(self, address: str, kind: str) -> Outcome:
        outcome = ShortCall(address, kind, self._seconds, self._sentence).run()
        for wait_s in _DIALLED_AGAIN_S:
            if outcome.text != "503":
                break
            time.sleep(wait_s)
            outcome = ShortCall(address, kind, self._seconds, self._sentence).run()
        return outcome

    async def _read(self, num_calls: int) -> None:
        for role, child in self._stack.children.items():
            self.ledger.note(role, num_calls, *await self._inquiry.ask(role, child))
        say_progress(self.ledger, num_calls)


def soak_config(folder: Path, is_fake: bool, at_once: int) -> Config:
    checkpoint = write_fake_checkpoint(folder) if is_fake else SHIPPED_CHECKPOINT
    return load_config(None, {
        "agent": {"checkpoint": str(checkpoint), "log_level": "error"}, "telephony": {"sip_port": 0},
        "runtime": {"max_streams": at_once + 3}, "storage": {"folder": str(folder / "var")},
    })  # fmt: skip


async def soak_calls(
    num_calls: int, at_once: int, seconds: float, every: int, seed: int, *, is_fake: bool
) -> tuple[Ledger, dict[str, Any]]:
    """Readings, and what else is told of the run."""
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="minmo-soak-") as name:
        config = soak_config(Path(name), is_fake, at_once)
        async with Stack(config, has_web=False, engine_command=_FAKE_ENGINE if is_fake else _ENGINE) as stack:
            soak = Soak(stack, seconds, at_once, seed)
            await soak.run(num_calls, every)
            restarts = {role: child.num_starts - 1 for role, child in stack.children.items() if child.num_starts > 1}
    return soak.ledger, {
        "calls": num_calls, "at_once": at_once, "seconds_per_call": seconds, "seed": seed,
        "outcomes": dict(sorted(soak.outcomes.items())), "as_expected": round(soak.num_expected / num_calls, 4),
        "restarts": restarts, "took_s": round(time.monotonic() - began_s, 1),
    }  # fmt: skip


async def soak_engine(
    num_streams: int, at_once: int, every: int, seed: int, *, is_fake: bool
) -> tuple[Ledger, dict[str, Any]]:
    """The same of the engine's process alone."""
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="minmo-soak-") as name:
        folder, command = Path(name), _FAKE_ENGINE if is_fake else _ENGINE
        async with engine_alone(command, SHIPPED_CHECKPOINT, folder) as (child, inquiry):
            ledger, outcomes = await run_streams(
                child, inquiry, folder / "engine.sock", num_streams, at_once, every, seed, needs_clock=is_fake
            )
            restarts = {"engine": child.num_starts - 1} if child.num_starts > 1 else {}
    done = sum(count for outcome, count in outcomes.items() if outcome.endswith(": done"))
    return ledger, {
        "streams": num_streams, "at_once": at_once, "seed": seed, "outcomes": dict(sorted(outcomes.items())),
        "as_expected": round(done / num_streams, 4), "restarts": restarts,
        "took_s": round(time.monotonic() - began_s, 1),
    }  # fmt: skip


def faults_of(result: dict[str, Any]) -> list[str]:
    """Why the exit status is 1, in words."""
    found = [f"{leak} grows with the calls" for leak in result["leaks"]]
    found += [f"{role} died {count} times" for role, count in result["restarts"].items()]
    if result["as_expected"] < MIN_EXPECTED:
        found.append(
            f"only {100 * result['as_expected']:.0f} % of the calls came to what they should: {result['outcomes']}"
        )
    return found


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="minmo bench soak", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--at-once", type=int, default=3)
    parser.add_argument("--seconds-per-call", type=float, default=1.0, help="of audio, 0.2 to 30")
    parser.add_argument("--every", type=int, default=0, help="calls between two readings; default: 20 readings")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--fake", action="store_true", help="the deterministic runtime without a model")
    parser.add_argument("--engine", action="store_true", help="streams of the engine's process alone")
    parser.add_argument("--streams", type=int, default=1000, help="of --engine")
    parser.add_argument("--budget-kib", type=float, default=2.0, help="memory that a call may leave behind")
    parser.add_argument("--warm-up", type=float, default=0.2, help="share of the calls that is not judged")
    options = parser.parse_args(arguments)
    total = options.streams if options.engine else options.calls
    options.every = options.every or max(1, total // 20)
    name = "--streams" if options.engine else "--calls"
    if not 1 <= options.at_once <= 64:
        parser.error(f"--at-once {options.at_once}: must be from 1 to 64")
    if not 0.2 <= options.seconds_per_call <= 30:
        parser.error(f"--seconds-per-call {options.seconds_per_call:g}: must be from 0.2 to 30")
    if not 0 <= options.warm_up <= 0.5:
        parser.error(f"--warm-up {options.warm_up:g}: must be from 0 to 0.5")
    if options.budget_kib <= 0:
        parser.error(f"--budget-kib {options.budget_kib:g}: must be more than 0")
    if total < LEAST_READINGS * options.every or options.every < 1:
        parser.error(f"{name} {total} with --every {options.every}: must give at least {LEAST_READINGS} readings")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.engine:
        work = soak_engine(options.streams, options.at_once, options.every, options.seed, is_fake=options.fake)
    else:
        work = soak_calls(
            options.calls, options.at_once, options.seconds_per_call, options.every, options.seed, is_fake=options.fake
        )
    ledger, told = asyncio.run(work)
    budget = Budget(bytes_per_call=1024 * options.budget_kib)
    runtime = "fake" if options.fake else "nano"
    result = {"bench": "soak", "runtime": runtime, **told, **result_of(ledger, budget, options.warm_up)}
    result["machine"] = {"cpus": os.cpu_count(), "load_1min": round(os.getloadavg()[0], 2)}
    print(table_of(result))
    faults = faults_of(result)
    for fault in faults:
        print(f"soak: {fault}")
    print(json.dumps(result))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
