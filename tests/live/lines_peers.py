"""Kamailio (apt: kamailio) and small helpers for the tests of trunks, pool and security."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from telephony.client import WorkerClient, WorkerLeg
from telephony.config import TelephonyConfig
from telephony.leg import Answer, LegDisconnected, LegEvent, LegIncoming, LegState, LegStateChanged
from telephony.process import WorkerProcess
from telephony.wire import SecurityEvent

MODULES = next(Path("/usr/lib").glob("*/kamailio/modules"), Path("/usr/lib/kamailio/modules"))


def free_port() -> int:
    """Free for UDP and TCP on loopback a moment ago."""
    while True:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp, socket.socket() as tcp:
            udp.bind(("127.0.0.1", 0))
            try:
                tcp.bind(udp.getsockname())
            except OSError:
                continue
            return int(udp.getsockname()[1])


class Kamailio:
    """One Kamailio process in the foreground."""

    def __init__(self, folder: Path, config: str, *options: str, port: int = 0) -> None:
        folder.mkdir(exist_ok=True)
        self.port = port or free_port()
        self.address = f"127.0.0.1:{self.port}"
        (folder / "kamailio.cfg").write_text(config)
        self._log_path = folder / "log"
        self._log = self._log_path.open("wb")
        self.process = subprocess.Popen(
            [
                "kamailio", "-f", str(folder / "kamailio.cfg"), "-L", str(MODULES), "-DD", "-E", "-m", "32", "-M", "4",
                "-Y", str(folder), "-P", str(folder / "pid"), "-w", str(folder), *options,
                "-l", f"udp:{self.address}", "-l", f"tcp:{self.address}",
            ],
            stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log,
        )  # fmt: skip
        self._wait_until_it_answers()

    def _wait_until_it_answers(self) -> None:
        deadline_s = time.monotonic() + 15
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind(("127.0.0.1", 0))
            probe.settimeout(0.3)
            own = probe.getsockname()[1]
            while time.monotonic() < deadline_s:
                assert self.process.poll() is None, self.text()[-3000:]
                probe.sendto(
                    (
                        f"OPTIONS sip:{self.address} SIP/2.0\r\nVia: SIP/2.0/UDP 127.0.0.1:{own};"
                        f"branch=z9hG4bK{time.monotonic_ns()}\r\nMax-Forwards: 5\r\n"
                        "From: <sip:probe@127.0.0.1>;tag=1\r\n"
                        f"To: <sip:{self.address}>\r\nCall-ID: {time.monotonic_ns()}\r\nCSeq: 1 OPTIONS\r\n"
                        "Content-Length: 0\r\n\r\n"
                    ).encode(),
                    ("127.0.0.1", self.port),
                )
                with contextlib.suppress(OSError):
                    probe.recv(4096)
                    return
        raise AssertionError(self.text()[-3000:])

    def text(self) -> str:
        return self._log_path.read_text(errors="replace")

    def lines(self, *words: str) -> list[str]:
        return [line for line in self.text().splitlines() if all(word in line for word in words)]

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._log.close()


@contextlib.contextmanager
def kamailio(folder: Path, config: str, *options: str, port: int = 0) -> Iterator[Kamailio]:
    peer = Kamailio(folder, config, *options, port=port)
    try:
        yield peer
    finally:
        peer.stop()


@contextlib.contextmanager
def sipp_callee(folder: Path, port: int = 0) -> Iterator[str]:
    """SIPp's own answering scenario (180, 200, waits for BYE): its host:port."""
    port = port or free_port()
    process = subprocess.Popen(
        ["sipp", "-sn", "uas", "-i", "127.0.0.1", "-p", str(port), "-mp", str(free_port() & ~1), "-nostdin"],
        cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


class Heard:
    """A leg and everything it said."""

    def __init__(self, leg: WorkerLeg) -> None:
        self.leg, self.events = leg, list[LegEvent]()
        self.samples = bytearray()
        leg.set_tap(lambda _start, received, _sent: self.samples.extend(received))
        self.task = asyncio.create_task(self._collect(), name=f"heard-{leg.leg_id}")

    async def _collect(self) -> None:
        async for event in self.leg.events():
            self.events.append(event)

    def of(self, kind: type) -> list:
        return [event for event in self.events if isinstance(event, kind)]

    async def until(self, kind: type, limit_s: float = 15.0, **fields: object):
        """The first event of this kind with these values."""
        async with asyncio.timeout(limit_s):
            while True:
                for event in self.of(kind):
                    if all(getattr(event, name) == value for name, value in fields.items()):
                        return event
                await asyncio.sleep(0.02)

    async def confirmed(self, limit_s: float = 15.0) -> LegStateChanged:
        return await self.until(LegStateChanged, limit_s, state=LegState.CONFIRMED)

    async def ended(self, limit_s: float = 15.0) -> LegDisconnected:
        return await self.until(LegDisconnected, limit_s)

    @property
    def incoming(self) -> LegIncoming:
        return self.of(LegIncoming)[0]


class Line:
    """A worker with the smallest agent: it takes legs and answers none by itself."""

    def __init__(self, worker: WorkerProcess, client: WorkerClient) -> None:
        self.worker, self.client, self.address = worker, client, worker.address
        self.security: list[SecurityEvent] = []
        client.on_security_event = self.security.append

    async def next_call(self, limit_s: float = 15.0, *, is_answered: bool = True) -> Heard:
        heard = Heard(await asyncio.wait_for(anext(self.client.legs()), limit_s))
        await heard.until(LegIncoming)
        if is_answered:
            await heard.leg.send(Answer(leg_id=heard.leg.leg_id))
        return heard

    async def call(self, **target: object) -> Heard:
        return Heard(await self.client.place_call(**target))  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def line(**settings: object) -> AsyncIterator[Line]:
    config = TelephonyConfig(**({"sip_port": 0} | settings))  # type: ignore[arg-type]
    with await asyncio.to_thread(WorkerProcess, config) as worker:
        client = await WorkerClient.connect(worker.socket_path, config=config)
        try:
            yield Line(worker, client)
        finally:
            await client.close()
