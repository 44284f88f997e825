"""AudioSocket calls through the worker process: who gets in, what ends which connection, what the agent is told. What
every leg promises is in test_leg_contract.py, a whole call in tests/live/test_audiosocket.py."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest

from telephony.leg import (
    Answer,
    AudioFrame,
    DtmfReceived,
    LegDisconnected,
    LegEvent,
    LegIncoming,
    LegState,
    LegStateChanged,
    Play,
)
from telephony.webrtc.signaling import send_check
from telephony.wire import SecurityEvent
from tests.telephony.audiosocket_peer import AUDIO, HANGUP, UUID, AudioSocketWorker, Exchange, message

LIMIT_S = 10.0


async def until(condition: Callable[[], Any]) -> Any:
    async with asyncio.timeout(LIMIT_S):
        while not (found := condition()):  # noqa: ASYNC110 - another process changes it
            await asyncio.sleep(0.02)
        return found


class Agent:
    """The agent's side: takes every call, answers it and remembers."""

    def __init__(self, client: Any, is_answering: bool = True) -> None:
        self.client, self.is_answering = client, is_answering
        self.legs: list[Any] = []
        self.events: dict[str, list[LegEvent]] = {}
        self.security: list[SecurityEvent] = []
        client.on_security_event = self.security.append
        self._tasks = [asyncio.create_task(self._take(), name="agent/take")]

    async def _take(self) -> None:
        async for leg in self.client.legs():
            self.legs.append(leg)
            self.events[leg.leg_id] = []
            self._tasks.append(asyncio.create_task(self._collect(leg), name="agent/collect"))
            if self.is_answering and leg.state is not LegState.CONFIRMED:
                await leg.send(Answer(leg_id=leg.leg_id))

    async def _collect(self, leg: Any) -> None:
        async for event in leg.events():
            self.events[leg.leg_id].append(event)

    def of(self, kind: type, number: int = 0) -> list[Any]:
        """Events of the call of this number."""
        if number >= len(self.legs):
            return []
        return [event for event in self.events[self.legs[number].leg_id] if isinstance(event, kind)]

    async def is_up(self, number: int = 0) -> None:
        await until(lambda: any(e.state is LegState.CONFIRMED for e in self.of(LegStateChanged, number)))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.client.close()


@contextlib.asynccontextmanager
async def agent_of(worker: AudioSocketWorker, is_answering: bool = True) -> AsyncIterator[Agent]:
    agent = Agent(await worker.agent(), is_answering)
    try:
        yield agent
    finally:
        await agent.close()


@contextlib.asynccontextmanager
async def calling(worker: AudioSocketWorker, **how: Any) -> AsyncIterator[Exchange]:
    exchange = await Exchange.call(worker.port, **how)
    try:
        yield exchange
    finally:
        await exchange.close()


@pytest.fixture(scope="module")
def worker():
    with AudioSocketWorker(uuid_timeout_s=0.5, max_calls=3) as running:
        yield running


async def said_nothing(reader: asyncio.StreamReader) -> bool:
    """The connection is closed, and not a byte came."""
    async with asyncio.timeout(LIMIT_S):
        with contextlib.suppress(ConnectionResetError):
            return await reader.read() == b""
    return True


async def test_stranger_is_closed_without_a_word_in_one_security_event_and_no_call() -> None:
    with AudioSocketWorker(allowed_sources=["127.0.0.2/32"]) as worker:
        async with agent_of(worker) as agent:
            for _ in range(3):
                reader, writer = await asyncio.open_connection("127.0.0.1", worker.port)
                writer.write(message(UUID, uuid.uuid4().bytes))
                assert await said_nothing(reader)
                writer.close()
            async with calling(worker, source="127.0.0.2"):
                await agent.is_up()
            assert [(event.kind, event.source_address) for event in agent.security] == [
                ("unlisted_source", "127.0.0.1")
            ]
            assert len(agent.legs) == 1


