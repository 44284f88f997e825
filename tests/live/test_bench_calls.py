"""The benches of many calls for real, a few calls each: what is asserted is what a loaded machine cannot break.
users.md P1: the packets' spacing under many calls is a figure with a bound, and the ramp finds where it ends."""

from __future__ import annotations

import pytest

pytest.importorskip("pjsua2")
pytest.importorskip("aiortc")

from agent.bench_browsers import measure_delay, measure_level  # noqa: E402
from agent.bench_many import run_ramp  # noqa: E402

pytestmark = [pytest.mark.live, pytest.mark.slow]


async def test_callers_of_the_ramp_are_answered_by_several_workers_and_hear_the_agent() -> None:
    result = await run_ramp(4, 4, 3.0)
    (level,) = result["levels"]
    assert level["calls"] + len(level["refused"]) == 4 and result["workers"] == 2
    assert level["calls"] >= 3  # a worker that has just started may refuse one
    assert 0.1 < level["audible"] <= 1 and level["delivered"] > 0.8
    assert {"workers", "agent", "engine", "callers"} <= set(level["cpu_percent"])


async def test_browsers_of_the_bench_hear_the_agent_and_their_clicks_come_back() -> None:
    level = await measure_level(2, 3.0)
    assert level["refused"] == [] and level["packets"] > 200
    delay = await measure_delay(5.0)
    assert delay["n"] >= 5 and 20 < delay["p50"] < 400
