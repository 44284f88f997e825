"""A captured call placed again: the peer's half is played from raw sockets with what the peer sent, the agent's half is
a leg of a media worker."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

import numpy as np

from agent.bench_wire import rtp_address
from agent.raw_sip_peer import RawPeer, to_tag
from telephony.client import WorkerClient
from telephony.leg import Answer, LegDisconnected, LegEvent, LegState, LegStateChanged
from telephony.process import WorkerProcess
from tests.telephony.captures import Ours, ack_of, as_ours


class Replay:
    """One captured call, placed again: the peer's half is ours, the agent's half is a leg."""

    def __init__(self, worker: WorkerProcess, client: WorkerClient) -> None:
        self.client, self.events, self.heard = client, list[LegEvent](), bytearray()
        self.peer = RawPeer(worker.address)
        self.peer.socket.settimeout(6)
        self.peer.media.settimeout(6)
        self.call_id, self.worker = uuid.uuid4().hex, worker.address
        self.leg: Any = None
        self.tag = ""  # of the dialog, once there is one

    def _ours(self) -> Ours:
        media_port = self.peer.media.getsockname()[1]
        return Ours(self.peer.port, media_port, self.worker, self.call_id, uuid.uuid4().hex[:12])

    async def send(self, captured: str) -> str:
        """A captured request, and its final answer; an INVITE's is acknowledged."""
        ours = self._ours()
        request = as_ours(captured, ours, self.tag)
        self.peer.socket.sendto(request.encode(), self.peer.target)
        final = await asyncio.to_thread(self.peer.final)
        if request.startswith("INVITE"):
            self.peer.socket.sendto(ack_of(request, ours, to_tag(final)).encode(), self.peer.target)
        return final

    async def call(self, captured: str) -> str:
        """The captured INVITE; the agent answers. Our 200."""
        sending = asyncio.create_task(self.send(captured))
        self.leg = await asyncio.wait_for(anext(self.client.legs()), 6)
        self.leg.set_tap(lambda _start, received, _sent: self.heard.extend(received))
        self._collecting = asyncio.create_task(self._collect())
        await self.leg.send(Answer(leg_id=self.leg.leg_id))
        ok = await sending
        assert ok.startswith("SIP/2.0 200"), ok
        self.tag = to_tag(ok)
        await self.until(LegStateChanged, state=LegState.CONFIRMED)
        return ok

    async def _collect(self) -> None:
        async for event in self.leg.events():
            self.events.append(event)

    async def until(self, kind: type, **fields: object) -> Any:
        async with asyncio.timeout(8):
            while True:
                for event in self.of(kind):
                    if all(getattr(event, name) == value for name, value in fields.items()):
                        return event
                await asyncio.sleep(0.01)

    def of(self, kind: type) -> list:
        return [event for event in self.events if isinstance(event, kind)]

    async def talk(self, ok: str, packets: list[list[bytes]]) -> np.ndarray:
        """RTP in real time, every 20 ms what stands there; what the agent heard of it and of the 300 ms after it."""
        first, began_s = len(self.heard), time.monotonic()

        def send() -> None:
            for number, due in enumerate(packets):
                time.sleep(max(0.0, began_s + 0.02 * number - time.monotonic()))
                for packet in due:
                    self.peer.media.sendto(packet, rtp_address(ok))

        await asyncio.to_thread(send)
        await asyncio.sleep(0.3)
        return np.frombuffer(bytes(self.heard[first:]), "<i2").astype(float)

    async def end(self) -> str:
        """We hang up; our BYE."""
        if self.leg is None or self.leg.state is LegState.DISCONNECTED:
            return ""
        self.leg.hang_up()
        bye = await asyncio.to_thread(self.peer.receive, "BYE")
        self.peer.respond(bye, "200 OK")
        await self.until(LegDisconnected)
        return bye


@contextlib.asynccontextmanager
async def replay(worker: WorkerProcess) -> AsyncIterator[Replay]:
    client = await WorkerClient.connect(worker.socket_path)
    made = Replay(worker, client)
    try:
        yield made
    finally:
        with contextlib.suppress(TimeoutError):
            await made.end()
        await client.close()
        made.peer.close()
