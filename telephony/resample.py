"""Streaming sample-rate conversion with the filter state kept (walk: hops 5 and 12).

libswresample through PyAV: 1.1-1.3 ms of CPU per second of audio and at most 2 ms withheld between two calls, where
block resamplers hold back up to 115 ms. The filter graph is ours and not `av.AudioResampler`, whose graphs start one
thread per core each and hand every frame over to them: three times the CPU, and with real-time workers on all cores the
agent's loop waited up to seconds for such a helper. One object per stream of audio; `finish` gives the withheld rest.
"""

from __future__ import annotations

from fractions import Fraction

import av
from av.filter import Graph


class StreamResampler:
    """int16 in, int16 mono out. In all, `n` samples in give `round(n * to_hz / from_hz)` out, to within 2 samples.

    `layout` is that of the input, interleaved: "mono" or "stereo".
    """

    def __init__(self, from_hz: int, to_hz: int, layout: str = "mono") -> None:
        if from_hz <= 0 or to_hz <= 0:
            raise ValueError(f"sample rates must be positive, not {from_hz} and {to_hz}")
        self.from_hz, self.to_hz, self.layout = from_hz, to_hz, layout
        self._frame_bytes = 2 * av.AudioLayout(layout).nb_channels
        self._is_plain = from_hz == to_hz and layout == "mono"
        self._graph: Graph | None = None  # from the first samples on

    def _new(self) -> Graph:
        graph = Graph()
        graph.threads = 1  # none but the caller's
        given = graph.add_abuffer(
            format="s16", sample_rate=self.from_hz, layout=self.layout, time_base=Fraction(1, self.from_hz)
        )
        wanted = graph.add("aformat", f"sample_fmts=s16:sample_rates={self.to_hz}:channel_layouts=mono")
        graph.link_nodes(given, wanted, graph.add("abuffersink")).configure()
        return graph

    def push(self, pcm: bytes) -> bytes:
        if self._is_plain or not pcm:
            return pcm
        frame = av.AudioFrame(format="s16", layout=self.layout, samples=len(pcm) // self._frame_bytes)
        frame.sample_rate = self.from_hz
        plane = frame.planes[0]
        plane.update(pcm.ljust(plane.buffer_size, b"\0"))  # a plane may be padded for the machine's vectors
        if self._graph is None:
            self._graph = self._new()
        self._graph.push(frame)
        return _pull(self._graph)  # a frame gives at most one

    def finish(self) -> bytes:
        """The withheld rest; the object is then as new."""
        graph, self._graph = self._graph, None
        if graph is None:
            return b""
        graph.push(None)
        return b"".join(iter(lambda: _pull(graph), b""))


def _pull(graph: Graph) -> bytes:
    try:
        frame = graph.pull()
    except (BlockingIOError, EOFError):
        return b""
    assert isinstance(frame, av.AudioFrame), type(frame)
    return bytes(frame.planes[0])[: 2 * frame.samples]
