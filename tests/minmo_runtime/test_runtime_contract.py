"""The runtime contract, as one suite over every implementation: fake in-process, fake over the socket, the engine."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from minmo_runtime.api import (
    INPUT_SAMPLE_RATE_HZ,
    AudioDelta,
    CancelReply,
    CloseStream,
    DraftEnded,
    DuplexPrediction,
    OpenStream,
    PushAudio,
    PushText,
    ReplyFinished,
    ReplyTruncated,
    Runtime,
    RuntimeEvent,
    RuntimeOverloaded,
    Say,
    StartReply,
    StreamLost,
    StreamOpened,
    TextDelta,
    ToolCallRequested,
    ToolResult,
)
from minmo_runtime.client import RuntimeClient
from minmo_runtime.config import RuntimeConfig
from minmo_runtime.engine import Engine, EngineRuntime
from minmo_runtime.fake import FakeRule, FakeRuntime, FakeScript
from minmo_runtime.random_checkpoint import write_random_checkpoint
from minmo_runtime.scheduler import Job
from minmo_runtime.server import RuntimeServer
from minmo_runtime.weights import load_checkpoint

PACKET = INPUT_SAMPLE_RATE_HZ * 20 // 1000
SCRIPT = FakeScript(
    rules=(
        FakeRule(
            pattern=r"order (?P<n>\d+)",
            tool="look_up_order",
            arguments={"order_number": "{n}"},
            text="your order is {status}.",
        ),
        FakeRule(
            pattern="hello", text="hello, this is a rather long answer so that it can be cut in the middle of it."
        ),
    ),
    draft_after_ms=160,
)
MAX_STREAMS = 2


class Call:
    """A minimal agent: pushes silence in real order, collects events."""

    def __init__(self, runtime: Runtime, call_id: str) -> None:
        self.runtime, self.call_id, self.sample = runtime, call_id, 0
        self.events: list[RuntimeEvent] = []
        self._reading: asyncio.Task[None] | None = None

    async def open(self, **fields: object) -> None:
        await self.runtime.send(OpenStream(call_id=self.call_id, system_prompt="you are a test.", **fields))
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for event in self.runtime.events(self.call_id):
            self.events.append(event)

    async def push(self, num_packets: int = 1, voiced: bool = False) -> None:
        for _ in range(num_packets):
            pcm = (b"\x00\x20\x00\xe0" if voiced else b"\x00\x00\x00\x00") * (PACKET // 2)
            await self.runtime.send(PushAudio(call_id=self.call_id, pcm=pcm, start_sample=self.sample, voiced=voiced))
            self.sample += PACKET
        await asyncio.sleep(0)

    async def until(self, kind: type, timeout_s: float = 20.0) -> RuntimeEvent:
        """Push silence until an event of `kind` comes that was not there before."""
        before = sum(isinstance(e, kind) for e in self.events)
        async with asyncio.timeout(timeout_s):
            while True:
                found = [e for e in self.events if isinstance(e, kind)]
                if len(found) > before:
                    return found[-1]
                await self.push()
                await asyncio.sleep(0.001)

    async def close(self) -> None:
        await self.runtime.send(CloseStream(call_id=self.call_id))
        if self._reading is not None:
            await asyncio.wait_for(self._reading, 5)

    def of(self, kind: type) -> list:
        return [e for e in self.events if isinstance(e, kind)]


@contextlib.asynccontextmanager
async def fake_in_process(tmp_path: Path) -> AsyncIterator[Runtime]:
    yield FakeRuntime(SCRIPT, max_streams=MAX_STREAMS)


@contextlib.asynccontextmanager
async def fake_over_socket(tmp_path: Path) -> AsyncIterator[Runtime]:
    server = RuntimeServer(FakeRuntime(SCRIPT, max_streams=MAX_STREAMS), tmp_path / "engine.sock")
    await server.start()
    client = await RuntimeClient.connect(tmp_path / "engine.sock")
    yield client
    await client.close()
    await server.stop()


@contextlib.asynccontextmanager
async def engine_in_process(tmp_path: Path) -> AsyncIterator[Runtime]:
    async with EngineRuntime(make_engine(tmp_path)) as runtime:
        yield runtime


@contextlib.asynccontextmanager
async def engine_over_socket(tmp_path: Path) -> AsyncIterator[Runtime]:
    async with EngineRuntime(make_engine(tmp_path)) as runtime:
        server = RuntimeServer(runtime, tmp_path / "engine.sock")
        await server.start()
        client = await RuntimeClient.connect(tmp_path / "engine.sock")
        yield client
        await client.close()
        await server.stop()


def make_engine(tmp_path: Path) -> Engine:
    """The real engine with tiny random weights."""
    checkpoint = load_checkpoint(write_random_checkpoint(tmp_path / "checkpoint"))
    return Engine(checkpoint, RuntimeConfig(max_streams=MAX_STREAMS, max_reply_tokens=24))


IMPLEMENTATIONS: dict[str, Callable] = {
    "fake": fake_in_process,
    "fake-socket": fake_over_socket,
    "engine": engine_in_process,
    "engine-socket": engine_over_socket,
}


@pytest.fixture(params=sorted(IMPLEMENTATIONS))
async def runtime(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Runtime]:
    async with IMPLEMENTATIONS[request.param](tmp_path) as implementation:
        yield implementation


@pytest.fixture
async def call(runtime: Runtime) -> AsyncIterator[Call]:
    one = Call(runtime, "c1")
    await one.open()
    yield one
    await one.close()


async def test_stream_opens_with_its_rate_and_checkpoint(call: Call) -> None:
    await call.push(2)
    await asyncio.sleep(0.05)
    opened = call.events[0]
    assert isinstance(opened, StreamOpened)
    assert opened.output_sample_rate_hz >= 8000 and opened.checkpoint
    assert set(opened.bridges) <= {"in", "out", "duplex"}


async def test_check_answers_with_and_without_calls_and_takes_no_place(runtime: Runtime) -> None:
    async with asyncio.timeout(60):
        await runtime.check()
        calls = [Call(runtime, f"c{index}") for index in range(MAX_STREAMS)]
        for one in calls:
            await one.open()  # every place is still free
        await runtime.check()
        for one in calls:
            await one.close()


async def test_say_speaks_exactly_its_text(call: Call) -> None:
    await call.runtime.send(Say(call_id="c1", turn_id="t1", text="hello and welcome."))
    finished = await call.until(ReplyFinished)
    audio = call.of(AudioDelta)
    assert finished.turn_id == "t1" and finished.text == "hello and welcome."
    assert [a.sequence for a in audio] == list(range(len(audio))) and audio
    assert sum(len(a.pcm) // 2 for a in audio) == finished.num_samples > 0


async def test_reply_text_is_the_sum_of_its_deltas(call: Call) -> None:
    await call.runtime.send(PushText(call_id="c1", text="hello"))
    await call.runtime.send(StartReply(call_id="c1", turn_id="t1"))
    finished = await call.until(ReplyFinished)
    assert "".join(d.text for d in call.of(TextDelta)) == finished.text
    assert sum(len(a.pcm) // 2 for a in call.of(AudioDelta)) == finished.num_samples


async def test_two_says_come_out_one_after_the_other(call: Call) -> None:
    await call.runtime.send(Say(call_id="c1", turn_id="t1", text="first sentence."))
    await call.runtime.send(Say(call_id="c1", turn_id="t2", text="second sentence."))
    await call.until(ReplyFinished)
    if len(call.of(ReplyFinished)) < 2:
        await call.until(ReplyFinished)
    assert [f.turn_id for f in call.of(ReplyFinished)] == ["t1", "t2"]
    turns = [a.turn_id for a in call.of(AudioDelta)]
    assert turns == sorted(turns)


async def test_cancel_is_answered_and_nothing_of_the_turn_follows(call: Call) -> None:
    text = "this is a sentence of many words so that somebody can interrupt it in the middle."
    await call.runtime.send(Say(call_id="c1", turn_id="t1", text=text))
    await call.until(AudioDelta)
    await call.runtime.send(CancelReply(call_id="c1", turn_id="t1", played_samples=0, reason="interrupt"))
    truncated = await call.until(ReplyTruncated)
    num_audio = len(call.of(AudioDelta))
    assert truncated.turn_id == "t1" and truncated.heard_text == ""
    await call.push(20)
    await asyncio.sleep(0.05)
    assert len(call.of(AudioDelta)) == num_audio and not call.of(ReplyFinished)


async def test_heard_text_is_a_prefix_of_what_was_generated(call: Call) -> None:
    await call.runtime.send(Say(call_id="c1", turn_id="t1", text="one two three four five six seven eight nine ten."))
    finished = await call.until(ReplyFinished)
    await call.runtime.send(CancelReply(call_id="c1", turn_id="t1", played_samples=finished.num_samples // 2))
    truncated = await call.until(ReplyTruncated)
    assert truncated.generated_text.startswith(truncated.heard_text)
    assert len(truncated.heard_text) < len(truncated.generated_text)


async def test_cancel_of_an_unknown_turn_is_answered_empty(call: Call) -> None:
    await call.runtime.send(CancelReply(call_id="c1", turn_id="nobody", played_samples=0))
    truncated = await call.until(ReplyTruncated)
    assert truncated.turn_id == "nobody" and truncated.heard_text == truncated.generated_text == ""


async def test_false_end_leaves_nothing_heard(call: Call) -> None:
    await call.runtime.send(PushText(call_id="c1", text="hello"))
    await call.runtime.send(StartReply(call_id="c1", turn_id="t1"))
    await call.until(AudioDelta)
    await call.runtime.send(CancelReply(call_id="c1", turn_id="t1", played_samples=0, reason="false_end"))
    assert (await call.until(ReplyTruncated)).heard_text == ""


async def pause(call: Call, text: str) -> None:
    """The caller has said `text` and is silent: it looks more and more like the end of the turn."""
    await call.runtime.send(PushText(call_id=call.call_id, text=text))
    async with asyncio.timeout(20):
        while not any(e.user_done > 0.2 for e in call.of(DuplexPrediction)):
            await call.push()
            await asyncio.sleep(0.001)


async def test_a_draft_is_not_heard_before_the_floor_is_taken_and_is_the_reply_then(call: Call) -> None:
    await pause(call, "hello")
    await asyncio.sleep(0.05)
    assert {type(event) for event in call.events} == {StreamOpened, DuplexPrediction}
    await call.runtime.send(StartReply(call_id="c1", turn_id="t1"))
    drafted = await call.until(ReplyFinished)
    spoken = [event for event in call.events if isinstance(event, (DraftEnded, TextDelta, AudioDelta))]
    assert isinstance(spoken[0], DraftEnded) and (spoken[0].outcome, spoken[0].turn_id) == ("committed", "t1")
    assert "".join(d.text for d in call.of(TextDelta)) == drafted.text
    other = Call(call.runtime, "c2")
    await other.open()
    await other.runtime.send(PushText(call_id="c2", text="hello"))
    await other.runtime.send(StartReply(call_id="c2", turn_id="t1"))
    plainly = await other.until(ReplyFinished)
    assert not other.of(DraftEnded) and (plainly.text, plainly.num_samples) == (drafted.text, drafted.num_samples)
    await other.close()


async def test_a_draft_for_words_that_were_not_the_last_is_thrown_away(call: Call) -> None:
    await pause(call, "hello")
    await call.runtime.send(PushText(call_id="c1", text="hello and how are you"))
    ended = await call.until(DraftEnded)
    assert (ended.outcome, ended.turn_id) == ("discarded", "")
    assert not call.of(TextDelta) and not call.of(AudioDelta) and not call.of(ToolCallRequested)


async def test_open_without_room_is_refused(runtime: Runtime) -> None:
    calls = [Call(runtime, f"c{i}") for i in range(MAX_STREAMS)]
    for one in calls:
        await one.open()
    with pytest.raises(RuntimeOverloaded):
        await Call(runtime, "late").open()
    await calls[0].close()
    again = Call(runtime, "again")
    await again.open()
    for one in (*calls[1:], again):
        await one.close()


async def test_close_ends_the_events_and_is_idempotent(runtime: Runtime) -> None:
    one = Call(runtime, "c1")
    await one.open()
    await one.close()
    await runtime.send(CloseStream(call_id="c1"))
    with pytest.raises(StreamLost):
        await runtime.send(StartReply(call_id="c1", turn_id="t1"))


async def test_calls_do_not_hear_each_other(runtime: Runtime) -> None:
    one, other = Call(runtime, "c1"), Call(runtime, "c2")
    await one.open()
    await other.open()
    await runtime.send(Say(call_id="c1", turn_id="t1", text="only for one."))
    await one.until(ReplyFinished)
    await other.push(5)
    await asyncio.sleep(0.05)
    assert not other.of(AudioDelta) and all(e.call_id == "c1" for e in one.events)
    await one.close()
    await other.close()


async def test_a_device_that_no_longer_computes_fails_the_check_and_frees_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with EngineRuntime(make_engine(tmp_path)) as engine:
        server = RuntimeServer(engine, tmp_path / "engine.sock")
        await server.start()
        client = await RuntimeClient.connect(tmp_path / "engine.sock")
        await client.check()
        run = engine.engine.runner.run
        jobs: list[str] = []

        def broken(job: Job, now: float) -> dict[str, str]:
            jobs.append(job.kind.value)
            return {stream.call_id: "the device is gone" for stream in job.streams}

        monkeypatch.setattr(engine.engine.runner, "run", broken)
        with pytest.raises(StreamLost, match="the device is gone"):
            await client.check()
        assert jobs == ["encode"]
        monkeypatch.setattr(engine.engine.runner, "run", run)
        await client.check()  # the connection and the engine go on
        assert not engine.engine.streams
        await client.close()
        await server.stop()


class TestFakeOnly:
    """What needs a persona that answers predictably."""

    @pytest.fixture(params=["fake", "fake-socket"])
    async def runtime(self, request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Runtime]:
        async with IMPLEMENTATIONS[request.param](tmp_path) as implementation:
            yield implementation

    async def test_a_tool_call_is_requested_and_its_result_spoken(self, call: Call) -> None:
        await call.runtime.send(PushText(call_id="c1", text="where is order 45612"))
        await call.runtime.send(StartReply(call_id="c1", turn_id="t1"))
        wanted = await call.until(ToolCallRequested)
        assert (wanted.name, wanted.arguments) == ("look_up_order", {"order_number": "45612"})
        await call.push(50)
        assert not call.of(AudioDelta)
        await call.runtime.send(
            ToolResult(
                call_id="c1", turn_id="t1", tool_call_id=wanted.tool_call_id, content="status shipped day wednesday"
            )
        )
        assert (await call.until(ReplyFinished)).text == "your order is shipped."
