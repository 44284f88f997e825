"""An exchange that gives no SIP trunk sends its calls by AudioSocket: the whole stack, with the fake engine.

The exchange is tests/telephony/audiosocket_peer.py, written from the protocol's description alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pjsua2")

from agent import monitor  # noqa: E402
from agent.app import Stack, free_port  # noqa: E402
from agent.config import load_config  # noqa: E402
from agent.run_folder import MONITOR_SOCKET  # noqa: E402
from storage.search import CallReader  # noqa: E402
from storage.security import list_security_events  # noqa: E402
from tests.live.speech import clip_pcm, seconds_found  # noqa: E402
from tests.live.stack import _FAKE_CHECKPOINT, _FAKE_ENGINE, REPOSITORY  # noqa: E402
from tests.telephony.audiosocket_peer import AUDIO, HANGUP, Exchange, message  # noqa: E402

pytestmark = [pytest.mark.live, pytest.mark.slow]
RATE_HZ = 8_000
LOUD = 500  # of int16; comfort noise is below 100


@dataclass
class Running:
    stack: Stack
    port: int

    def call_of(self, exchange: Exchange) -> dict[str, Any] | None:
        """With its turns, tools and metrics; the UUID stands where the number would."""
        with contextlib.closing(CallReader.open(self.stack.config.storage)) as reader:
            found = [row["call_id"] for row in reader.list_calls() if row["ani"] == str(exchange.uuid)]
            return reader.get_call(found[0]) if found else None

    async def closed_call_of(self, exchange: Exchange) -> dict[str, Any]:
        await until(lambda: (self.call_of(exchange) or {}).get("state") == "closed")
        call = self.call_of(exchange)
        assert call is not None
        return call

    def events_of(self, call_id: str, kind: str) -> list[dict[str, Any]]:
        with contextlib.closing(CallReader.open(self.stack.config.storage)) as reader:
            return [event for event in reader.get_events(call_id) if event["kind"] == kind]

    def recorded(self, call_id: str, lane: int) -> np.ndarray:
        """int16 of one party: 0 = caller, 1 = agent."""
        with contextlib.closing(CallReader.open(self.stack.config.storage)) as reader:
            recording = reader.open_recording(call_id)
            assert recording is not None
            data = b"".join(recording.read(0, recording.num_bytes - 1))[44:]
            return np.frombuffer(data, "<i2").reshape(-1, 2)[:, lane]


@contextlib.asynccontextmanager
async def running(folder: Path, line: str = "where is my order") -> AsyncIterator[Running]:
    (folder / "fake").mkdir()
    (folder / "fake" / "checkpoint.toml").write_text(_FAKE_CHECKPOINT)
    port = free_port(socket.SOCK_STREAM, "127.0.0.1")
    config = load_config(None, {
        "telephony": {"sip_port": 0}, "agent": {"checkpoint": str(folder / "fake")},
        "storage": {"folder": folder / "var", "recording_policy": "always"},
        "handoff": {"uri": "sip:desk@127.0.0.1:5099"}, "audiosocket": {"port": port, "did": "100"},
    })  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPOSITORY))
        async with Stack(config, has_web=False, engine_command=(_FAKE_ENGINE, "--line", line)) as stack:
            yield Running(stack, port)


@contextlib.asynccontextmanager
async def calling(port: int) -> AsyncIterator[Exchange]:
    """As a dialplan does that tries again: until the agent has met its worker, it is hung up on."""
    async with asyncio.timeout(30):
        exchange = await Exchange.call(port)
        while not exchange.heard:
            if exchange.is_over:
                await exchange.close()
                await asyncio.sleep(0.2)
                exchange = await Exchange.call(port)
            await asyncio.sleep(0.05)
    try:
        yield exchange
    finally:
        await exchange.close()


async def until(condition: Callable[[], Any], within_s: float = 40.0) -> Any:
    async with asyncio.timeout(within_s):
        while not (found := condition()):  # noqa: ASYNC110 - other processes change it
            await asyncio.sleep(0.1)
        return found


async def agent_spoke(exchange: Exchange) -> None:
    """And has been silent for a second since."""

    def is_over() -> bool:
        heard = np.abs(np.frombuffer(exchange.heard, "<i2").astype(int))
        return bool(heard.max(initial=0) > LOUD and heard[-RATE_HZ:].max() < LOUD)

    await until(is_over)


def said_by(call: dict[str, Any], role: str) -> str:
    return " ".join(turn["heard_text"] or "" for turn in call["turns"] if turn["role"] == role)


async def test_P5_exchange_without_a_trunk_holds_a_conversation_by_audiosocket(tmp_path: Path) -> None:
    async with running(tmp_path) as agent, calling(agent.port) as exchange:
        await agent_spoke(exchange)
        began_at = len(exchange.heard)
        speech = clip_pcm("order_status")
        exchange.say(speech + speech)  # a starved exchange makes a hole in one second of it
        await until(lambda: "order number" in said_by(agent.call_of(exchange) or {"turns": []}, "agent"))
        await agent_spoke(exchange)
        exchange.press("12345")
        await until(lambda: (agent.call_of(exchange) or {})["tool_calls"])
        await agent_spoke(exchange)
        exchange.hang_up()
        call = await agent.closed_call_of(exchange)
        assert (call["did"], call["ended_by"], call["cause"], call["codec"]) == ("100", "caller", "normal", "slin/8000")
        assert "where is my order" in said_by(call, "caller")
        assert [tool["arguments"] for tool in call["tool_calls"]] == [{"order_number": "12345"}]
        (health,) = agent.events_of(call["call_id"], "media_health")  # two seconds in, the caller has only listened
        assert health["payload"]["verdict"] == "silent_in" and health["payload"]["packets_in"] > 80
        # What was said and what was heard is what was recorded.
        agents, callers = agent.recorded(call["call_id"], 1), agent.recorded(call["call_id"], 0)
        assert max(seconds_found(np.tile(np.frombuffer(speech, "<i2"), 2), callers)) > 0.8  # a frame late: 0.9
        heard = np.frombuffer(exchange.heard, "<i2")
        assert np.abs(heard[began_at // 2 :]).max() > LOUD
        assert np.median(seconds_found(agents[: 8 * RATE_HZ], heard)) > 0.99
        # 20 ms each, one every 20 ms: as many as the time holds, and not in bursts.
        came_s, sizes = (
            [at for at, kind, _ in exchange.frames if kind == AUDIO],
            {len(pcm) for _, kind, pcm in exchange.frames if kind == AUDIO},
        )
        assert sizes == {320}
        assert len(came_s) == pytest.approx((came_s[-1] - came_s[0]) * 50, rel=0.05)
        assert np.median(np.diff(came_s)) == pytest.approx(0.02, abs=0.006)


async def test_agent_that_hangs_up_says_so_and_a_stranger_to_the_protocol_leaves_no_call(tmp_path: Path) -> None:
    async with running(tmp_path) as agent:
        async with calling(agent.port) as exchange:
            await agent_spoke(exchange)
            call = agent.call_of(exchange)
            assert call is not None
            await monitor.hang_up(agent.stack.run_folder / MONITOR_SOCKET, call["call_id"])
            await until(lambda: exchange.is_over)
            assert exchange.ended_with == HANGUP
            assert (await agent.closed_call_of(exchange))["ended_by"] != "caller"
        reader, writer = await asyncio.open_connection("127.0.0.1", agent.port)
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        assert await reader.read() == message(HANGUP)
        writer.close()
        with contextlib.closing(CallReader.open(agent.stack.config.storage)) as calls:
            assert len(calls.list_calls()) == 1
            (event,) = await until(lambda: list_security_events(calls.engine))
            assert (event["kind"], event["source_address"]) == ("malformed", "127.0.0.1")


async def test_caller_who_wants_a_person_gets_the_callback_as_nobody_can_be_reached_from_here(tmp_path: Path) -> None:
    async with running(tmp_path, line="a person please") as agent, calling(agent.port) as exchange:
        await agent_spoke(exchange)
        exchange.say(clip_pcm("person"))
        await until(lambda: "call you back" in said_by(agent.call_of(exchange) or {"turns": []}, "agent"))
        call = agent.call_of(exchange)
        assert call is not None and call["state"] != "closed"
        assert not agent.events_of(call["call_id"], "refer_result")
        assert [request["number"] for request in call["callback_requests"]] == [str(exchange.uuid)]
        exchange.hang_up()
        await agent.closed_call_of(exchange)
