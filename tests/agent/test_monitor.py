"""Hearing and ending a running call, over the socket: the tap that reads, the listener that is slow, the call that is
not there.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from agent.monitor import MAX_QUEUED, Monitor, NotRunning, hang_up, interleaved, keep_recording, listen


@dataclass
class FakeCall:
    sample_rate_hz: int = 16_000
    ended_with: list[str] = field(default_factory=list)
    kept: list[tuple[bool, str]] = field(default_factory=list)

    def hang_up(self, cause: str) -> None:
        self.ended_with.append(cause)

    def keep_recording(self, is_kept: bool, by: str) -> None:
        self.kept.append((is_kept, by))


@dataclass
class Running:
    monitor: Monitor
    call: FakeCall
    path: Path


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    call = FakeCall()
    monitor = Monitor({"c1": call})
    path = tmp_path / "monitor.sock"
    server = await monitor.serve(path)
    yield Running(monitor, call, path)
    server.close()


async def test_listener_hears_both_directions_until_the_call_is_over(running: Running) -> None:
    rate_hz, pieces = await listen(running.path, "c1")
    assert rate_hz == 16_000
    tap = running.monitor.tap("c1")
    tap(0, b"\1\0\2\0", b"\7\0\10\0")
    assert await anext(pieces) == b"\1\0\7\0\2\0\10\0"
    running.monitor.call_ended("c1")
    assert [piece async for piece in pieces] == []


async def test_slow_listener_loses_the_oldest_and_delays_nobody(running: Running) -> None:
    _, slow = await listen(running.path, "c1")
    tap = running.monitor.tap("c1")
    for tick in range(10 * MAX_QUEUED):  # all at once: the loop gets no turn to send
        tap(tick, tick.to_bytes(2, "little"), b"\0\0")
    running.monitor.call_ended("c1")
    heard = [int.from_bytes(piece[:2], "little") async for piece in slow]
    assert len(heard) < MAX_QUEUED
    assert heard[-1] == 10 * MAX_QUEUED - 1
    assert heard == sorted(heard)


async def test_listener_who_leaves_is_forgotten(running: Running) -> None:
    _, pieces = await listen(running.path, "c1")
    tap = running.monitor.tap("c1")
    tap(0, b"\0\0", b"\0\0")
    await anext(pieces)
    await pieces.aclose()
    async with asyncio.timeout(5):
        while running.monitor._listeners["c1"]:
            tap(0, b"\0\0", b"\0\0")
            await asyncio.sleep(0.01)


async def test_hanging_up_reaches_the_call_and_says_who_did(running: Running) -> None:
    await hang_up(running.path, "c1")
    assert running.call.ended_with == ["supervisor"]


async def test_pausing_the_recording_reaches_the_call_and_says_who(running: Running) -> None:
    await keep_recording(running.path, "c1", False, "supervisor:ann")
    await keep_recording(running.path, "c1", True, "supervisor:ann")
    assert running.call.kept == [(False, "supervisor:ann"), (True, "supervisor:ann")]
    with pytest.raises(NotRunning):
        await keep_recording(running.path, "c2", False, "supervisor:ann")


async def test_call_that_is_not_running_and_agent_that_is_gone_say_so(running: Running, tmp_path: Path) -> None:
    for act in (hang_up, listen):
        with pytest.raises(NotRunning):
            await act(running.path, "c2")
        with pytest.raises(NotRunning):
            await act(tmp_path / "nobody.sock", "c1")
    assert running.call.ended_with == []


def test_interleaved_is_left_right_left_right() -> None:
    assert interleaved(b"aAbB", b"xXyY") == b"aAxXbByY"