async def test_connection_that_says_nothing_is_closed_in_time_and_is_no_event(worker: AudioSocketWorker) -> None:
    async with agent_of(worker) as agent:
        begin_s = asyncio.get_running_loop().time()
        reader, writer = await asyncio.open_connection("127.0.0.1", worker.port, local_addr=("127.0.0.11", 0))
        assert await reader.read() == message(HANGUP)
        assert 0.4 < asyncio.get_running_loop().time() - begin_s < 2.0
        writer.close()
        assert not agent.legs and not agent.security


BAD_BEGINNINGS = {
    "audio first": message(AUDIO, bytes(320)),
    "the nil UUID": message(UUID, bytes(16)),
    "a short UUID": message(UUID, bytes(15)),
    "half a header": b"\x01\x00",
    "half a UUID": message(UUID, b"x" * 16)[:9],
    "HTTP": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "a megabyte": b"\xaa" * (1 << 20),
}
BAD_MIDDLES = {
    "a long message of an unknown kind": b"\x42\x04\x01",
    "odd length": message(AUDIO, bytes(321)),
    "too long": message(AUDIO, bytes(20_000)),
    "a key of two": message(0x03, b"12"),
    "a second UUID": message(UUID, uuid.uuid4().bytes),
}


@pytest.mark.parametrize("number", range(len(BAD_BEGINNINGS)), ids=BAD_BEGINNINGS)
async def test_what_is_no_audiosocket_is_closed_with_one_event_and_no_call(
    worker: AudioSocketWorker, number: int
) -> None:
    source = f"127.0.1.{number + 1}"  # an event a minute for each source
    async with agent_of(worker) as agent:
        reader, writer = await asyncio.open_connection("127.0.0.1", worker.port, local_addr=(source, 0))
        writer.write(list(BAD_BEGINNINGS.values())[number])
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() in (b"", message(HANGUP))
        writer.close()
        await until(lambda: agent.security)
        assert [(event.kind, event.source_address, event.count) for event in agent.security] == [
            ("malformed", source, 1)
        ]
        assert not agent.legs


@pytest.mark.parametrize("number", range(len(BAD_MIDDLES) + 1), ids=[*BAD_MIDDLES, "half a message, then silence"])
async def test_malformed_message_ends_its_own_call_and_no_other(worker: AudioSocketWorker, number: int) -> None:
    source = f"127.0.2.{number + 1}"
    async with agent_of(worker) as agent, calling(worker) as other, calling(worker, source=source) as broken:
        await agent.is_up(1)
        first, second = (0, 1) if agent.of(LegIncoming)[0].ani == str(other.uuid) else (1, 0)
        if number < len(BAD_MIDDLES):
            broken.send(list(BAD_MIDDLES.values())[number])
        else:
            broken.stop_speaking()
            broken.send(message(AUDIO, bytes(320))[:100])
        (ended,) = await until(lambda: agent.of(LegDisconnected, second))
        assert (ended.cause, ended.by) == ("network_error", "network")
        await until(lambda: broken.is_over)
        assert [(event.kind, event.source_address) for event in agent.security] == [("malformed", source)]
        num_frames = len(agent.of(AudioFrame, first))
        await until(lambda: len(agent.of(AudioFrame, first)) > num_frames + 25)
        assert not other.is_over


async def test_uuid_in_use_is_closed_the_call_that_has_it_goes_on_and_afterwards_it_may_call_again(
    worker: AudioSocketWorker,
) -> None:
    async with agent_of(worker) as agent:
        async with calling(worker, source="127.0.3.1") as exchange:
            await agent.is_up()
            async with calling(worker, call_uuid=exchange.uuid, source="127.0.3.2") as double:
                await until(lambda: double.is_over)
                assert double.ended_with == HANGUP and not double.heard
            assert [(event.kind, event.source_address) for event in agent.security] == [("uuid_in_use", "127.0.3.2")]
            assert len(agent.legs) == 1 and not exchange.is_over
            exchange.hang_up()
            await until(lambda: agent.of(LegDisconnected))
        async with calling(worker, call_uuid=exchange.uuid):
            await agent.is_up(1)
        assert agent.legs[0].leg_id != agent.legs[1].leg_id


