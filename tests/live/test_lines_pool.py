"""Several workers behind the Kamailio of deploy/: failover, fullness, one killed under load, one that drains."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("pjsua2")

from agent.raw_sip_peer import RawPeer, header, to_tag  # noqa: E402
from telephony.leg import LegDisconnected, LegState  # noqa: E402
from tests.live.lines_peers import Heard, Kamailio, free_port, line  # noqa: E402
from tests.live.sip_agent import until  # noqa: E402
from tests.live.sipp import sipp  # noqa: E402

pytestmark = [pytest.mark.live, pytest.mark.peers("kamailio", "sipp")]

DEPLOYED = Path(__file__).parent.parent.parent / "deploy" / "kamailio" / "kamailio.cfg"
PROXIED = {"trusted_proxies": ("127.0.0.1/32",), "max_calls": 1}


@contextlib.contextmanager
def proxy(folder: Path, *workers: str) -> Iterator[Kamailio]:
    (folder / "dispatcher.list").write_text("".join(f"1 sip:{worker}\n" for worker in workers))
    peer = Kamailio(folder / "kamailio", DEPLOYED.read_text(), "-A", f'WORKERS="{folder}/dispatcher.list"')
    try:
        yield peer
    finally:
        peer.stop()


class Desk:
    """Answers every call of one worker."""

    def __init__(self, near) -> None:
        self.calls: list[Heard] = []
        self._near = near
        self._task = asyncio.create_task(self._serve())

    async def _serve(self) -> None:
        while True:
            self.calls.append(await self._near.next_call(600))

    @property
    def is_talking(self) -> bool:
        return bool(self.calls) and self.calls[-1].leg.state is LegState.CONFIRMED

    def stop(self) -> None:
        self._task.cancel()
        for call in self.calls:
            call.leg.hang_up()


@contextlib.asynccontextmanager
async def desks(*lines):
    made = [Desk(near) for near in lines]
    try:
        yield made
    finally:
        for desk in made:
            desk.stop()
        await asyncio.sleep(0.3)


@contextlib.contextmanager
def caller(address: str, source: str = "127.0.0.1") -> Iterator[RawPeer]:
    peer = RawPeer(address, source)
    peer.socket.settimeout(12)
    try:
        yield peer
    finally:
        peer.close()


async def final_of(peer: RawPeer) -> str:
    peer.invite()
    answer = await asyncio.to_thread(peer.final)
    record_route = header(answer, "Record-Route")
    peer.request_uri = header(answer, "Contact").partition("<")[2].partition(">")[0] or peer.request_uri
    peer.request("ACK", to_tag=to_tag(answer), headers=f"Route: {record_route}\r\n" if record_route else "")
    return answer


async def test_callers_hear_503_only_when_all_workers_are_full(tmp_path):
    async with line(**PROXIED) as first, line(**PROXIED) as second:
        with proxy(tmp_path, first.address, second.address) as kam:
            async with desks(first, second) as (one, two):
                with contextlib.ExitStack() as stack:
                    peers = [stack.enter_context(caller(kam.address, f"127.0.0.{n}")) for n in (1, 2, 3)]
                    answers = [(await final_of(peer)) for peer in peers]
                    assert [answer.split()[1] for answer in answers] == ["200", "200", "503"]
                    assert int(header(answers[2], "Retry-After")) > 0
                    await until(lambda: one.is_talking and two.is_talking)
                    sources = {desk.calls[0].incoming.source_address.split(":")[0] for desk in (one, two)}
                    assert sources == {"127.0.0.1", "127.0.0.2"}  # not the proxy's


@contextlib.asynccontextmanager
async def failing_worker(how: str):
    """The address of a worker that cannot take calls."""
    if how == "has no agent":  # a real worker: it says 503
        async with line(**PROXIED) as lonely:
            await lonely.client.close()
            yield lonely.address
    else:
        with stub_worker(is_busy=how == "says 486") as address:
            yield address


@pytest.mark.parametrize("how", ["says 486", "has no agent", "says nothing"])
async def test_a_worker_that_cannot_is_left_for_the_next(how, tmp_path):
    async with failing_worker(how) as address, line(**PROXIED) as good:
        with proxy(tmp_path, address, good.address) as kam:
            async with desks(good) as (desk,):
                for number in range(2):  # in turn, so one of the two meets the failing one first
                    with caller(kam.address) as peer:
                        assert (await final_of(peer)).startswith("SIP/2.0 200")
                        await until(lambda: desk.is_talking and len(desk.calls) == number + 1)  # noqa: B023
                        desk.calls[-1].leg.hang_up()
                        peer.respond(await asyncio.to_thread(peer.receive, "BYE"), "200 OK")
                        await desk.calls[-1].until(LegDisconnected)


@contextlib.contextmanager
def stub_worker(is_busy: bool) -> Iterator[str]:
    """A worker's place: says 486 to every INVITE and 200 to OPTIONS, or nothing at all."""
    peer = RawPeer("127.0.0.1:9")
    address = f"127.0.0.1:{peer.port}"

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        peer.socket.setblocking(False)
        while True:
            data, source = await loop.sock_recvfrom(peer.socket, 65536)
            request = data.decode()
            peer.target = source
            if is_busy and request.startswith("OPTIONS"):
                peer.respond(request, "200 OK")
            elif is_busy and request.startswith("INVITE"):
                peer.respond(request, "486 Busy Here")

    task = asyncio.get_running_loop().create_task(serve())
    try:
        yield address
    finally:
        task.cancel()
        peer.close()


