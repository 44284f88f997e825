"""The engine process: serves over its socket, keeps it private, ends on SIGTERM; a broken peer hurts nobody else."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import sys
from pathlib import Path

import pytest

from minmo_runtime.api import (
    AudioDelta,
    CloseStream,
    OpenStream,
    PushAudio,
    ReplyFinished,
    RuntimeRequest,
    Say,
    StreamLost,
    StreamOpened,
)
from minmo_runtime.client import RuntimeClient
from minmo_runtime.fake import FakeRuntime
from minmo_runtime.random_checkpoint import write_random_checkpoint
from minmo_runtime.server import RuntimeServer
from minmo_runtime.wire import pack


@pytest.mark.slow
async def test_the_engine_process_speaks_and_ends_on_sigterm(tmp_path: Path) -> None:
    folder, path = write_random_checkpoint(tmp_path / "checkpoint"), tmp_path / "engine.sock"
    command = ["-m", "minmo_runtime.server", "--socket", str(path), "--checkpoint", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = await asyncio.create_subprocess_exec(
        sys.executable, *command, "--config", '{"max_streams": 1}', stdout=asyncio.subprocess.PIPE, env=environment
    )
    assert process.stdout is not None
    async with asyncio.timeout(180):
        assert await process.stdout.readline() == b"ready\n"
        client = await RuntimeClient.connect(path)
        await client.send(OpenStream(call_id="a", system_prompt="hello"))
        await client.send(Say(call_id="a", turn_id="t", text="hi"))
        kinds = []
        async for event in client.events("a"):
            kinds.append(type(event))
            if isinstance(event, ReplyFinished):
                break
        assert kinds[0] is StreamOpened and AudioDelta in kinds
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0
        with pytest.raises(StreamLost):
            while True:
                await client.send(Say(call_id="a", turn_id="u", text="hi"))
                await asyncio.sleep(0.01)
        await client.close()
    assert not path.exists()


async def test_the_socket_is_for_its_owner_only(tmp_path: Path) -> None:
    server = RuntimeServer(FakeRuntime(), tmp_path / "s.sock")
    await server.start()
    assert stat.S_IMODE((tmp_path / "s.sock").stat().st_mode) == 0o600
    await server.stop()


async def test_a_broken_peer_is_dropped_and_others_go_on(tmp_path: Path) -> None:
    server = RuntimeServer(FakeRuntime(), tmp_path / "s.sock")
    await server.start()
    good = await RuntimeClient.connect(tmp_path / "s.sock")
    await good.send(OpenStream(call_id="good", system_prompt=""))
    for garbage in (b"\xff\xff\xff\xff", b"\x00\x00\x00\x02\xc1\xc1", b"\x00\x00"):
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "s.sock"))
        writer.write(garbage)
        writer.write_eof()
        assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()
    await good.send(Say(call_id="good", turn_id="t", text="still here"))
    await good.close()
    await server.stop()


async def test_an_agent_that_goes_away_in_the_middle_of_a_reply_is_no_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    server = RuntimeServer(FakeRuntime(), tmp_path / "s.sock")
    await server.start()
    for is_polite in (True, False):
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "s.sock"), limit=64)
        writer.write(pack(OpenStream(call_id="a", system_prompt="")))
        await reader.readexactly(4)
        writer.write(pack(Say(call_id="a", turn_id="t", text="many words " * 50)))
        for block in range(40):  # the fake's clock
            writer.write(pack(PushAudio(call_id="a", pcm=bytes(3200), start_sample=1600 * block, voiced=False)))
        await writer.drain()
        if is_polite:
            await asyncio.sleep(0.05)
            writer.close()
        else:
            writer.transport.abort()  # as when it is killed: what it has not read is thrown away
        await asyncio.sleep(0.2)
    await server.stop()
    assert capfd.readouterr() == ("", "") and not caplog.records


async def test_a_peer_that_speaks_another_protocol_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    server = RuntimeServer(FakeRuntime(), tmp_path / "s.sock")
    await server.start()
    reader, writer = await asyncio.open_unix_connection(str(tmp_path / "s.sock"))
    writer.write(b"GET / HTTP/1.1\r\n\r\n")
    assert await asyncio.wait_for(reader.read(), 5) == b""
    writer.close()
    await server.stop()
    assert "engine: connection dropped: message of " in capfd.readouterr().err


async def test_a_closed_connection_takes_its_streams_with_it(tmp_path: Path) -> None:
    runtime = FakeRuntime(max_streams=1)
    server = RuntimeServer(runtime, tmp_path / "s.sock")
    await server.start()
    first = await RuntimeClient.connect(tmp_path / "s.sock")
    await first.send(OpenStream(call_id="a", system_prompt=""))
    await first.close()
    for _ in range(500):
        if not runtime.streams:
            break
        await asyncio.sleep(0.01)
    assert not runtime.streams
    await server.stop()


class SlowToOpen(FakeRuntime):
    """An engine that is busy when a stream is asked for."""

    async def send(self, request: RuntimeRequest) -> None:
        if isinstance(request, OpenStream):
            await asyncio.sleep(0.1)
        await super().send(request)


async def test_a_caller_who_hangs_up_while_the_engine_opens_harms_no_other_call(tmp_path: Path) -> None:
    runtime = SlowToOpen(max_streams=1)
    server = RuntimeServer(runtime, tmp_path / "s.sock")
    await server.start()
    client = await RuntimeClient.connect(tmp_path / "s.sock")
    for _ in range(3):  # more often than there are places
        asking = asyncio.create_task(client.send(OpenStream(call_id="gone", system_prompt="")))
        await asyncio.sleep(0.03)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await asyncio.sleep(0.3)
        assert not runtime.streams, "a place that nobody will ever give back"
    async with asyncio.timeout(5):
        await client.send(OpenStream(call_id="next", system_prompt=""))
        assert isinstance(await anext(client.events("next")), StreamOpened)
    assert not client.is_lost
    await client.close()
    await server.stop()


async def test_the_same_call_can_be_opened_again_at_once(tmp_path: Path) -> None:
    server = RuntimeServer(FakeRuntime(), tmp_path / "s.sock")
    await server.start()
    client = await RuntimeClient.connect(tmp_path / "s.sock")
    for _ in range(3):
        await client.send(OpenStream(call_id="a", system_prompt=""))
        events = client.events("a")
        assert isinstance(await asyncio.wait_for(anext(events), 5), StreamOpened)
        await client.send(CloseStream(call_id="a"))
        with pytest.raises(StopAsyncIteration):
            await asyncio.wait_for(anext(events), 5)
    await client.close()
    await server.stop()
