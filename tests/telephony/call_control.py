"""A call between a raw SIP peer and a worker, for the tests of what happens between answer and BYE."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time

import numpy as np
import pytest

pytest.importorskip("pjsua2")

from agent.raw_sip_peer import PCMU, RawPeer, to_tag  # noqa: E402
from telephony.client import WorkerClient  # noqa: E402
from telephony.leg import (  # noqa: E402
    Answer,
    LegDisconnected,
    LegState,
    LegStateChanged,
)

RATE = 8000
WITHOUT_EVENTS = ("0", "a=rtpmap:0 PCMU/8000\r\n")


class Call:
    """A raw peer's call and the agent's side of it."""

    def __init__(self, worker, client):
        self.client, self.events, self.leg = client, [], None
        self.peer = RawPeer(worker.address)
        self.peer.socket.settimeout(6)
        self.cseq = 10
        self.tag = ""

    async def ring(self, formats=PCMU, headers=""):
        self.peer.invite(formats, headers)
        self.leg = await asyncio.wait_for(anext(self.client.legs()), 6)
        self.task = asyncio.create_task(self._collect())

    async def _collect(self):
        async for event in self.leg.events():
            self.events.append(event)

    async def answer(self):
        await self.leg.send(Answer(leg_id=self.leg.leg_id))
        ok = await asyncio.to_thread(self.peer.final)
        self.tag = to_tag(ok)
        self.peer.request("ACK", to_tag=self.tag)
        await self.until(LegStateChanged, state=LegState.CONFIRMED)
        return ok

    async def request(self, method, body="", headers=""):
        """In the dialog: the final answer."""
        self.cseq += 1
        self.peer.request(method, self.cseq, self.tag, body, headers)
        answer = await asyncio.to_thread(self.peer.final)
        if method == "INVITE":
            self.peer.request("ACK", self.cseq, self.tag)
        return answer

    def of(self, kind):
        return [event for event in self.events if isinstance(event, kind)]

    async def until(self, kind, limit_s=8.0, **fields):
        async with asyncio.timeout(limit_s):
            while True:
                for event in self.of(kind):
                    if all(getattr(event, name) == value for name, value in fields.items()):
                        return event
                await asyncio.sleep(0.01)

    async def reinvite_of_ours(self):
        """Our re-INVITE, answered with the direction that follows from it (RFC 3264 §6.1)."""
        request = await asyncio.to_thread(self.peer.receive, "INVITE")
        offered = direction(request)
        answered = {"sendonly": "recvonly", "sendrecv": "sendrecv"}[offered]
        self.peer.respond(request, "200 OK", self.peer.sdp((PCMU[0], PCMU[1] + f"a={answered}\r\n")))
        await asyncio.to_thread(self.peer.receive, "ACK")
        return offered

    def close(self):
        self.peer.request("BYE", 99, self.tag)
        self.peer.close()


@contextlib.asynccontextmanager
async def ringing(worker, formats=PCMU, headers=""):
    client = await WorkerClient.connect(worker.socket_path)
    call = Call(worker, client)
    try:
        await call.ring(formats, headers)
        yield call
    finally:
        call.close()
        with contextlib.suppress(TimeoutError):
            await call.until(LegDisconnected, 4)
        await client.close()


def direction(message):
    found = re.findall(r"^a=(sendrecv|sendonly|recvonly|inactive)", message, re.MULTILINE)
    return found[-1] if found else "sendrecv"


def packets(peer, for_s):
    """RTP the peer gets within this time."""
    got, until_s = [], time.monotonic() + for_s
    peer.media.settimeout(0.1)
    while time.monotonic() < until_s:
        with contextlib.suppress(TimeoutError):
            got.append(peer.media.recv(2048))
    return got


def mu_law_to_pcm(payload):
    """From the definition of G.711: inverted, sign, three bits of exponent, four of mantissa."""
    value = ~np.frombuffer(payload, np.uint8).astype(int) & 0xFF
    magnitude = (((value & 0x0F) << 3) + 132 << ((value >> 4) & 7)) - 132
    return np.where(value & 0x80, -magnitude, magnitude).astype("<i2")


def pcm_to_mu_law(pcm):
    samples = np.frombuffer(pcm, "<i2").astype(int)
    magnitude = np.minimum(np.abs(samples), 32635) + 132
    exponent = np.floor(np.log2(magnitude)).astype(int) - 7
    return (
        (~((samples < 0) * 0x80 | exponent << 4 | (magnitude >> (exponent + 3)) & 0x0F) & 0xFF)
        .astype(np.uint8)
        .tobytes()
    )


async def send_rtp(call, ok, pcm):
    port = int(next(line for line in ok.splitlines() if line.startswith("m=audio")).split()[1])
    payload = pcm_to_mu_law(pcm)
    for number in range(len(payload) // 160):
        head = b"\x80\x00" + number.to_bytes(2, "big") + (160 * number).to_bytes(4, "big") + b"\0\0\0\1"
        call.peer.media.sendto(head + payload[160 * number : 160 * number + 160], ("127.0.0.1", port))
        await asyncio.sleep(0.02)


def loud(packet):
    return len(packet) == 172 and np.abs(mu_law_to_pcm(packet[12:])).mean() > 1000


def key_event(peer, to, event, number):
    """One key as RFC 4733 §2.5.1.3 sends it: its last packet three times. `to`: the SDP of who gets it."""
    to_port, payload_type = media_port(to), int(re.search(r"rtpmap:(\d+) telephone-event/8000", to).group(1))
    for step in range(8):
        end = 0x80 if step >= 5 else 0
        head = b"\x80" + bytes([payload_type | (0x80 if step == 0 else 0)]) + (number + step).to_bytes(2, "big")
        duration = (160 * min(step + 1, 6)).to_bytes(2, "big")
        body = (160 * number).to_bytes(4, "big") + b"\0\0\0\1" + bytes([event, end | 10]) + duration
        peer.media.sendto(head + body, ("127.0.0.1", to_port))
        time.sleep(0.02)


def events_in(got):
    """Keys of RFC 4733 packets, each once: one event keeps its timestamp."""
    return list(dict.fromkeys((p[4:8], p[12]) for p in got if p[1] & 0x7F == 101))


def media_port(message):
    return int(next(line for line in message.splitlines() if line.startswith("m=audio")).split()[1])
