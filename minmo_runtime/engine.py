"""The engine: one `step(now)` = schedule → run → deliver, for all calls at once.

`Engine` is a plain object: requests in, events out, time an argument. `EngineRuntime` is its thin asyncio shell and
implements `api.Runtime`; server.py puts that behind a socket. Walk: step 7.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path

import torch

from minmo_runtime.api import (
    INPUT_SAMPLE_RATE_HZ,
    CloseStream,
    JobOverran,
    OpenStream,
    PushAudio,
    RuntimeEvent,
    RuntimeOverloaded,
    RuntimeRequest,
    Say,
    StreamFailed,
    StreamLost,
    StreamOpened,
)
from minmo_runtime.capacity import Capacity, capacity_of
from minmo_runtime.config import RuntimeConfig
from minmo_runtime.event_queues import EventQueues
from minmo_runtime.long_jobs import LongJobs
from minmo_runtime.runner import Runner
from minmo_runtime.scheduler import Job, JobKind, Scheduler
from minmo_runtime.stream import Stream
from minmo_runtime.weights import Checkpoint, load_checkpoint

_IDLE_POLL_S = 0.02  # while a reply waits for its audio to be played


class Engine:
    """Owns the runner and the streams. Not thread-safe; nothing in it blocks for longer than one job."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: RuntimeConfig,
        make_scheduler: Callable[[RuntimeConfig, int], Scheduler] = Scheduler,
        timer: Callable[[], float] | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.config = config
        self.runner = Runner(checkpoint, config)
        self.scheduler = make_scheduler(config, self.runner.chunk_fbank_frames)
        self.streams: dict[str, Stream] = {}
        self.say_cache: dict = {}  # fixed sentences' samples, shared by all calls
        self.timer = timer
        # (kind, rows, seconds) of the latest jobs, if a timer was given; what the benches read
        self.job_times: deque[tuple[JobKind, int, float]] = deque(maxlen=100_000)
        self.long_jobs = LongJobs(config.max_job_ms)
        self.capacity = Capacity(config.max_streams, "config")  # load_engine asks capacity.py

    def receive(self, request: RuntimeRequest, now: float) -> list[RuntimeEvent]:
        """Take one request; raises RuntimeOverloaded, ValueError (already open) or StreamLost (not open)."""
        stream = self.streams.get(request.call_id)
        match request:
            case OpenStream():
                if stream is not None:
                    raise ValueError(f"stream {request.call_id!r} is already open")
                return [self._open(request)]
            case CloseStream():
                if stream is not None:
                    self._free(stream)
                return []
            case _:
                if stream is None:
                    raise StreamLost(f"no open stream {request.call_id!r}")
                try:
                    stream.receive(request, now)
                except ValueError as error:  # a request that makes no sense ends its own stream only
                    self._free(stream)
                    return [StreamFailed(call_id=request.call_id, reason=f"{type(request).__name__}: {error}")]
                return self._deliver((stream,))

    def step(self, now: float) -> list[RuntimeEvent]:
        """One job, or none. Returns the events there are, of each call in order."""
        for stream in self.streams.values():
            stream.advance()
        job = self.scheduler.pick(self.streams.values(), now)
        failed = self._run(job, now) if job is not None else {}
        events = self._deliver(self.streams.values())
        for call_id, reason in failed.items():
            self._free(self.streams[call_id])
            events.append(StreamFailed(call_id=call_id, reason=reason))
        return events

    def has_work(self, now: float) -> bool:
        """Whether `step(now)` would do something."""
        for stream in self.streams.values():
            stream.advance()
        return any(stream.outbox or self.scheduler.ready(stream, now) for stream in self.streams.values())

    @property
    def has_replies(self) -> bool:
        """Whether some reply is under way, even if it must wait for its audio to be played."""
        return any(stream.replies for stream in self.streams.values())

    def _open(self, request: OpenStream) -> StreamOpened:
        num_open = len(self.streams)
        if num_open >= self.config.max_streams:
            raise RuntimeOverloaded(
                f"{num_open} calls are open, at most runtime.max_streams = {self.config.max_streams}"
            )
        if num_open >= self.capacity.num_calls:
            raise RuntimeOverloaded(f"{num_open} calls are open; this device holds {self.capacity}")
        stream = Stream(request, self.config, self.checkpoint.rates, self.checkpoint.text_tokenizer)
        stream.slot = self.runner.pool.take(request.call_id)
        stream.needs_hidden = "out" not in self.checkpoint.bridges
        stream.say_cache = self.say_cache
        stream.ear.hears_audio = "in" not in self.checkpoint.bridges
        stream.listening.slot = self.runner.prefill.branch_slot(stream.slot)
        stream.listening.feeds_predictor = self.runner.predictor.reads_hidden
        stream.ear.chunk_fbank_frames = self.runner.chunk_fbank_frames
        if self.runner.predictor.step_ms:
            stream.predict_every(self.runner.predictor.step_ms)
        self.streams[request.call_id] = stream
        return StreamOpened(
            call_id=request.call_id,
            output_sample_rate_hz=self.checkpoint.rates.output_sample_rate_hz,
            checkpoint=self.checkpoint.label,
            bridges=self.checkpoint.bridges,
            memory_bytes=self.runner.num_cache_bytes // self.config.max_streams,
        )

    def _free(self, stream: Stream) -> None:
        del self.streams[stream.call_id]
        self.runner.free(stream.slot)

    def _run(self, job: Job, now: float) -> dict[str, str]:
        begin = self.timer() if self.timer else 0.0
        try:
            failed = self.runner.run(job, now)
            for call_id, reason in failed.items():
                print(f"engine: {job.kind.value}: {reason} in call {call_id}", file=sys.stderr)
            return failed
        finally:
            if self.timer:
                seconds = self.timer() - begin
                self.job_times.append((job.kind, len(job.streams), seconds))
                self._watch(job, seconds, now)

    def _watch(self, job: Job, seconds: float, now: float) -> None:
        """A job that took too long is a figure of every call that shared it."""
        if self.long_jobs.note(job.kind.value, len(job.streams), seconds, now):
            for stream in job.streams:
                stream.emit(
                    JobOverran(call_id=stream.call_id, part=job.kind.value, milliseconds=round(1000 * seconds, 1))
                )

    def _deliver(self, streams: Iterable[Stream]) -> list[RuntimeEvent]:
        events: list[RuntimeEvent] = []
        for stream in streams:
            if stream.outbox:
                events += stream.outbox
                stream.outbox = []
        return events


