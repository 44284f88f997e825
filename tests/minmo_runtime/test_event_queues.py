"""Nothing of a call is kept once nobody reads it: not by the queues, not by the client, not by the engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from minmo_runtime.api import AudioDelta, CloseStream, OpenStream, StreamFailed, StreamLost, StreamOpened, TextDelta
from minmo_runtime.client import RuntimeClient
from minmo_runtime.event_queues import MAX_QUEUED_BYTES, EventQueues
from minmo_runtime.fake import FakeRuntime
from minmo_runtime.server import RuntimeServer


def delta(call_id: str = "a") -> TextDelta:
    return TextDelta(call_id=call_id, turn_id="t", text="x")


async def leave_after_one(queues: EventQueues) -> None:
    """A reader that is cancelled while it waits for the second event."""
    reading = asyncio.create_task(read(queues))
    queues.put(delta())
    await asyncio.sleep(0.01)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)


async def read(queues: EventQueues) -> list[object]:
    return [event async for event in queues.events("a")]


@pytest.mark.parametrize("lost", [None, StreamLost("gone")])
async def test_a_reader_that_leaves_before_the_end_leaves_nothing(lost: StreamLost | None) -> None:
    queues = EventQueues()
    await leave_after_one(queues)
    assert queues.put(delta()), "the stream itself goes on"
    queues.end("a", lost)
    assert not queues.names


async def test_a_failed_stream_that_nobody_reads_leaves_nothing() -> None:
    queues = EventQueues()
    await leave_after_one(queues)
    queues.put(StreamFailed(call_id="a", reason="NaN"))
    assert not queues.names


async def test_sound_that_nobody_takes_ends_the_stream_at_the_budget_and_a_reader_in_time_never_meets_it() -> None:
    """users.md P2: a byte budget for what one call may queue."""
    queues = EventQueues()
    second = AudioDelta(call_id="a", turn_id="t", sequence=0, pcm=bytes(48_000))
    held = MAX_QUEUED_BYTES // len(second.pcm)
    reading = queues.events("a")
    for _ in range(3 * held):
        assert queues.put(second) and await anext(reading) == second
    assert [queues.put(second) for _ in range(held + 1)] == [*[True] * held, False]
    *sound, failed = [event async for event in reading]
    assert len(sound) == held and isinstance(failed, StreamFailed)
    assert failed.reason == f"{held} events with {48_000 * held} bytes of audio were not read" and not queues.names


async def test_a_name_that_was_left_can_be_opened_and_read_again() -> None:
    queues = EventQueues()
    await leave_after_one(queues)
    queues.open("a")
    queues.put(delta())
    queues.end("a")
    assert await read(queues) == [delta()] and not queues.names


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[tuple[FakeRuntime, RuntimeClient]]:
    runtime = FakeRuntime(max_streams=2)
    server = RuntimeServer(runtime, tmp_path / "s.sock")
    await server.start()
    client = await RuntimeClient.connect(tmp_path / "s.sock")
    yield runtime, client
    await client.close()
    await server.stop()


async def until_empty(runtime: FakeRuntime, client: RuntimeClient) -> None:
    async with asyncio.timeout(5):
        while client.num_held or runtime.streams:  # noqa: ASYNC110 - it is the other end that changes it
            await asyncio.sleep(0.01)


async def test_calls_that_end_while_their_events_are_read_leave_nothing_in_the_client(
    served: tuple[FakeRuntime, RuntimeClient],
) -> None:
    """As the agent ends every call: close, and cancel the reader without waiting for the end."""
    runtime, client = served
    for number in range(20):
        name = f"c{number}"
        await client.send(OpenStream(call_id=name, system_prompt=""))
        reading = asyncio.create_task(anext(client.events(name)))
        assert isinstance(await reading, StreamOpened)
        waiting = asyncio.create_task(anext(client.events(name)))
        await asyncio.sleep(0)
        await client.send(CloseStream(call_id=name))
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    await until_empty(runtime, client)


@pytest.mark.parametrize("wait_steps", range(0, 8))
async def test_a_caller_who_gives_up_while_the_engine_opens_leaves_nothing_at_either_end(
    served: tuple[FakeRuntime, RuntimeClient], wait_steps: int
) -> None:
    """Whenever it happens, also at the very moment in which the stream is opened."""
    runtime, client = served
    for number in range(5):
        asking = asyncio.create_task(client.send(OpenStream(call_id=f"c{number}", system_prompt="")))
        for _ in range(wait_steps):
            await asyncio.sleep(0)
        if asking.done():  # not given up in time: an ordinary end
            await client.send(CloseStream(call_id=f"c{number}"))
            client.leave(f"c{number}")
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await until_empty(runtime, client)


async def test_a_stream_that_opens_the_moment_its_caller_is_cancelled_is_closed(
    served: tuple[FakeRuntime, RuntimeClient],
) -> None:
    runtime, client = served
    asking = asyncio.create_task(client.send(OpenStream(call_id="a", system_prompt="")))
    async with asyncio.timeout(5):
        while not client.num_open:  # noqa: ASYNC110 - it is the other end that changes it
            await asyncio.sleep(0)  # answered, but the one who asked has not run yet
    assert not asking.done()
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await until_empty(runtime, client)
