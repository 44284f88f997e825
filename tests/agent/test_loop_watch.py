"""A blocked event loop is noticed from outside of it, and who blocks it is named."""

from __future__ import annotations

import asyncio
import logging
import time

import pytest

from agent.loop_watch import MAX_REPORTS, LoopWatch


def look_up_an_order(seconds: float) -> None:
    time.sleep(seconds)


async def test_L14_blocked_loop_is_noticed_while_it_is_blocked_and_the_function_is_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    watch = LoopWatch(0.4)
    watch.start()
    for _ in range(20):  # a loaded machine may give the watching thread no turn
        caplog.clear()
        look_up_an_order(1.5)
        told_while_blocked = [record.getMessage() for record in caplog.records]
        if told_while_blocked:
            break
        await asyncio.sleep(0.2)
    async with asyncio.timeout(30):
        while len(caplog.records) < 2:  # noqa: ASYNC110 - a log has no event
            await asyncio.sleep(0.05)
    watch.stop()
    assert len(told_while_blocked) == 1
    assert "s of it without a CPU), held by look_up_an_order (tests/agent/test_loop_watch.py:" in told_while_blocked[0]
    assert "time.sleep(seconds)" in told_while_blocked[0]
    assert "goes on after" in caplog.records[1].getMessage()
    assert watch.num_stalls >= 1 and watch.worst_lag_s > 1.0


async def test_a_loop_that_always_stalls_does_not_fill_the_log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = LoopWatch(0.1)
    reported = [watch._may_report(second) for second in range(60)]
    assert reported.count(True) == MAX_REPORTS
    assert watch._may_report(61.0)


async def test_the_worst_lag_is_of_the_last_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1_000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    watch = LoopWatch(60.0)
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(loop, "call_later", lambda *_: None)
    for lag_s in (0.01, 0.5, 0.2, 0.0):
        now[0] += 0.05 + lag_s
        watch._beat()
    assert watch.worst_lag_s == pytest.approx(0.5)
    now[0] += 59.8
    assert watch.worst_lag_s == pytest.approx(0.2)
    now[0] += 60.0
    assert watch.worst_lag_s == 0.0


async def test_a_quiet_loop_is_not_reported(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    watch = LoopWatch(5.0)
    watch.start()
    await asyncio.sleep(0.3)
    watch.stop()
    assert not caplog.records
