"""Listening and speaking on queues of their own: on a GPU the encoder of one call runs beside the flow of another.

Jobs are begun one after the other by one thread, but most of a reply's jobs (Euler steps, a step whose result nobody
asks for yet) return before the device has finished them. On one queue the next listening chunk would wait for all of
that; on its own it starts at once. What passes between the two is made safe here and nowhere else: a listening job
begins behind the last job that wrote to the LLM, and is finished when it returns. Knows which kinds of job listen, and
nothing of what they do. On a CPU there is one queue and this does nothing. Walk: step 7. Never run on a GPU so far.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from minmo_runtime.scheduler import JobKind

LISTENING = frozenset({JobKind.ENCODE, JobKind.PREDICT, JobKind.ALIGN})
# Their results (hidden states of the LLM) are what listening jobs read.
_READ_BY_LISTENING = frozenset({JobKind.BRANCH, JobKind.PREFILL, JobKind.DECODE})


class Queues(Protocol):
    """What is used of torch.cuda; a test has its own."""

    def Stream(self) -> Any: ...

    def Event(self) -> Any: ...

    def stream(self, stream: Any) -> Any: ...

    def current_stream(self) -> Any: ...


class DeviceStreams:
    """`with streams.of(kind):` around each job."""

    def __init__(self, device: str, queues: Queues = torch.cuda) -> None:  # type: ignore[assignment]
        self.queues = queues
        self.listening = queues.Stream() if device == "cuda" else None
        self._read: Any = None  # event behind the last job whose results listening reads

    @contextmanager
    def of(self, kind: JobKind) -> Iterator[None]:
        if self.listening is None:
            yield
        elif kind in LISTENING:
            if self._read is not None:
                self.listening.wait_event(self._read)
            try:
                with self.queues.stream(self.listening):
                    yield
            finally:  # memory that is freed here may be handed to the other queue
                self.listening.synchronize()
        else:
            yield
            if kind in _READ_BY_LISTENING:
                self._read = self.queues.Event()
                self._read.record(self.queues.current_stream())
