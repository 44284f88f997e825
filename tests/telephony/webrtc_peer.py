"""A browser's part played by aiortc, and a worker for it: for the tests of browser calls that need no browser."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fractions
import json
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import av
import numpy as np
from aiortc import RTCPeerConnection, RTCSessionDescription
from aiortc.mediastreams import MediaStreamError, MediaStreamTrack

from telephony.client import WorkerClient
from telephony.config import TelephonyConfig
from telephony.webrtc.config import media_config
from telephony.webrtc.signaling import Answered, Offer, Reply, send_offer

RATE = 16_000
REPOSITORY = Path(__file__).resolve().parent.parent.parent


class Microphone(MediaStreamTrack):
    """Plays `pcm` (int16, 16 kHz) once, from when it is set, in real time; else silence."""

    kind = "audio"

    def __init__(self) -> None:
        super().__init__()
        self.pcm = np.zeros(0, np.int16)
        self._position, self._started_at_s = 0, 0.0

    async def recv(self) -> av.AudioFrame:
        loop = asyncio.get_running_loop()
        self._started_at_s = self._started_at_s or loop.time()
        await asyncio.sleep(max(0.0, self._started_at_s + self._position / RATE - loop.time()))
        piece, self.pcm = self.pcm[:320], self.pcm[320:]
        piece = np.concatenate([piece, np.zeros(320 - len(piece), np.int16)])
        frame = av.AudioFrame.from_ndarray(piece[None, :], format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = RATE, self._position, fractions.Fraction(1, RATE)
        self._position += 320
        return frame


class Browser:
    """One call: `sdp` to offer, `take(answer)`, then `heard`."""

    def __init__(self) -> None:
        self.connection = RTCPeerConnection()
        self.microphone = Microphone()
        self.connection.addTrack(self.microphone)
        self.control = self.connection.createDataChannel("control")
        self._heard: list[np.ndarray] = []
        self._task: asyncio.Task[None] | None = None
        self.connection.on("track", self._on_track)

    def _on_track(self, track: MediaStreamTrack) -> None:
        self._task = asyncio.create_task(self._listen(track), name="browser/listen")

    async def _listen(self, track: MediaStreamTrack) -> None:
        resampler = av.AudioResampler(format="s16", layout="mono", rate=RATE)
        while True:
            try:
                frame = await track.recv()
            except MediaStreamError:
                return
            self._heard += [part.to_ndarray().reshape(-1) for part in resampler.resample(frame)]

    @property
    def heard(self) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.int16), *self._heard])

    async def offer(self) -> str:
        await self.connection.setLocalDescription(await self.connection.createOffer())
        return self.connection.localDescription.sdp

    async def call(self, offers: Path, did: str = "100") -> Reply:
        """The whole call setup; the connection is under way when an answer came."""
        offer = Offer(sdp=await self.offer(), did=did, ani="browser", source_address="127.0.0.1")
        reply = await send_offer(offers, offer, 15.0)
        if isinstance(reply, Answered):
            await self.connection.setRemoteDescription(RTCSessionDescription(reply.sdp, "answer"))
        return reply

    async def close(self) -> None:
        await self.connection.close()
        if self._task is not None:
            await asyncio.wait([self._task], timeout=2)


@dataclasses.dataclass
class RunningWorker:
    process: asyncio.subprocess.Process
    socket: Path
    offers: Path
    config: TelephonyConfig

    async def agent(self) -> WorkerClient:
        return await WorkerClient.connect(self.socket, config=self.config)


@contextlib.asynccontextmanager
async def browser_worker(**settings: object) -> AsyncIterator[RunningWorker]:
    folder = Path(tempfile.mkdtemp(prefix="minmo-webrtc-"))
    table = {"webrtc": settings, "telephony": {"agent_lost_hold_s": 1.0}}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "telephony.webrtc.worker", "--socket", str(folder / "media.sock"),
        "--offers", str(folder / "offers.sock"), "--config", json.dumps(table), "--parent-pid", str(os.getpid()),
        stdout=asyncio.subprocess.PIPE, cwd=REPOSITORY,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        assert b'"ready": true' in await asyncio.wait_for(process.stdout.readline(), 60)
        yield RunningWorker(process, folder / "media.sock", folder / "offers.sock", media_config(TelephonyConfig()))
    finally:
        for _ in range(2):
            if process.returncode is None:
                process.terminate()
                await asyncio.sleep(0.1)
        await asyncio.wait_for(process.wait(), 20)
        shutil.rmtree(folder, ignore_errors=True)
