"""A deterministic runtime without a model: scripted ears, a rule-based persona, tones for a voice.

Maintained product code, used by scenario tests of whole calls in virtual time. It knows nothing of the agent and
nothing of torch. What the caller "says" is a script: the n-th voiced segment is heard as the n-th `FakeLine`. What the
agent answers is a list of `FakeRule`s over the text of the user turn; a rule with a tool asks for it first and may use
the result in its text. One call of it is fake_stream.py.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from minmo_runtime.api import (
    CloseStream,
    OpenStream,
    PushAudio,
    RuntimeEvent,
    RuntimeOverloaded,
    RuntimeRequest,
    StreamFailed,
    StreamLost,
    StreamOpened,
)
from minmo_runtime.event_queues import EventQueues
from minmo_runtime.fake_script import FakeLine, FakeRule, FakeScript
from minmo_runtime.fake_stream import FakeStream

__all__ = ["FakeLine", "FakeRule", "FakeRuntime", "FakeScript", "FakeStream"]

MAX_REQUESTS_KEPT = 2_000


class FakeRuntime:
    """`api.Runtime` over `FakeStream`s: one script for all calls, or one per call id."""

    def __init__(
        self, script: FakeScript | None = None, *, scripts: dict[str, FakeScript] | None = None, max_streams: int = 8
    ) -> None:
        self.script = script or FakeScript()
        self.scripts = scripts or {}
        self.max_streams = max_streams
        self.streams: dict[str, FakeStream] = {}
        self.requests: list[RuntimeRequest] = []  # what was asked but audio: tests read it
        self._queues = EventQueues()

    async def send(self, request: RuntimeRequest) -> None:
        if not isinstance(request, PushAudio):
            self.requests.append(request)
            del self.requests[:-MAX_REQUESTS_KEPT]  # it also serves soaks
        match request:
            case OpenStream():
                if request.call_id in self.streams:
                    raise ValueError(f"stream {request.call_id!r} is already open")
                if len(self.streams) >= self.max_streams:
                    raise RuntimeOverloaded(f"{len(self.streams)} streams are open, at most {self.max_streams}")
                script = self.scripts.get(request.call_id, self.script)
                self.streams[request.call_id] = FakeStream(request, script)
                self._queues.open(request.call_id)
                self._queues.put(
                    StreamOpened(
                        call_id=request.call_id,
                        output_sample_rate_hz=script.output_sample_rate_hz,
                        checkpoint="fake",
                        bridges=("in", "out", "duplex"),
                    )
                )
            case CloseStream():
                if self.streams.pop(request.call_id, None) is not None:
                    self._queues.end(request.call_id)
            case _:
                stream = self.streams.get(request.call_id)
                if stream is None:
                    raise StreamLost(f"no open stream {request.call_id!r}")
                for event in stream.receive(request):
                    if not self._queues.put(event) or isinstance(event, StreamFailed):
                        self.streams.pop(request.call_id, None)

    async def check(self) -> None:
        """It is here."""

    def events(self, call_id: str) -> AsyncIterator[RuntimeEvent]:
        return self._queues.events(call_id)

    def lose(self, call_id: str) -> None:
        """The engine dies under this call: its events raise StreamLost, and so does the next request."""
        self.streams.pop(call_id, None)
        self._queues.end(call_id, StreamLost(f"stream {call_id!r} was lost"))