async def test_a_worker_killed_under_load_costs_its_own_calls_only(tmp_path):
    settings = PROXIED | {"max_calls": 3}
    async with line(**settings) as first, line(**settings) as second:
        with proxy(tmp_path, first.address, second.address) as kam:
            async with desks(first, second) as (one, two):
                options = ("-m", "10", "-l", "3", "-r", "2")
                with sipp(tmp_path, kam.address, 1500, "", options, timeout_s=80):
                    await until(lambda: one.is_talking and two.is_talking, 30)
                    os.kill(first.worker.pid, signal.SIGKILL)
                    at_kill = len(two.calls)
                    taken = len(one.calls)
                    await until(lambda: len(one.calls) + len(two.calls) >= 10, 60)
                    await until(lambda: len(two.calls[-1].of(LegDisconnected)) > 0, 30)
                assert (
                    len(one.calls) == taken and len(two.calls) == 10 - taken > at_kill
                )  # none was lost after the death
                over = [call for call in two.calls if call.of(LegDisconnected)]
                assert len(over) >= len(two.calls) - 1 and {call.of(LegDisconnected)[0].cause for call in over} == {
                    "normal"
                }


async def test_a_draining_worker_keeps_its_call_and_the_next_goes_elsewhere(tmp_path):
    async with line(**PROXIED) as first, line(**PROXIED) as second:
        with proxy(tmp_path, first.address, second.address) as kam:
            async with desks(first, second) as (one, two):
                with caller(kam.address) as peer, caller(kam.address) as later:
                    assert (await final_of(peer)).startswith("SIP/2.0 200")
                    await until(lambda: one.is_talking or two.is_talking)
                    busy, idle = (one, two) if one.is_talking else (two, one)
                    os.kill((first if busy is one else second).worker.pid, signal.SIGTERM)
                    await asyncio.sleep(0.5)
                    assert (await final_of(later)).startswith("SIP/2.0 200")
                    await until(lambda: idle.is_talking)
                    assert busy.is_talking


async def test_strangers_get_nothing_from_the_proxy_either(tmp_path):
    (tmp_path / "dispatcher.list").write_text(f"1 sip:127.0.0.1:{free_port()}\n")
    options = ("-A", f'WORKERS="{tmp_path}/dispatcher.list"', "-A", 'SOURCES="127.0.0.1/32"')
    kam = Kamailio(tmp_path / "kamailio", DEPLOYED.read_text(), *options)
    try:
        with caller(kam.address, "127.0.0.66") as stranger:
            stranger.socket.settimeout(1.0)
            for method in ("OPTIONS", "REGISTER", "INVITE"):
                stranger.request(method)
            with pytest.raises(TimeoutError):
                await asyncio.to_thread(stranger.socket.recv, 4096)
    finally:
        kam.stop()
