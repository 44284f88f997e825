"""A small soak of the whole product: short calls of every kind, and nothing that can be counted is more afterwards."""

from __future__ import annotations

import pytest

pytest.importorskip("pjsua2")

from agent.bench_short_calls import WEIGHTS  # noqa: E402
from agent.bench_soak import faults_of, soak_calls, soak_engine  # noqa: E402
from agent.growth import MEMORY, Budget  # noqa: E402
from agent.holdings import result_of, table_of  # noqa: E402

pytestmark = [pytest.mark.live, pytest.mark.slow]

# Of so few calls most is still warm-up: caches of statements, threads of a pool, arenas. A call that is kept keeps some
# hundred Python objects and a second of sound; the budget that an operator wants is judged by `minmo bench soak`.
FEW_CALLS = Budget(bytes_per_call=256 * 1024, objects_per_call=100)
POOL_THREADS = 8  # asyncio starts them one by one, up to this many (two cores)


async def test_P2_L12_short_calls_of_every_kind_leave_nothing_behind_in_any_process() -> None:
    """users.md P2, L12: memory is never returned; leak on cancel."""
    ledger, told = await soak_calls(60, 3, 0.3, 10, seed=1, is_fake=True)
    result = told | result_of(ledger, FEW_CALLS, 0.2)
    leaks = [leak for leak in result["leaks"] if not leak.endswith(": threads")]
    assert not leaks, table_of(result)
    assert not faults_of(result | {"leaks": []})
    assert {outcome.split(":")[0] for outcome in result["outcomes"]} == set(WEIGHTS)
    for role in ("worker", "agent", "engine"):
        held = ledger.readings[role][-1][1]
        assert held["rings"] == 0 and {held[name] for name in held.keys() & NOTHING_LEFT} == {0}, (role, held)
        threads = [held["threads"] for _, held in ledger.readings[role]]
        assert threads[-1] <= threads[0] + POOL_THREADS


NOTHING_LEFT = {"legs", "dialogs", "calls", "open_records", "streams"} | {"rings"}


async def test_streams_of_the_engine_leave_nothing_at_either_end() -> None:
    ledger, told = await soak_engine(120, 3, 20, seed=1, is_fake=True)
    result = told | result_of(ledger, FEW_CALLS, 0.2)
    assert not faults_of(result), table_of(result)
    assert ledger.readings["client"][-1][1]["streams"] == 0 and ledger.readings["engine"][-1][1]["streams"] == 0
    assert ledger.readings["engine"][-1][1][MEMORY] > 0
