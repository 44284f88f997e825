"""The RTP ports of a worker stay within the documented range, however many calls there were."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re

import pytest

pytest.importorskip("pjsua2")

from agent.raw_sip_peer import RawPeer, to_tag  # noqa: E402
from telephony.config import TelephonyConfig  # noqa: E402
from telephony.leg import Reject  # noqa: E402
from tests.live.lines_peers import free_port, line  # noqa: E402

MAX_CALLS = 2
NUM_PORTS = 2 * (MAX_CALLS + 1)


def free_range():
    """The first of some ports that nobody is given who asks for any."""
    return random.randrange(10_000, 19_000, 2)


@contextlib.contextmanager
def caller(address):
    peer = RawPeer(address)
    try:
        peer.invite()
        yield peer
    finally:
        peer.close()


def rtp_port_of(answer):
    return int(re.search(r"^m=audio (\d+) ", answer, re.MULTILINE).group(1))


async def answered(near, peer):
    """(the call, its RTP port)"""
    call = await near.next_call()
    ok = await asyncio.to_thread(peer.final)
    peer.request("ACK", to_tag=to_tag(ok))
    await call.confirmed()
    return call, rtp_port_of(ok)


async def test_fourteen_calls_some_of_them_refused_stay_inside_the_range():
    first = free_range()
    ports = []
    async with line(rtp_port_first=first, max_calls=MAX_CALLS) as near:
        for number in range(14):
            with caller(near.address) as peer:
                if number % 3 == 2:
                    call = await near.next_call(is_answered=False)
                    await call.leg.send(Reject(leg_id=call.leg.leg_id, sip_status=486))
                    assert (await asyncio.to_thread(peer.final)).startswith("SIP/2.0 486")
                else:
                    call, port = await answered(near, peer)
                    ports.append(port)
                    call.leg.hang_up()
                    peer.respond(await asyncio.to_thread(peer.receive, "BYE"), "200 OK")
                await call.ended()
    assert len(ports) == 10
    assert all(first <= port < first + NUM_PORTS - 1 and port % 2 == 0 for port in ports), (first, ports)


async def test_workers_of_a_pool_that_are_full_share_no_port():
    pool = TelephonyConfig(
        sip_port=free_port(), max_calls=MAX_CALLS, pool_calls=2 * MAX_CALLS, rtp_port_first=free_range()
    )
    ports = {}
    async with contextlib.AsyncExitStack() as stack:
        for index in range(2):
            own = pool.of_worker(index)
            near = await stack.enter_async_context(
                line(sip_port=0, max_calls=own.max_calls, rtp_port_first=own.rtp_port_first)
            )
            ports[index] = []
            for _ in range(MAX_CALLS + 1):  # the last by way of a call that has ended
                peer = stack.enter_context(caller(near.address))
                call, port = await answered(near, peer)
                ports[index].append(port)
                if len(ports[index]) == 1:
                    call.leg.hang_up()
                    peer.respond(await asyncio.to_thread(peer.receive, "BYE"), "200 OK")
                    await call.ended()
    ranges = [range(pool.of_worker(index).rtp_port_first, pool.of_worker(index + 1).rtp_port_first) for index in (0, 1)]
    assert all(port in ranges[index] and port + 1 in ranges[index] for index in ports for port in ports[index])
    assert not set(ports[0]) & set(ports[1])


def test_workers_of_a_pool_have_ports_of_their_own_and_one_registers():
    pool = TelephonyConfig(sip_port=5070, pool_calls=9, rtp_port_first=40000)
    workers = [pool.of_worker(index) for index in range(3)]
    assert [worker.sip_port for worker in workers] == [5070, 5071, 5072]
    assert [worker.rtp_port_first for worker in workers] == [40000, 40008, 40016]
    assert [worker.tls_port for worker in workers] == [5061, 5062, 5063]
    assert [worker.is_registrar for worker in workers] == [True, False, False]
    assert TelephonyConfig().of_worker(1).rtp_port_first == 0


@pytest.mark.parametrize(("first", "max_calls"), [(40001, 3), (64600, 500)])
def test_range_that_is_odd_or_does_not_fit_is_refused(first, max_calls):
    with pytest.raises(ValueError, match=rf"telephony\.rtp_port_first = {first}: must be 0, or even with \d+ ports"):
        TelephonyConfig(rtp_port_first=first, max_calls=max_calls)
