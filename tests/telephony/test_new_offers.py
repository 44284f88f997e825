"""What carriers offer in the middle of a call (RFC 3264 §8): hold the old way and by UPDATE, another codec at another
port, and nothing at all."""

from __future__ import annotations

import asyncio
import socket

import pytest

pytest.importorskip("pjsua2")

from agent.raw_sip_peer import PCMU  # noqa: E402
from telephony.client import WorkerClient  # noqa: E402
from telephony.config import TelephonyConfig  # noqa: E402
from telephony.leg import HoldChanged, LegDisconnected, Play  # noqa: E402
from telephony.process import WorkerProcess  # noqa: E402
from tests.telephony.call_control import RATE, direction, loud, packets, ringing, send_rtp  # noqa: E402

PCMA = ("8 101", "a=rtpmap:8 PCMA/8000\r\na=rtpmap:101 telephone-event/8000\r\n")


@pytest.fixture(scope="module")
def worker():
    with WorkerProcess(TelephonyConfig(sip_port=0, rtp_timeout_s=1.0)) as running:
        yield running


def holds(call):
    return [(event.is_held, event.by) for event in call.of(HoldChanged)]


async def test_hold_by_an_address_of_zeros_is_hold(worker):
    """RFC 2543's way, which RFC 3264 §8.4 still asks us to understand."""
    async with ringing(worker) as call:
        await call.answer()
        held = await call.request("INVITE", call.peer.sdp().replace("c=IN IP4 127.0.0.1", "c=IN IP4 0.0.0.0"))
        assert held.startswith("SIP/2.0 200")
        await call.until(HoldChanged, is_held=True)
        await asyncio.sleep(1.7)  # rtp_timeout_s is 1.0
        assert holds(call) == [(True, "caller")] and not call.of(LegDisconnected)
        await call.request("INVITE", call.peer.sdp())
        await call.until(HoldChanged, is_held=False)
        assert [packet for packet in await asyncio.to_thread(packets, call.peer, 0.5) if len(packet) == 172]


async def test_hold_by_update_is_hold(worker):
    """RFC 3311: an offer without a re-INVITE."""
    async with ringing(worker) as call:
        await call.answer()
        held = await call.request("UPDATE", call.peer.sdp((PCMU[0], PCMU[1] + "a=sendonly\r\n")))
        assert held.startswith("SIP/2.0 200") and direction(held) == "recvonly"
        await call.until(HoldChanged, is_held=True)
        back = await call.request("UPDATE", call.peer.sdp())
        assert direction(back) == "sendrecv"
        await call.until(HoldChanged, is_held=False)
        assert holds(call) == [(True, "caller"), (False, "caller")]


async def test_audio_follows_a_new_codec_and_port_both_ways(worker, tone):
    async with ringing(worker) as call:
        await call.answer()
        before, call.peer.media = call.peer.media, socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        call.peer.media.bind(("127.0.0.1", 0))
        moved = await call.request("INVITE", call.peer.sdp(PCMA))
        assert "PCMA/8000" in moved and "PCMU/8000" not in moved
        play = Play(leg_id=call.leg.leg_id, item_id="s", pcm=tone(3.0), sample_rate_hz=RATE, is_final=True)
        await call.leg.send(play)
        got = await asyncio.to_thread(packets, call.peer, 1.0)
        assert len(got) > 25 and {packet[1] & 0x7F for packet in got} == {8}
        before.close()
        assert not call.of(HoldChanged) and not call.of(LegDisconnected)


async def test_invite_without_an_offer_in_the_call_gets_ours_and_the_call_goes_on(worker, tone):
    """RFC 3261 §14.2: the answer comes in the ACK, as third-party call control sends it (RFC 3725)."""
    async with ringing(worker) as call:
        ok = await call.answer()
        call.cseq += 1
        call.peer.request("INVITE", call.cseq, call.tag)
        offer = await asyncio.to_thread(call.peer.final)
        assert offer.startswith("SIP/2.0 200") and "m=audio" in offer and direction(offer) == "sendrecv"
        call.peer.request("ACK", call.cseq, call.tag, call.peer.sdp())
        play = Play(leg_id=call.leg.leg_id, item_id="s", pcm=tone(3.0), sample_rate_hz=RATE, is_final=True)
        await call.leg.send(play)
        await send_rtp(call, ok, bytes(RATE))
        assert [packet for packet in await asyncio.to_thread(packets, call.peer, 1.0) if loud(packet)]
        assert not call.of(LegDisconnected) and not call.of(HoldChanged)


async def test_next_agent_of_a_call_is_told_that_it_is_on_hold(worker):
    async with ringing(worker) as call:
        await call.answer()
        await call.request("INVITE", call.peer.sdp((PCMU[0], PCMU[1] + "a=inactive\r\n")))
        await call.until(HoldChanged, is_held=True)
        await call.client.close()  # to the worker: the agent has died
        call.client = await WorkerClient.connect(worker.socket_path)
        leg = await asyncio.wait_for(anext(call.client.legs()), 6)
        assert leg.is_resumed
        async with asyncio.timeout(6):
            async for event in leg.events():
                if isinstance(event, HoldChanged):
                    break
        assert (event.is_held, event.by) == (True, "caller")
        await call.request("BYE")
        async for event in leg.events():
            call.events.append(event)
        await call.client.close()
