"""Listening jobs have a queue of their own on a GPU; the order between the queues, told by stand-ins."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from minmo_runtime.device_streams import DeviceStreams
from minmo_runtime.scheduler import JobKind


class FakeQueue:
    def __init__(self, log: list[str]) -> None:
        self.log = log

    def wait_event(self, event: FakeEvent) -> None:
        self.log.append(f"listening waits for {event.name}")

    def synchronize(self) -> None:
        self.log.append("listening is finished")


class FakeEvent:
    name = ""

    def record(self, stream: str) -> None:
        self.name = f"what {stream} has done"


class FakeCuda:
    """Says in `log` which queue a job runs on."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.now = "speaking"

    def Stream(self) -> FakeQueue:
        return FakeQueue(self.log)

    def Event(self) -> FakeEvent:
        return FakeEvent()

    def current_stream(self) -> str:
        return self.now

    @contextmanager
    def stream(self, stream: FakeQueue) -> Iterator[None]:
        self.now = "listening"
        yield
        self.now = "speaking"


def test_the_encoder_does_not_wait_for_the_flow_but_for_the_llm() -> None:
    cuda = FakeCuda()
    streams = DeviceStreams("cuda", cuda)
    for kind in (JobKind.ENCODE, JobKind.DECODE, JobKind.FLOW, JobKind.PREDICT):
        with streams.of(kind):
            cuda.log.append(f"{kind.name} on {cuda.now}")
    assert cuda.log == [
        "ENCODE on listening",
        "listening is finished",
        "DECODE on speaking",
        "FLOW on speaking",
        "listening waits for what speaking has done",
        "PREDICT on listening",
        "listening is finished",
    ]


def test_a_listening_job_that_fails_leaves_nothing_running() -> None:
    cuda = FakeCuda()
    streams = DeviceStreams("cuda", cuda)
    with pytest.raises(ValueError, match="no"), streams.of(JobKind.ALIGN):
        raise ValueError("no")
    assert cuda.log == ["listening is finished"]


def test_a_cpu_has_one_queue() -> None:
    streams = DeviceStreams("cpu")
    with streams.of(JobKind.ENCODE):
        assert streams.listening is None
