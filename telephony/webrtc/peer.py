"""A browser's part, played by aiortc: for the bench of browser calls and for tests. Not part of a running agent.

    python -m telephony.webrtc.peer --offers DIR/offers-0.sock --calls 5 --seconds 8 [--clicks]

Offers its calls to a worker one after another, talks (or clicks) in real time, notes when each packet came and what was
in it, hangs up, prints one JSON line. Packets are stamped where aiortc hands them on, so a late loop of this process
counts: `loop_late_ms` says how late it was. Source: RFC 8829 (offer and answer).
"""

from __future__ import annotations

import argparse
import asyncio
import fractions
import json
import math
from pathlib import Path

import av
import numpy as np
from aiortc import RTCPeerConnection, RTCSessionDescription
from aiortc.jitterbuffer import JitterFrame
from aiortc.mediastreams import MediaStreamError, MediaStreamTrack
from aiortc.rtp import RtpPacket

from telephony.priority import run_first
from telephony.webrtc.ice import gather_only_on
from telephony.webrtc.jitter import Promptly
from telephony.webrtc.signaling import Answered, Offer, send_offer

RATE_HZ = 16_000
_FRAME = RATE_HZ // 50
_LEAD = RATE_HZ // 500
_CLICK_EVERY = 25  # frames: half a second
_LOUD = 3_000  # of int16: a frame with a click in it
_CONNECTED_WITHIN_S = 20.0


class Mouth(MediaStreamTrack):
    """What this browser sends: a voice-like tone half of the time, or silence with a click now and then."""

    kind = "audio"

    def __init__(self, is_clicking: bool) -> None:
        super().__init__()
        self._is_clicking = is_clicking
        self._number, self._began_s = 0, 0.0
        self.clicked_s: list[float] = []

    async def recv(self) -> av.AudioFrame:
        loop = asyncio.get_running_loop()
        self._began_s = self._began_s or loop.time()
        await asyncio.sleep(max(0.0, self._began_s + self._number * 0.02 - loop.time()))
        pcm = self._frame(loop.time())
        if self._number == 0:  # as tracks.py does: else the encoder would send every packet one frame later
            pcm = np.concatenate([np.zeros(_LEAD, np.int16), pcm])
        frame = av.AudioFrame.from_ndarray(pcm[None, :], format="s16", layout="mono")
        frame.sample_rate, frame.pts = RATE_HZ, self._number * _FRAME + (_LEAD if self._number else 0)
        frame.time_base = fractions.Fraction(1, RATE_HZ)
        self._number += 1
        return frame

    def _frame(self, now_s: float) -> np.ndarray:
        time_s = (np.arange(_FRAME) + self._number * _FRAME) / RATE_HZ
        if not self._is_clicking:
            is_talking = self._number % 300 < 100  # two seconds of six
            return (5_000 * is_talking * np.sign(np.sin(2 * math.pi * 180 * time_s))).astype(np.int16)
        if self._number % _CLICK_EVERY != _CLICK_EVERY - 1:
            return np.zeros(_FRAME, np.int16)
        self.clicked_s.append(now_s)
        return (20_000 * np.sin(2 * math.pi * 1_000 * time_s)).astype(np.int16)


class Stamped(Promptly):
    """Passes every packet on at once and notes when it came."""

    def __init__(self) -> None:
        super().__init__()
        self.came_s: dict[int, float] = {}  # RTP timestamp, counted from the first one as aiortc's frames are -> time
        self._origin: int | None = None

    def add(self, packet: RtpPacket) -> tuple[bool, JitterFrame | None]:
        self._origin = packet.timestamp if self._origin is None else self._origin
        self.came_s.setdefault((packet.timestamp - self._origin) % 2**32, asyncio.get_running_loop().time())
        return super().add(packet)


