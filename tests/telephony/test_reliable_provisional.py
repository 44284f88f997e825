"""Provisional answers that are acknowledged (RFC 3262: 100rel, PRACK), both ways; against a raw SIP peer."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

pytest.importorskip("pjsua2")

from agent.raw_sip_peer import RawPeer, header, to_tag  # noqa: E402
from telephony.client import WorkerClient  # noqa: E402
from telephony.config import TelephonyConfig  # noqa: E402
from telephony.leg import Answer, Hangup, LegDisconnected, LegState, LegStateChanged, Play, Progress  # noqa: E402
from telephony.process import WorkerProcess  # noqa: E402
from tests.telephony.call_control import RATE, loud, packets, ringing  # noqa: E402

REQUIRED = "Require: 100rel\r\n"


@pytest.fixture(scope="module")
def worker():
    with WorkerProcess(TelephonyConfig(sip_port=0)) as running:
        yield running


async def provisional(call, status):
    return await asyncio.to_thread(call.peer.receive, f"SIP/2.0 {status}")


async def comes_again(call, status, within_s=1.2):
    """Sent again after T1 = 0.5 s where it is reliable and nobody has acknowledged it."""
    call.peer.socket.settimeout(within_s)
    with contextlib.suppress(TimeoutError):
        return bool(await provisional(call, status))
    call.peer.socket.settimeout(6)
    return False


async def prack(call, answer):
    call.cseq += 1
    call.peer.request("PRACK", call.cseq, to_tag(answer), headers=f"RAck: {header(answer, 'RSeq')} 1 INVITE\r\n")
    return await asyncio.to_thread(call.peer.receive, "SIP/2.0 200")


async def test_caller_who_requires_it_gets_ringing_again_and_again_until_the_prack(worker):
    async with ringing(worker, headers=REQUIRED) as call:
        rings = await provisional(call, 180)
        assert header(rings, "Require") == "100rel" and int(header(rings, "RSeq")) > 0
        assert await comes_again(call, 180)
        assert header(await prack(call, rings), "CSeq") == f"{call.cseq} PRACK"
        assert not await comes_again(call, 180)
        await call.answer()
        assert not call.of(LegDisconnected)


async def test_caller_who_requires_it_hears_early_media_and_the_answer_waits_for_the_prack(worker, tone):
    """RFC 3262 §5: our SDP stands in the 183, so the 200 must not overtake its acknowledgement."""
    async with ringing(worker, headers=REQUIRED) as call:
        rings = await provisional(call, 180)
        await prack(call, rings)
        await call.leg.send(Progress(leg_id=call.leg.leg_id))
        early = await provisional(call, 183)
        assert "m=audio" in early and int(header(early, "RSeq")) == int(header(rings, "RSeq")) + 1
        play = Play(leg_id=call.leg.leg_id, item_id="n", pcm=tone(2.0), sample_rate_hz=RATE, is_final=True)
        await call.leg.send(play)
        assert [packet for packet in await asyncio.to_thread(packets, call.peer, 1.0) if loud(packet)]
        await call.leg.send(Answer(leg_id=call.leg.leg_id))
        assert not await comes_again(call, 200, 0.4)
        call.cseq += 1
        rack = f"RAck: {header(early, 'RSeq')} 1 INVITE\r\n"
        call.peer.request("PRACK", call.cseq, to_tag(early), headers=rack)
        answers = {header(await asyncio.to_thread(call.peer.final), "CSeq") for _ in range(2)}
        assert answers == {"1 INVITE", f"{call.cseq} PRACK"}
        call.tag = to_tag(early)
        call.peer.request("ACK", to_tag=call.tag)
        await call.until(LegStateChanged, state=LegState.CONFIRMED)


async def test_answer_does_not_wait_for_the_prack_of_a_ringing_without_sdp(worker):
    async with ringing(worker, headers=REQUIRED) as call:
        await provisional(call, 180)
        await asyncio.wait_for(call.answer(), 10.0)


async def test_caller_who_only_supports_it_is_served_without(worker):
    async with ringing(worker, headers="Supported: 100rel\r\n") as call:
        rings = await provisional(call, 180)
        assert not header(rings, "Require") and not header(rings, "RSeq")
        await call.answer()


@pytest.mark.parametrize("rack", ["", "RAck: x\r\n", "RAck: 1 1\r\n", "RAck: {rseq} 1 INVITE\r\nRAck: 9 1 INVITE\r\n"])
async def test_prack_that_does_not_say_what_it_acknowledges_gets_400_and_the_call_goes_on(worker, rack):
    async with ringing(worker, headers=REQUIRED) as call:
        rings = await provisional(call, 180)
        call.tag = to_tag(rings)
        answer = await call.request("PRACK", headers=rack.format(rseq=header(rings, "RSeq")))
        assert answer.startswith("SIP/2.0 400")
        await prack(call, rings)
        await call.answer()


@contextlib.asynccontextmanager
async def called(worker):
    """(called party, our INVITE to it, our leg, its events)."""
    client, peer, events = await WorkerClient.connect(worker.socket_path), RawPeer(worker.address), []
    peer.socket.settimeout(2)
    leg = await client.place_call(f"sip:desk@127.0.0.1:{peer.port}")

    async def collect():
        async for event in leg.events():
            events.append(event)

    task = asyncio.create_task(collect())
    try:
        yield peer, await asyncio.to_thread(peer.receive, "INVITE"), leg, events
        await leg.send(Hangup(leg_id=leg.leg_id))
        peer.respond(await asyncio.to_thread(peer.receive, "BYE"), "200 OK")
        await asyncio.wait_for(task, 5)
    finally:
        peer.close()
        await client.close()
    assert isinstance(events[-1], LegDisconnected) and events[-1].cause == "normal"


def new_prack(peer, seen):
    """Not one that comes again because our answer to it was late."""
    while (number := header(request := peer.receive("PRACK"), "CSeq")) in seen:
        pass
    seen.add(number)
    return request


async def test_called_party_who_rings_reliably_gets_one_prack_for_each_answer_and_none_for_one_sent_again(worker):
    async with called(worker) as (peer, invite, leg, events):
        assert "100rel" in header(invite, "Supported")
        number, seen = header(invite, "CSeq").split()[0], set()
        for status, rseq in (("180 Ringing", 77), ("183 Session Progress", 78)):
            for _ in range(2):
                peer.respond(invite, status, headers=f"{REQUIRED}RSeq: {rseq}\r\n")
            request = await asyncio.to_thread(new_prack, peer, seen)
            assert header(request, "RAck") == f"{rseq} {number} INVITE"
            peer.respond(request, "200 OK")
            with pytest.raises(TimeoutError):
                await asyncio.to_thread(new_prack, peer, seen)
        peer.respond(invite, "200 OK", peer.sdp())
        await asyncio.to_thread(peer.receive, "ACK")
        states = [event.state for event in events if isinstance(event, LegStateChanged)]
        assert states.count(LegState.EARLY) == 1 and leg.state is not LegState.DISCONNECTED


async def test_called_party_whose_sdp_came_in_a_reliable_183_need_not_say_it_again(worker, tone):
    """RFC 3262 §5: the offer was answered there; the 200 has no body."""
    async with called(worker) as (peer, invite, leg, _):
        peer.respond(invite, "183 Session Progress", peer.sdp(), f"{REQUIRED}RSeq: 5\r\n")
        request = await asyncio.to_thread(peer.receive, "PRACK")
        assert "m=audio" not in request
        peer.respond(request, "200 OK")
        peer.respond(invite, "200 OK")
        await asyncio.to_thread(peer.receive, "ACK")
        play = Play(leg_id=leg.leg_id, item_id="n", pcm=tone(2.0), sample_rate_hz=RATE, is_final=True)
        await leg.send(play)
        assert [packet for packet in await asyncio.to_thread(packets, peer, 1.0) if loud(packet)]
