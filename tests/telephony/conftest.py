"""The rigs of the contract suite: a loopback leg in virtual time, a worker's leg called by a second worker over SIP,
and one called by an AudioSocket.

A rig plays the far end and collects the events of the leg under test; the suite does not see which one it has.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import numpy as np
import pytest

from telephony.config import TelephonyConfig
from telephony.leg import Answer, AudioFrame, Hangup, LegEvent, LegState, LegStateChanged, Play, ReferResult
from telephony.loopback import LoopbackLeg
from tests.telephony.audiosocket_peer import AudioSocketWorker, Exchange

RATE = 8000


def tone(seconds: float, hz: float = 440.0, rate: int = RATE, amplitude: float = 8000.0) -> bytes:
    return (np.sin(2 * np.pi * hz * np.arange(int(seconds * rate)) / rate) * amplitude).astype("<i2").tobytes()


class Rig:
    """What the rigs share: the collected events."""

    leg: Any
    identity = ("100", "4711", "Ann")  # what the incoming call says of itself: did, ani, display name
    refusal_status = 603  # of a REFER

    def __init__(self) -> None:
        self.events: list[LegEvent] = []
        self.sent = bytearray()  # what the leg says it sent, from its tap
        self._collecting: asyncio.Task[None] | None = None

    def start_collecting(self) -> None:
        self.leg.set_tap(lambda _start, _caller, agent: self.sent.extend(agent))
        self._collecting = asyncio.create_task(self._collect())

    async def _collect(self) -> None:
        async for event in self.leg.events():
            self.events.append(event)

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    async def until(self, condition: Callable[[], Any], limit_s: float = 5.0) -> Any:
        """Let the call go on until `condition()` is true; its value."""
        for _ in range(int(limit_s * 50)):
            if value := condition():
                return value
            await self.run(160)
        raise AssertionError(
            f"not within {limit_s} s; events: {[e for e in self.events if not isinstance(e, AudioFrame)]}"
        )

    async def answer(self) -> None:
        await self.leg.send(Answer(leg_id=self.leg.leg_id))
        await self.until(lambda: any(event.state is LegState.CONFIRMED for event in self.of(LegStateChanged)))

    async def close(self) -> None:
        if self._collecting is not None:
            self._collecting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._collecting

    async def run(self, num_samples: int) -> None:
        raise NotImplementedError


class LoopbackRig(Rig):
    kind = "loopback"

    async def ring(self) -> None:
        self.leg = LoopbackLeg("leg-1", did="100", ani="4711", display_name="Ann")
        self.start_collecting()
        self.leg.ring()

    async def run(self, num_samples: int) -> None:
        self.leg.advance(num_samples)
        while self.leg._events:  # noqa: ASYNC110 - let the collector catch up
            await asyncio.sleep(0)

    async def far_speaks(self, pcm: bytes) -> None:
        self.leg.speak(pcm)

    async def far_presses(self, digits: str) -> None:
        self.leg.press(digits)

    async def far_hangs_up(self) -> None:
        self.leg.hang_up()

    async def far_cancels(self) -> None:
        self.leg.cancel()

    def far_refuses_refer(self) -> bool:
        self.leg.refer_answer = ReferResult(leg_id="leg-1", sip_status=603, reason="Decline")
        return True

    def far_heard(self) -> bytes:
        return self.leg.heard


class WorkerRig(Rig):
    kind = "worker"

    def __init__(self, socket_path: Any, address: str, far_socket_path: Any) -> None:
        super().__init__()
        self._socket_path, self._address, self._far_socket_path = socket_path, address, far_socket_path
        self._heard = bytearray()

    async def ring(self) -> None:
        from telephony.client import WorkerClient

        self._client = await WorkerClient.connect(self._socket_path)
        self._far_client = await WorkerClient.connect(self._far_socket_path)
        self._far = await self._far_client.place_call(f"sip:100@{self._address}", from_user="4711", display_name="Ann")
        self._far.set_tap(lambda _start, received, _sent: self._heard.extend(received))
        self.leg = await asyncio.wait_for(anext(self._client.legs()), 5)
        self.start_collecting()

    async def run(self, num_samples: int) -> None:
        await asyncio.sleep(num_samples / RATE)

    async def far_speaks(self, pcm: bytes) -> None:
        await self._far.send(
            Play(leg_id=self._far.leg_id, item_id="speech", pcm=pcm, sample_rate_hz=RATE, is_final=True)
        )

    async def far_presses(self, digits: str) -> None:
        await self._far.send_dtmf(digits)

    async def far_hangs_up(self) -> None:
        await self._far.send(Hangup(leg_id=self._far.leg_id))

    far_cancels = far_hangs_up

    def far_refuses_refer(self) -> bool:
        return True  # our own worker refuses every inbound REFER with 603

    def far_heard(self) -> bytes:
        return bytes(self._heard)

    async def close(self) -> None:
        for leg in (self.leg, self._far):
            await leg.send(Hangup(leg_id=leg.leg_id))
        await asyncio.sleep(0.1)
        await super().close()
        await self._client.close()
        await self._far_client.close()


@pytest.fixture(scope="session")
def worker_pair() -> Iterator[tuple[Any, Any]]:
    """Two media workers on free loopback ports."""
    pytest.importorskip("pjsua2")
    from telephony.process import WorkerProcess

    config = TelephonyConfig(sip_port=0)
    with WorkerProcess(config) as near, WorkerProcess(config) as far:
        yield near, far


class AudioSocketRig(Rig):
    kind = "audiosocket"
    refusal_status = 400  # there is nothing like REFER

    def __init__(self, worker: AudioSocketWorker) -> None:
        super().__init__()
        self._worker = worker

    async def ring(self) -> None:
        self._client = await self._worker.agent()
        self._far = await Exchange.call(self._worker.port)
        self.identity = ("100", str(self._far.uuid), "")
        self.leg = await asyncio.wait_for(anext(self._client.legs()), 5)
        self.start_collecting()

    async def run(self, num_samples: int) -> None:
        await asyncio.sleep(num_samples / RATE)

    async def far_speaks(self, pcm: bytes) -> None:
        self._far.say(pcm)

    async def far_presses(self, digits: str) -> None:
        self._far.press(digits)

    async def far_hangs_up(self) -> None:
        self._far.hang_up()

    far_cancels = far_hangs_up

    def far_refuses_refer(self) -> bool:
        return True

    def far_heard(self) -> bytes:
        return self._far.heard

    async def close(self) -> None:
        await self._far.close()
        await super().close()
        await self._client.close()


@pytest.fixture(scope="session")
def audiosocket_worker() -> Iterator[AudioSocketWorker]:
    """A media worker for AudioSocket on a free loopback port."""
    with AudioSocketWorker() as worker:
        yield worker


@pytest.fixture(params=["loopback", "worker", "audiosocket"])
async def rig(request: pytest.FixtureRequest) -> AsyncIterator[Rig]:
    """A call that rings at the leg under test."""
    if request.param == "loopback":
        made: Any = LoopbackRig()
    elif request.param == "audiosocket":
        made = AudioSocketRig(request.getfixturevalue("audiosocket_worker"))
    else:
        near, far = request.getfixturevalue("worker_pair")
        made = WorkerRig(near.socket_path, near.address, far.socket_path)
    await made.ring()
    yield made
    await made.close()


@pytest.fixture(name="tone")
def tone_fixture() -> Callable[..., bytes]:
    return tone


@pytest.fixture(scope="session")
def speech() -> bytes:
    """A second of something voice activity takes for speech: a buzzing source through three formants, in syllables."""
    rate, length = RATE, RATE
    time_s = np.arange(length) / rate
    source = sum(np.sin(2 * np.pi * 120 * k * time_s) / k for k in range(1, 30))
    spectrum, frequencies = np.fft.rfft(source), np.fft.rfftfreq(length, 1 / rate)
    formants = sum(np.exp(-(((frequencies - centre) / 150) ** 2)) for centre in (600, 1200, 2400))
    voice = np.fft.irfft(spectrum * (0.05 + formants), length) * (0.6 + 0.4 * np.sin(2 * np.pi * 4 * time_s))
    return (voice / np.max(np.abs(voice)) * 12000).astype("<i2").tobytes()
