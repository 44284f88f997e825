"""Would a call be taken? Every role asked by its real way: sockets, SIP, the engine's self-test, the database."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from socket import SOCK_STREAM

import msgspec
import pytest

from agent import readiness
from agent.app import free_port
from agent.config import Config, load_config
from agent.doctor import State
from agent.doctor_running import examine_running_agent
from agent.monitor import AgentStatus, Monitor
from agent.readiness import Readiness, examine_running
from agent.run_folder import (
    AUDIOSOCKET_CHECK,
    ENGINE_SOCKET,
    MONITOR_SOCKET,
    media_socket,
    note_run_folder,
    offer_socket,
    write_settings,
)
from minmo_runtime.fake import FakeRuntime
from minmo_runtime.server import RuntimeServer
from storage.config import StorageConfig
from storage.search import CallReader
from telephony.audiosocket.config import AudioSocketConfig
from telephony.sip.options import ask_options
from telephony.webrtc.signaling import serve_checks, serve_offers

GOOD = AgentStatus(num_calls=1, max_calls=4, is_engine_connected=True, num_workers=1, worst_lag_ms=12.0)


class Engine(FakeRuntime):
    is_hung = False

    async def check(self) -> None:
        if self.is_hung:
            await asyncio.sleep(60)


class SipPort(asyncio.DatagramProtocol):
    """Answers OPTIONS as a worker does; `lost` requests are not answered."""

    def __init__(self, status: int = 200, lost: int = 0) -> None:
        self.status, self.lost = status, lost
        self.requests: list[str] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, source: tuple[str, int]) -> None:
        self.requests.append(data.decode())
        if len(self.requests) <= self.lost:
            return
        lines = data.decode().split("\r\n")
        kept = [line for line in lines if line.partition(":")[0] in ("Via", "From", "To", "Call-ID", "CSeq")]
        answer = "\r\n".join([f"SIP/2.0 {self.status} Whatever", *kept, "Content-Length: 0", "", ""])
        self.transport.sendto(answer.encode(), source)  # type: ignore[attr-defined]


@dataclass
class Roles:
    config: Config
    folder: Path
    reader: CallReader
    engine: Engine
    monitor: Monitor
    sip: SipPort
    stop: dict[str, contextlib.AsyncExitStack] = field(default_factory=dict)

    async def ask(self) -> Readiness:
        return await examine_running(self.config, self.folder, self.reader)

    async def end(self, role: str) -> None:
        await self.stop[role].aclose()


@contextlib.asynccontextmanager
async def _sip_port(sip: SipPort) -> AsyncIterator[int]:
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
        lambda: sip, local_addr=("127.0.0.1", 0)
    )  # fmt: skip
    yield transport.get_extra_info("sockname")[1]
    transport.close()


@contextlib.asynccontextmanager
async def _engine(engine: Engine, path: Path) -> AsyncIterator[None]:
    server = RuntimeServer(engine, path)
    await server.start()
    yield
    await server.stop()


@contextlib.asynccontextmanager
async def _server(server: asyncio.Server) -> AsyncIterator[None]:
    yield
    server.close()


@pytest.fixture
async def roles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Roles]:
    monkeypatch.setattr(readiness, "ANSWER_WITHIN_S", 1.0)
    engine, monitor, sip = Engine(), Monitor({}), SipPort()
    monitor.tell_status = lambda: GOOD
    storage = StorageConfig(folder=tmp_path / "var", is_synced=False, journal_reserve_mib=1)
    stacks = {role: contextlib.AsyncExitStack() for role in ("worker", "browser-0", "agent", "engine")}
    port = await stacks["worker"].enter_async_context(_sip_port(sip))
    await stacks["engine"].enter_async_context(_engine(engine, tmp_path / ENGINE_SOCKET))
    monitoring = await monitor.serve(tmp_path / MONITOR_SOCKET)
    await stacks["agent"].enter_async_context(_server(monitoring))
    offers = await serve_offers(tmp_path / offer_socket(0), lambda _: asyncio.get_running_loop().create_future())
    await stacks["browser-0"].enter_async_context(_server(offers))
    config = load_config(None, {"telephony": {"sip_port": port}, "web": {"port": free_port(SOCK_STREAM, "127.0.0.1")}})
    config = dataclasses.replace(config, storage=storage)
    with contextlib.closing(CallReader.open(storage)) as reader:
        yield Roles(config, tmp_path, reader, engine, monitor, sip, stacks)
        for stack in stacks.values():
            await stack.aclose()


def up(found: Readiness) -> dict[str, bool]:
    return {role.role: role.is_up for role in found.roles}


async def test_ready_when_every_role_answers_and_each_says_how(roles: Roles) -> None:
    found = await roles.ask()
    assert up(found) == dict.fromkeys(("worker", "browser-0", "agent", "engine", "storage"), True)
    assert found.is_ready and found.status == GOOD
    text = {role.role: role.text for role in found.roles}
    assert text["worker"] == "answered OPTIONS with 200"
    assert text["engine"] == "self-test passed"
    assert text["agent"] == "1 of 4 calls, loop at most 12 ms late"
    assert str(roles.folder) not in str(found)


async def test_the_worker_for_audiosocket_is_asked_where_it_is_on(roles: Roles) -> None:
    roles.config = dataclasses.replace(roles.config, audiosocket=AudioSocketConfig(port=9019, did="100"))
    found = await roles.ask()
    assert found.is_ready and not up(found)["audiosocket"]
    async with _server(await serve_checks(roles.folder / AUDIOSOCKET_CHECK)):
        assert up(await roles.ask())["audiosocket"]


@pytest.mark.parametrize("role", ["worker", "agent", "engine"])
async def test_a_role_that_is_gone_is_named_and_no_call_would_be_taken(roles: Roles, role: str) -> None:
    await roles.end(role)
    found = await roles.ask()
    assert not found.is_ready
    assert [name for name, is_up in up(found).items() if not is_up] == [role]


async def test_calls_by_telephone_are_taken_without_the_browsers_worker(roles: Roles) -> None:
    await roles.end("browser-0")
    found = await roles.ask()
    assert found.is_ready and not up(found)["browser-0"]


async def test_an_engine_that_hangs_is_not_up_though_its_socket_is_open(roles: Roles) -> None:
    roles.engine.is_hung = True
    found = await roles.ask()
    assert not found.is_ready
    assert next(role.text for role in found.roles if role.role == "engine") == "no answer within 1 s"


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"is_closing": True}, "closing"),
        ({"is_engine_connected": False}, "not connected to the engine"),
        ({"num_workers": 0}, "not connected to any SIP worker"),
    ],
)
async def test_an_agent_that_would_refuse_is_not_up(roles: Roles, said: dict[str, object], words: str) -> None:
    roles.monitor.tell_status = lambda: msgspec.structs.replace(GOOD, **said)
    found = await roles.ask()
    assert not found.is_ready
    assert words in next(role.text for role in found.roles if role.role == "agent")


async def test_a_full_disk_is_told(roles: Roles) -> None:
    storage = dataclasses.replace(roles.config.storage, journal_reserve_mib=1_000_000)
    roles.config = dataclasses.replace(roles.config, storage=storage)
    found = await roles.ask()
    assert not found.is_ready and not up(found)["storage"]


async def test_one_worker_of_a_pool_is_enough_and_each_is_told(roles: Roles) -> None:
    (roles.folder / media_socket(0)).touch()
    (roles.folder / media_socket(2)).touch()
    found = await roles.ask()
    workers = {name: is_up for name, is_up in up(found).items() if name.startswith("worker")}
    assert workers.keys() == {"worker", "worker-1", "worker-2"}
    assert workers["worker"] and not workers["worker-1"] and found.is_ready


async def test_doctor_says_the_same_in_words_from_another_program(roles: Roles) -> None:
    shown = await asyncio.to_thread(examine_running_agent, roles.config)
    assert [(finding.name, finding.state) for finding in shown] == [("agent", State.FAULT)]  # none was ever started
    write_settings(roles.config, roles.folder)
    note_run_folder(roles.config.storage.folder, roles.folder)
    states = {f.name: (f.state, f.text) for f in await asyncio.to_thread(examine_running_agent, roles.config)}
    assert states["worker"][0] == State.OK and states["worker"][1].startswith("answered OPTIONS with 200")
    assert states["ready"] == (State.OK, "a call would be taken")
    assert states["web"][0] == State.WARNING  # nothing is there, and calls do not depend on it
    for role in ("worker", "browser-0"):
        await roles.end(role)
    states = {f.name: (f.state, f.text) for f in await asyncio.to_thread(examine_running_agent, roles.config)}
    assert states["worker"][0] == State.FAULT and states["browser-0"][0] == State.WARNING
    assert states["ready"] == (State.FAULT, "no call would be taken")


async def test_options_is_sent_again_when_it_was_lost_and_says_who_answers(roles: Roles) -> None:
    roles.sip.lost, roles.sip.status = 1, 486
    port = roles.config.telephony.sip_port
    assert await ask_options("127.0.0.1", port) == 486
    first, second = roles.sip.requests
    assert first == second and first.startswith(f"OPTIONS sip:127.0.0.1:{port};transport=udp SIP/2.0\r\n")


async def test_options_over_tcp() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"SIP/2.0 100 Trying\r\nContent-Length: 0\r\n\r\nSIP/2.0 200 OK\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        assert await ask_options("127.0.0.1", server.sockets[0].getsockname()[1], "tcp") == 200


async def test_L13_heartbeat_is_answered_by_the_worker_itself_so_one_that_hangs_is_not_up(
    tmp_path: Path, roles: Roles, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pjsua2")
    from telephony.config import TelephonyConfig
    from telephony.process import WorkerProcess

    monkeypatch.setattr(readiness, "ANSWER_WITHIN_S", 5.0)
    with WorkerProcess(TelephonyConfig(sip_port=0)) as worker:
        port = int(worker.address.rpartition(":")[2])
        telephony = dataclasses.replace(roles.config.telephony, sip_port=port)
        roles.config = dataclasses.replace(roles.config, telephony=telephony)
        assert up(await roles.ask())["worker"]
        monkeypatch.setattr(readiness, "ANSWER_WITHIN_S", 1.0)
        os.kill(worker.pid, signal.SIGSTOP)  # its socket stays open, and the kernel takes packets for it
        try:
            found = await roles.ask()
        finally:
            os.kill(worker.pid, signal.SIGCONT)
        assert not found.is_ready and not up(found)["worker"]
        monkeypatch.setattr(readiness, "ANSWER_WITHIN_S", 5.0)
        assert (await roles.ask()).is_ready