async def test_flood_of_messages_ends_its_own_call_and_calls_beyond_the_sources_share_are_hung_up_on() -> None:
    with AudioSocketWorker({"source_invites_per_s": 2}) as worker:
        async with agent_of(worker) as agent, calling(worker) as exchange:
            await agent.is_up()
            async with calling(worker, source="127.0.4.1") as flood:
                await agent.is_up(1)
                flood.send(message(AUDIO, bytes(320)) * 8_000)
                await until(lambda: agent.of(LegDisconnected, 1))
                await until(lambda: flood.is_over)
            for _ in range(3):
                async with calling(worker, source="127.0.4.2") as more:
                    await asyncio.sleep(0.1)
                    was_taken = not more.is_over
            assert not was_taken and not exchange.is_over
            assert {(event.kind, event.source_address) for event in agent.security} == {
                ("malformed", "127.0.4.1"), ("flood", "127.0.4.2"),
            }  # fmt: skip


async def test_full_worker_and_an_absent_agent_hang_up_so_that_the_dialplan_goes_on(worker: AudioSocketWorker) -> None:
    async with calling(worker) as early:
        await until(lambda: early.is_over)
        assert early.ended_with == HANGUP and not early.heard
    async with agent_of(worker) as agent, contextlib.AsyncExitStack() as stack:
        for number in range(3):
            await stack.enter_async_context(calling(worker))
            await agent.is_up(number)
        late = await stack.enter_async_context(calling(worker))
        await until(lambda: late.is_over)
        assert late.ended_with == HANGUP and not late.heard
        assert len(agent.legs) == 3 and not agent.of(LegDisconnected)


async def test_incoming_call_has_the_number_of_the_settings_and_the_uuid_for_an_identifier(
    worker: AudioSocketWorker,
) -> None:
    async with agent_of(worker) as agent, calling(worker) as exchange:
        await agent.is_up()
        (incoming,) = agent.of(LegIncoming)
        assert (incoming.did, incoming.ani) == ("100", str(exchange.uuid))
        assert incoming.headers == {"X-AudioSocket-UUID": str(exchange.uuid)}
        assert not agent.legs[0].can_transfer


async def test_call_outlives_its_agent_and_the_next_one_gets_it(worker: AudioSocketWorker) -> None:
    async with agent_of(worker) as agent, calling(worker) as exchange:
        await agent.is_up()
        leg_id = agent.legs[0].leg_id
        await agent.close()
        async with agent_of(worker) as heir:
            await until(lambda: heir.of(AudioFrame))
            assert (heir.legs[0].leg_id, heir.legs[0].is_resumed) == (leg_id, True)
            assert not heir.legs[0].can_transfer and not exchange.is_over


async def test_sixteen_kilohertz_both_ways_where_the_legs_are_wideband() -> None:
    with AudioSocketWorker({"codecs": ["G722/16000", "PCMU/8000"]}) as worker:
        async with agent_of(worker) as agent, calling(worker, kind=0x12, rate_hz=16_000) as exchange:
            await agent.is_up()
            leg, heard = agent.legs[0], bytearray()
            leg.set_tap(lambda _start, received, _sent: heard.extend(received))
            time_s = np.arange(16_000) / 16_000
            low, high = ((9_000 * np.sin(2 * np.pi * hz * time_s)).astype("<i2").tobytes() for hz in (1_000, 6_000))
            exchange.say(high)
            await leg.send(Play(leg_id=leg.leg_id, item_id="low", pcm=low, sample_rate_hz=16_000, is_final=True))
            await asyncio.sleep(1.5)
            for pcm, hz in ((bytes(heard), 6_000), (exchange.heard, 1_000)):
                spectrum = np.abs(np.fft.rfft(np.frombuffer(pcm, "<i2").astype(float)))
                assert np.argmax(spectrum) * 16_000 / (len(pcm) // 2) == pytest.approx(hz, abs=20)


async def test_keys_between_the_audio_arrive_in_order_and_the_worker_says_that_it_is_there(
    worker: AudioSocketWorker,
) -> None:
    async with agent_of(worker) as agent, calling(worker) as exchange:
        await agent.is_up()
        exchange.press("12*#")
        await until(lambda: len(agent.of(DtmfReceived)) == 4)
        assert "".join(event.digit for event in agent.of(DtmfReceived)) == "12*#"
        await send_check(worker.checks, 2.0)
