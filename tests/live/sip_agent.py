"""The agents that real SIP peers call in the live tests, and the sound that is recognised on both sides.

`tone_agent` is a media worker with the smallest agent that speaks and listens; it needs no model. Used by
test_baresip.py and test_sipp.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import wave
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from telephony.client import WorkerClient, WorkerLeg
from telephony.config import TelephonyConfig
from telephony.leg import (
    Answer,
    DtmfReceived,
    LegDisconnected,
    LegError,
    LegEvent,
    LegIncoming,
    LegState,
    LegStateChanged,
    Play,
    Refer,
    ReferResult,
)
from telephony.process import WorkerProcess

RATE = 8000


def warble(seconds: float, low_hz: float, rate: int = RATE) -> np.ndarray:
    """A sound that cannot be mistaken: its pitch rises by an octave over every half second."""
    time_s = np.arange(int(seconds * rate)) / rate
    phase = 2 * np.pi * low_hz * np.cumsum(1 + (time_s * 2) % 1) / rate
    return (np.sin(phase) * 9000).astype("<i2")


def similarity(heard: np.ndarray, source: np.ndarray) -> float:
    """Highest normalised correlation of the source's loudest second anywhere in what was heard."""
    piece = source[RATE // 2 : RATE // 2 + RATE].astype(float)
    if len(heard) < len(piece):
        return 0.0
    size = 1 << (len(heard) + len(piece)).bit_length()
    products = np.fft.irfft(np.fft.rfft(heard.astype(float), size) * np.conj(np.fft.rfft(piece, size)), size)
    energy = np.concatenate([[0.0], np.cumsum(heard.astype(float) ** 2)])
    window = energy[len(piece) :] - energy[: -len(piece)]
    scale = np.sqrt(np.maximum(window, np.max(window) * 1e-3) * np.sum(piece**2)) + 1e-9
    return float(np.max(products[: len(window)] / scale))


def write_wav(path: Path, samples: np.ndarray, rate: int = RATE) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return path


def read_wav(path: Path) -> np.ndarray:
    with wave.open(str(path), "rb") as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        return samples[:: file.getnchannels()]


@dataclass
class AgentCall:
    """One call as the tone agent saw it."""

    leg: WorkerLeg
    events: list[LegEvent] = field(default_factory=list)
    heard: bytearray = field(default_factory=bytearray)
    is_over: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def digits(self) -> str:
        return "".join(event.digit for event in self.events if isinstance(event, DtmfReceived))

    @property
    def incoming(self) -> LegIncoming:
        return next(event for event in self.events if isinstance(event, LegIncoming))

    @property
    def ended(self) -> LegDisconnected:
        return next(event for event in self.events if isinstance(event, LegDisconnected))

    @property
    def refer_result(self) -> ReferResult | None:
        return next((event for event in self.events if isinstance(event, ReferResult)), None)

    def heard_samples(self) -> np.ndarray:
        return np.frombuffer(bytes(self.heard), "<i2")


class ToneAgent:
    """Answers every call, says one warble, hears the caller. `refer_to`: transfers the call after `refer_after_s`."""

    def __init__(self, client: WorkerClient, refer_to: str = "", refer_after_s: float = 1.0) -> None:
        self.address = f"{client.hello.sip_address}:{client.hello.sip_port}"
        self.calls: list[AgentCall] = []
        self.voice = warble(6.0, 300)  # any second of it will do: a late process damages some
        self._client, self._refer_to, self._refer_after_s = client, refer_to, refer_after_s

    async def serve(self) -> None:
        async with asyncio.TaskGroup() as group:
            async for leg in self._client.legs():
                group.create_task(self._call(leg), name=f"call-{leg.leg_id}/events")

    async def _call(self, leg: WorkerLeg) -> None:
        call = AgentCall(leg)
        self.calls.append(call)
        leg.set_tap(lambda _start, received, _sent: call.heard.extend(received))
        async for event in leg.events():
            call.events.append(event)
            with contextlib.suppress(LegError):  # the caller hung up a moment ago; the next event says so
                await self._react(leg, event)
        call.is_over.set()

    async def _react(self, leg: WorkerLeg, event: LegEvent) -> None:
        match event:
            case LegIncoming():
                await leg.send(Answer(leg_id=leg.leg_id))
            case LegStateChanged(state=LegState.CONFIRMED):
                play = Play(
                    leg_id=leg.leg_id, item_id="voice", pcm=self.voice.tobytes(), sample_rate_hz=RATE, is_final=True
                )
                await leg.send(play)
                if self._refer_to:
                    asyncio.get_running_loop().call_later(self._refer_after_s, self._refer, leg)
            case ReferResult():
                leg.hang_up("transferred")

    def _refer(self, leg: WorkerLeg) -> None:
        self._client.send(Refer(leg_id=leg.leg_id, refer_to=self._refer_to))


@contextlib.asynccontextmanager
async def tone_agent(refer_to: str = "", **settings: object) -> AsyncIterator[ToneAgent]:
    config = TelephonyConfig(**({"sip_port": 0} | settings))  # type: ignore[arg-type]
    with WorkerProcess(config) as worker:
        client = await WorkerClient.connect(worker.socket_path, config=config)
        agent = ToneAgent(client, refer_to)
        serving = asyncio.create_task(agent.serve(), name="tone-agent")
        try:
            yield agent
        finally:
            await client.close()
            await serving


async def until(condition, limit_s: float = 15.0) -> None:
    """Wait for what another process does."""
    async with asyncio.timeout(limit_s):
        while not condition():  # noqa: ASYNC110 - it is another process that changes it
            await asyncio.sleep(0.02)


def loud_seconds(heard: np.ndarray) -> float:
    """How long there was sound, in 20 ms blocks."""
    blocks = np.abs(heard[: len(heard) // 160 * 160].astype(float)).reshape(-1, 160).mean(axis=1)
    return float(np.sum(blocks > 200) * 0.02)