def load_engine(folder: Path, config: RuntimeConfig) -> Engine:
    """An engine on the checkpoint in `folder`, with torch set up for one process per core."""
    torch.set_num_threads(config.num_threads)
    checkpoint = load_checkpoint(folder, models=config.models_folder)
    _warm_up(Engine(checkpoint, dataclasses.replace(config, max_streams=1, max_voice_tokens=50)))
    engine = Engine(checkpoint, config, timer=time.perf_counter)
    engine.job_times = deque(maxlen=0)  # the benches' own; in service it would grow for hours
    engine.capacity = capacity_of(engine)
    print(f"engine: holds {engine.capacity}", file=sys.stderr)
    return engine


def self_test(engine: Engine) -> None:
    """A moment of silence through the encoder, where nobody calls: a device that no longer computes shows itself now
    and not to the next caller. With calls open their own jobs show it. Raises what is wrong."""
    if engine.streams:
        return
    call_id, now = "self-test", 0.0
    engine.receive(OpenStream(call_id=call_id, system_prompt=""), now)
    try:
        silence = bytes(2 * INPUT_SAMPLE_RATE_HZ // 2)
        engine.receive(PushAudio(call_id=call_id, pcm=silence, start_sample=0, voiced=True), now)
        while engine.has_work(now):
            for event in engine.step(now):
                if isinstance(event, StreamFailed):
                    raise RuntimeError(f"the self-test failed: {event.reason}")
    finally:
        engine.receive(CloseStream(call_id=call_id), now)


def _warm_up(engine: Engine) -> None:
    """One short sentence through every module: tables and memory are made now, not in the first caller's first turn."""
    call_id, silence = "warm-up", bytes(2 * INPUT_SAMPLE_RATE_HZ)
    engine.receive(OpenStream(call_id=call_id, system_prompt="hello"), 0.0)
    engine.receive(PushAudio(call_id=call_id, pcm=silence, start_sample=0, voiced=True), 0.0)
    engine.receive(Say(call_id=call_id, turn_id="1", text="hello"), 0.0)
    while engine.has_work(0.0):
        engine.step(0.0)


class EngineRuntime:
    """`api.Runtime` in this process: `async with EngineRuntime(engine) as runtime`. Between two jobs the event loop
    runs."""

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.monotonic) -> None:
        self.engine = engine
        self._clock = clock
        self._queues = EventQueues()
        self._woken = asyncio.Event()
        self._pump: asyncio.Task[None] | None = None

    async def __aenter__(self) -> EngineRuntime:
        self._pump = asyncio.create_task(self._step_forever(), name="engine")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._pump is not None:
            self._pump.cancel()
            await asyncio.gather(self._pump, return_exceptions=True)
        for call_id in list(self.engine.streams):
            self._queues.end(call_id, StreamLost("the engine was stopped"))

    async def wait_failed(self) -> None:
        """Returns only by raising what broke the engine itself (a defect outside of any one call)."""
        assert self._pump is not None, "enter the runtime first"
        await asyncio.shield(self._pump)

    async def send(self, request: RuntimeRequest) -> None:
        was_open = request.call_id in self.engine.streams
        events = self.engine.receive(request, self._clock())
        if isinstance(request, OpenStream):
            self._queues.open(request.call_id)
        self._dispatch(events)
        if isinstance(request, CloseStream) and was_open:
            self._queues.end(request.call_id)
        self._woken.set()

    async def check(self) -> None:
        """In one piece: no call can come in between and meet the self-test's stream."""
        if self._pump is None or self._pump.done():
            raise StreamLost("the engine was stopped")
        self_test(self.engine)

    def events(self, call_id: str) -> AsyncIterator[RuntimeEvent]:
        return self._queues.events(call_id)

    async def _step_forever(self) -> None:
        while True:
            now = self._clock()
            self._dispatch(self.engine.step(now))
            if self.engine.has_work(now):
                await asyncio.sleep(0)
                continue
            self._woken.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._woken.wait(), _IDLE_POLL_S if self.engine.has_replies else None)

    def _dispatch(self, events: list[RuntimeEvent]) -> None:
        for event in events:
            if not self._queues.put(event):
                self.engine.receive(CloseStream(call_id=event.call_id), self._clock())
