"""The two audio tracks of a browser's leg: ours, filled by the leg's clock, and the browser's, read into its timeline.

Our track never waits for a clock of its own: the endpoint's tick pushes 20 ms, aiortc takes it as soon as it is there,
encodes Opus and sends. Received sound is 48 kHz stereo as aiortc decodes it; it is made mono at the leg's rate here
(walk: hops 1 and 13).
"""

from __future__ import annotations

import asyncio
import fractions
from collections.abc import Callable

import av
import numpy as np
from aiortc.mediastreams import MediaStreamError, MediaStreamTrack

from telephony.resample import StreamResampler

_MAX_QUEUED = 10  # frames; a sender stuck for longer than 200 ms gets the newest
# The encoder's resampler withholds a few samples, and would for want of them send every packet one frame later.
_LEAD_MS = 2


class AgentTrack(MediaStreamTrack):
    """What the browser hears."""

    kind = "audio"

    def __init__(self, rate_hz: int) -> None:
        super().__init__()
        self._rate = rate_hz
        self._queue: asyncio.Queue[bytes] = asyncio.Queue()
        self._position = 0
        self.num_dropped = 0

    def push(self, pcm: bytes) -> None:
        """int16 mono at the leg's rate."""
        if self._queue.qsize() >= _MAX_QUEUED:
            self._queue.get_nowait()
            self.num_dropped += 1
        self._queue.put_nowait(pcm)

    async def recv(self) -> av.AudioFrame:
        if self.readyState != "live":
            raise MediaStreamError
        pcm = await self._queue.get()
        if self._position == 0:
            pcm = bytes(2 * self._rate * _LEAD_MS // 1000) + pcm
        frame = av.AudioFrame.from_ndarray(np.frombuffer(pcm, "<i2")[None, :], format="s16", layout="mono")
        frame.sample_rate = self._rate
        frame.pts, frame.time_base = self._position, fractions.Fraction(1, self._rate)
        self._position += len(pcm) // 2
        return frame


async def read_caller(track: MediaStreamTrack, push: Callable[[int, np.ndarray], None], rate_hz: int) -> None:
    """`push(start_sample, pcm)` until the track ends. One resampler for the whole stream: no frame edge is heard."""
    resampler: StreamResampler | None = None
    origin: int | None = None
    num_out = 0
    expected: int | None = None
    while True:
        try:
            frame = await track.recv()
        except MediaStreamError:
            return
        assert isinstance(frame, av.AudioFrame) and frame.format.name == "s16", frame  # as aiortc's decoders give it
        if frame.pts is None:
            continue
        position = frame.pts * rate_hz // frame.sample_rate
        if origin is None or expected is None or abs(position - expected) > 1:
            origin, num_out = position, 0  # first, or after a gap: the timeline is told where it goes on
        expected = position + frame.samples * rate_hz // frame.sample_rate
        if resampler is None or (resampler.from_hz, resampler.layout) != (frame.sample_rate, frame.layout.name):
            resampler = StreamResampler(frame.sample_rate, rate_hz, frame.layout.name)
            origin, num_out = position, 0
        samples = bytes(frame.planes[0])[: 2 * frame.layout.nb_channels * frame.samples]  # a plane is padded
        pcm = np.frombuffer(resampler.push(samples), "<i2")
        if len(pcm):
            push(origin + num_out, pcm)
            num_out += len(pcm)