class BrowserPeer:
    """One call: `await call(offers)`, `await hang_up()`, then look at `gaps_ms` and `delays_ms`."""

    def __init__(self, is_clicking: bool = False) -> None:
        self.connection = RTCPeerConnection()
        self.mouth = Mouth(is_clicking)
        self.connection.addTrack(self.mouth)
        self.control = self.connection.createDataChannel("control")
        self.connection.on("track", self._on_track)
        self._connected = asyncio.Event()
        self.connection.on("connectionstatechange", self._on_state)
        self._packets = Stamped()
        self._onsets_s: list[float] = []  # arrival of the packets where sound begins
        self._task: asyncio.Task[None] | None = None

    def _on_state(self) -> None:
        if self.connection.connectionState == "connected":
            self._connected.set()

    def _on_track(self, track: MediaStreamTrack) -> None:
        for receiver in self.connection.getReceivers():
            if receiver.track is track:
                receiver._RTCRtpReceiver__jitter_buffer = self._packets  # type: ignore[attr-defined]  # as leg.py does
        self._task = asyncio.create_task(self._listen(track), name="peer/listen")

    async def _listen(self, track: MediaStreamTrack) -> None:
        was_loud = False
        while True:
            try:
                frame = await track.recv()
            except MediaStreamError:
                return
            assert isinstance(frame, av.AudioFrame), type(frame)
            is_loud = int(np.abs(frame.to_ndarray().astype(np.int32)).max()) > _LOUD
            if is_loud and not was_loud and frame.pts in self._packets.came_s:
                self._onsets_s.append(self._packets.came_s[frame.pts])
            was_loud = is_loud

    async def call(self, offers: Path, did: str = "100") -> str:
        """ "" when the call is up, else why not."""
        offer = Offer(sdp=await self.offer(), did=did, ani="bench", source_address="127.0.0.1")
        reply = await send_offer(offers, offer, _CONNECTED_WITHIN_S)
        if not isinstance(reply, Answered):
            return f"{reply.status} {reply.reason}"
        return await self.take(reply.sdp)

    async def offer(self) -> str:
        """Our SDP, complete with candidates."""
        await self.connection.setLocalDescription(await self.connection.createOffer())
        sdp: str = self.connection.localDescription.sdp
        return sdp

    async def take(self, answer_sdp: str) -> str:
        """ "" when the call is up, else why not."""
        await self.connection.setRemoteDescription(RTCSessionDescription(answer_sdp, "answer"))
        try:
            await asyncio.wait_for(self._connected.wait(), _CONNECTED_WITHIN_S)
        except TimeoutError:
            return "not connected"
        return ""

    async def hang_up(self) -> None:
        await self.connection.close()
        if self._task is not None:
            await asyncio.wait([self._task], timeout=2)

    def gaps_ms(self, from_s: float) -> list[float]:
        came = sorted(at for at in self._packets.came_s.values() if at >= from_s)
        return [1000 * (after - before) for before, after in zip(came, came[1:], strict=False)]

    def delays_ms(self) -> list[float]:
        """From each click's frame to the packet that brought it back."""
        found = []
        for sent_s in self.mouth.clicked_s:
            back_s = next((at for at in self._onsets_s if sent_s <= at < sent_s + 0.45), None)
            if back_s is not None:
                found.append(1000 * (back_s - sent_s))
        return found


async def _watch_loop(late_ms: list[float]) -> None:
    loop = asyncio.get_running_loop()
    while True:
        due_s = loop.time() + 0.01
        await asyncio.sleep(0.01)
        late_ms.append(1000 * (loop.time() - due_s))


async def run(offers: Path, num_calls: int, seconds: float, is_clicking: bool) -> dict[str, object]:
    """All calls; plain data, ready for JSON."""
    loop = asyncio.get_running_loop()
    late_ms: list[float] = []
    watch = asyncio.create_task(_watch_loop(late_ms), name="peer/watch")
    peers = [BrowserPeer(is_clicking) for _ in range(num_calls)]
    began_s = loop.time()
    refused = [why for peer in peers if (why := await peer.call(offers))]
    set_up_s = loop.time() - began_s
    from_s = loop.time() + 1.0
    await asyncio.sleep(seconds + 1.0)
    watch.cancel()
    gaps = [gap for peer in peers for gap in peer.gaps_ms(from_s)]
    # The first clicks meet a jitter buffer that is still filling.
    delays = [delay for peer in peers for delay in peer.delays_ms()[2:]]
    await asyncio.gather(*(peer.hang_up() for peer in peers))
    return {
        "refused": refused, "set_up_s": round(set_up_s, 2), "packets": len(gaps),
        "gap_ms": _spread(gaps), "delay_ms": _spread(delays), "loop_late_ms": _spread(late_ms),
        "delivered": round(len(gaps) / max(1.0, num_calls * seconds * 50), 4),
    }  # fmt: skip


def _spread(values: list[float]) -> dict[str, float | int | None]:
    if not values:
        return {"p50": None, "p99": None, "max": None, "n": 0}
    p50, p99, most = (round(float(value), 1) for value in np.percentile(values, [50, 99, 100]))
    return {"p50": p50, "p99": p99, "max": most, "n": len(values)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="telephony.webrtc.peer", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--offers", type=Path, required=True, help="the worker's socket for offers")
    parser.add_argument("--calls", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--clicks", action="store_true", help="silence and clicks, for the delay")
    options = parser.parse_args()
    run_first()  # as the worker: what is measured is the worker, not who else is busy here
    gather_only_on("127.0.0.1")
    print(json.dumps(asyncio.run(run(options.offers, options.calls, options.seconds, options.clicks))))


if __name__ == "__main__":
    main()
