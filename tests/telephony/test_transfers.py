"""Transfers: targets verbatim, what became of them, bridged where a REFER is refused, a person called and joined.
Against raw SIP peers on loopback; users.md L7, J1, J2, J3."""

from __future__ import annotations

import asyncio
import contextlib
import re

import pytest

pytest.importorskip("pjsua2")

from agent.raw_sip_peer import RawPeer, header  # noqa: E402
from telephony.client import CallRefused  # noqa: E402
from telephony.config import TelephonyConfig  # noqa: E402
from telephony.dtmf import DtmfDetector  # noqa: E402
from telephony.leg import (  # noqa: E402
    DtmfReceived,
    Hangup,
    LegDisconnected,
    LegState,
    Play,
    Refer,
    ReferResult,
)
from telephony.process import WorkerProcess  # noqa: E402
from telephony.trunk_config import TrunkConfig  # noqa: E402
from tests.telephony.call_control import (  # noqa: E402
    RATE,
    WITHOUT_EVENTS,
    events_in,
    key_event,
    loud,
    mu_law_to_pcm,
    packets,
    ringing,
    send_rtp,
)


@pytest.fixture(scope="module")
def worker():
    with WorkerProcess(TelephonyConfig(sip_port=0, rtp_timeout_s=1.5, health_after_s=1.0)) as running:
        yield running


# ------------------------------------------------------------------ transfer


@pytest.mark.parametrize("target", ["tel:+390212345", "sip:+390212345@pbx.example;user=phone", "sips:desk@pbx.example"])
async def test_J1_transfer_target_goes_out_verbatim(worker, target):
    """users.md J1: tel: must not become sip:."""
    async with ringing(worker) as call:
        await call.answer()
        await call.leg.send(Refer(leg_id=call.leg.leg_id, refer_to=target))
        refer = await asyncio.to_thread(call.peer.receive, "REFER")
        assert header(refer, "Refer-To") == f"<{target}>"
        call.peer.respond(refer, "603 Decline")


async def test_J2_caller_who_takes_the_refer_and_leaves_before_a_notify_is_told_as_gone_there(worker):
    """users.md J2: most carriers send BYE at once; whether the target answered is not known (RFC 5589 §6.1)."""
    async with ringing(worker) as call:
        await call.answer()
        await call.leg.send(Refer(leg_id=call.leg.leg_id, refer_to="sip:desk@pbx.example"))
        call.peer.respond(await asyncio.to_thread(call.peer.receive, "REFER"), "202 Accepted")
        await asyncio.sleep(0.3)
        call.peer.request("BYE", 50, call.tag)
        assert (await call.until(LegDisconnected)).by == "caller"
        assert [result.sip_status for result in call.of(ReferResult)] == [0]
        assert call.events.index(call.of(ReferResult)[0]) < call.events.index(call.of(LegDisconnected)[0])


async def test_caller_who_hangs_up_before_answering_the_refer_has_not_been_transferred(worker):
    async with ringing(worker) as call:
        await call.answer()
        await call.leg.send(Refer(leg_id=call.leg.leg_id, refer_to="sip:desk@pbx.example"))
        await asyncio.to_thread(call.peer.receive, "REFER")
        call.peer.request("BYE", 50, call.tag)
        await call.until(LegDisconnected)
        assert not call.of(ReferResult)


@pytest.fixture(scope="module")
def bridging_worker():
    with WorkerProcess(TelephonyConfig(sip_port=0, bridges_refused_transfers=True)) as running:
        yield running


async def referred_and_refused(call, target):
    """The caller's side says no to REFER, so the target is called."""
    await call.leg.send(Refer(leg_id=call.leg.leg_id, refer_to=f"sip:desk@127.0.0.1:{target.port}"))
    call.peer.respond(await asyncio.to_thread(call.peer.receive, "REFER"), "603 Decline")
    return await asyncio.to_thread(target.receive, "INVITE")


async def test_L7_J3_refused_transfer_is_bridged_and_the_parties_stay_when_the_agent_leaves(bridging_worker, tone):
    """users.md L7, J3: cold transfer fails with 603."""
    target = RawPeer(bridging_worker.address)
    target.socket.settimeout(6)
    async with ringing(bridging_worker) as call:
        ok = await call.answer()
        invite = await referred_and_refused(call, target)
        assert header(invite, "From").startswith("<sip:raw@")  # the desk sees who calls
        target.respond(invite, "200 OK", target.sdp())
        await asyncio.to_thread(target.receive, "ACK")
        assert (await call.until(ReferResult)).sip_status == 200
        await call.leg.send(Hangup(leg_id=call.leg.leg_id, cause="transferred"))
        assert (await call.until(LegDisconnected)).cause == "transferred"
        heard = asyncio.create_task(asyncio.to_thread(packets, target, 2.0))
        await send_rtp(call, ok, tone(2.0))
        assert len([packet for packet in await heard if loud(packet)]) > 25  # the caller is heard at the desk
        bye = await asyncio.to_thread(bye_after_hangup, target, call, invite)
        assert bye.startswith("BYE")
        call.peer.respond(bye, "200 OK")
    target.close()


async def test_keys_cross_a_bridge_both_ways_however_they_came_in_and_once(bridging_worker):
    """What the caller presses reaches the desk's menu, and the other way round; the agent hears of none."""
    target = RawPeer(bridging_worker.address)
    target.socket.settimeout(6)
    async with ringing(bridging_worker) as call:
        ok = await call.answer()
        invite = await referred_and_refused(call, target)
        target.respond(invite, "200 OK", target.sdp())
        await asyncio.to_thread(target.receive, "ACK")
        await call.until(ReferResult)
        at_desk = asyncio.create_task(asyncio.to_thread(packets, target, 2.0))
        await call.request("INFO", "Signal=5\r\nDuration=160\r\n", "Content-Type: application/dtmf-relay\r\n")
        await asyncio.to_thread(key_event, call.peer, ok, 7, 1000)
        assert [key for _, key in events_in(await at_desk)] == [5, 7]
        await call.leg.send(Hangup(leg_id=call.leg.leg_id, cause="transferred"))
        await call.until(LegDisconnected)
        at_caller = asyncio.create_task(asyncio.to_thread(packets, call.peer, 1.5))
        await asyncio.to_thread(key_event, target, invite, 11, 2000)
        assert [key for _, key in events_in(await at_caller)] == [11]
        assert not call.of(DtmfReceived)
        call.peer.respond(await asyncio.to_thread(bye_after_hangup, target, call, invite), "200 OK")
    target.close()


async def test_keys_cross_a_bridge_as_tones_to_a_party_without_events(bridging_worker):
    target = RawPeer(bridging_worker.address)
    target.socket.settimeout(6)
    async with ringing(bridging_worker) as call:
        ok = await call.answer()
        invite = await referred_and_refused(call, target)
        target.respond(invite, "200 OK", target.sdp(WITHOUT_EVENTS))
        await asyncio.to_thread(target.receive, "ACK")
        await call.until(ReferResult)
        await call.leg.send(Hangup(leg_id=call.leg.leg_id, cause="transferred"))
        await call.until(LegDisconnected)
        at_desk = asyncio.create_task(asyncio.to_thread(packets, target, 2.0))
        await asyncio.to_thread(key_event, call.peer, ok, 9, 1000)
        sound = b"".join(packet[12:] for packet in await at_desk)
        assert DtmfDetector(RATE).push(mu_law_to_pcm(sound).tobytes()) == "9"
        call.peer.respond(await asyncio.to_thread(bye_after_hangup, target, call, invite), "200 OK")
    target.close()


def bye_after_hangup(target, call, invite):
    """The desk hangs up; the caller's BYE."""
    own_tag = re.search(r"tag=([^;\s]+)", header(invite, "From")).group(1)
    target.call_id = header(invite, "Call-ID")
    target.request_uri = header(invite, "Contact").partition("<")[2].partition(">")[0]
    target.request("BYE", 5, own_tag)
    return call.peer.receive("BYE")


@contextlib.contextmanager
def carrier_worker(*peers, **trunk):
    """A worker whose trunk's hosts are these raw peers."""
    hosts = tuple(f"127.0.0.1:{peer.port}" for peer in peers)
    carrier = TrunkConfig(
        name="carrier", hosts=hosts, sources=("127.0.0.9/32",), domain="carrier.example", caller_id="+390299", **trunk
    )  # fmt: skip
    config = TelephonyConfig(
        sip_port=0, bridges_refused_transfers=True, trunks=(carrier,), allowed_sources=("127.0.0.1/32",)
    )
    with WorkerProcess(config) as running:
        for peer in peers:
            host, port = running.address.split(":")
            peer.target = (host, int(port))
            peer.socket.settimeout(6)
        yield running


@pytest.fixture
def two_hosts():
    peers = RawPeer("127.0.0.1:9"), RawPeer("127.0.0.1:9")
    yield peers
    for peer in peers:
        peer.close()


async def referred_to_a_number(call):
    await call.leg.send(Refer(leg_id=call.leg.leg_id, refer_to="tel:+390212345"))
    call.peer.respond(await asyncio.to_thread(call.peer.receive, "REFER"), "603 Decline")


async def test_bridged_transfer_goes_on_to_the_next_host_and_shows_our_number_and_the_callers(two_hosts):
    """RFC 3263 §4.3, RFC 3325, RFC 5806."""
    first, second = two_hosts
    with carrier_worker(first, second, is_identity_trusted=True) as worker:
        async with ringing(worker) as call:
            await call.answer()
            await referred_to_a_number(call)
            first.respond(await asyncio.to_thread(first.receive, "INVITE"), "503 Service Unavailable")
            invite = await asyncio.to_thread(second.receive, "INVITE")
            assert invite.startswith("INVITE sip:+390212345@")
            assert header(invite, "From").startswith("<sip:+390299@carrier.example>")
            assert header(invite, "P-Asserted-Identity") == "<sip:raw@carrier.example>"
            assert header(invite, "Diversion") == "<sip:100@carrier.example>;reason=unconditional"
            second.respond(invite, "200 OK", second.sdp())
            assert await asyncio.to_thread(second.receive, "ACK")
            assert (await call.until(ReferResult)).reason == "bridged"


async def test_bridged_transfer_passes_over_a_host_that_says_nothing(two_hosts):
    silent, second = two_hosts
    with carrier_worker(silent, second, failover_s=1.0, transfer_from="caller") as worker:
        async with ringing(worker) as call:
            await call.answer()
            await referred_to_a_number(call)
            invite = await asyncio.to_thread(second.receive, "INVITE")
            assert header(invite, "From").startswith("<sip:raw@carrier.example>")
            second.respond(invite, "486 Busy Here")
            assert (await call.until(ReferResult)).sip_status == 486
            assert not call.of(LegDisconnected)


async def test_target_that_refuses_too_leaves_the_call_as_it_was(bridging_worker):
    target = RawPeer(bridging_worker.address)
    target.socket.settimeout(6)
    async with ringing(bridging_worker) as call:
        await call.answer()
        invite = await referred_and_refused(call, target)
        target.respond(invite, "486 Busy Here")
        assert (await call.until(ReferResult)).sip_status == 486
        assert not call.of(LegDisconnected)
    target.close()


async def test_target_that_is_not_configured_is_not_called(bridging_worker):
    async with ringing(bridging_worker) as call:
        await call.answer()
        await call.leg.send(Refer(leg_id=call.leg.leg_id, refer_to="sip:desk@192.0.2.1"))
        call.peer.respond(await asyncio.to_thread(call.peer.receive, "REFER"), "603 Decline")
        assert (await call.until(ReferResult)).sip_status == 603
        assert not call.of(LegDisconnected)


@contextlib.asynccontextmanager
async def person_called(worker, call):
    """The agent has called somebody on a second leg: (leg, raw peer, its INVITE, events of that leg)."""
    peer = RawPeer(worker.address)
    peer.socket.settimeout(6)
    leg = await call.client.place_call(f"sip:desk@127.0.0.1:{peer.port}", from_user="raw")
    events = []

    async def collect():
        async for event in leg.events():
            events.append(event)

    task = asyncio.create_task(collect())
    invite = await asyncio.to_thread(peer.receive, "INVITE")
    peer.respond(invite, "200 OK", peer.sdp())
    await asyncio.to_thread(peer.receive, "ACK")
    async with asyncio.timeout(5):
        while leg.state is not LegState.CONFIRMED:  # noqa: ASYNC110 - the worker changes it
            await asyncio.sleep(0.02)
    try:
        yield leg, peer, invite, events
    finally:
        leg.hang_up()
        peer.close()
        task.cancel()


async def test_person_who_was_called_is_joined_with_the_caller_and_nothing_queued_follows(bridging_worker, tone):
    """Warm hand-off: the agent connects two legs of its own and leaves both."""
    async with ringing(bridging_worker) as call:
        ok = await call.answer()
        async with person_called(bridging_worker, call) as (leg, desk, invite, events):
            await leg.send(Play(leg_id=leg.leg_id, item_id="s", pcm=tone(20.0), sample_rate_hz=RATE, is_final=True))
            assert [packet for packet in await asyncio.to_thread(packets, desk, 0.5) if loud(packet)]
            call.leg.join(leg)
            assert (await call.until(ReferResult)).reason == "joined"
            await asyncio.to_thread(packets, desk, 0.3)  # what was on its way
            assert not [packet for packet in await asyncio.to_thread(packets, desk, 0.5) if loud(packet)]
            assert events[-1].cause == "transferred" and leg.state is LegState.DISCONNECTED
            await call.leg.send(Hangup(leg_id=call.leg.leg_id, cause="transferred"))
            assert (await call.until(LegDisconnected)).cause == "transferred"
            heard = asyncio.create_task(asyncio.to_thread(packets, desk, 2.0))
            await send_rtp(call, ok, tone(2.0))
            assert len([packet for packet in await heard if loud(packet)]) > 25
            call.peer.respond(await asyncio.to_thread(bye_after_hangup, desk, call, invite), "200 OK")


async def test_caller_who_hangs_up_when_joined_ends_the_persons_leg_too(worker):
    async with ringing(worker) as call:
        await call.answer()
        async with person_called(worker, call) as (leg, desk, _, _):
            call.leg.join(leg)
            await call.until(ReferResult)
            call.peer.request("BYE", 50, call.tag)
            assert await asyncio.to_thread(desk.receive, "BYE")


async def test_leg_that_is_gone_cannot_be_joined_and_the_call_goes_on(worker):
    async with ringing(worker) as call:
        await call.answer()
        async with person_called(worker, call) as (leg, desk, _, _):
            leg.hang_up()
            await asyncio.to_thread(desk.receive, "BYE")
            call.leg.join(leg)
            assert (await call.until(ReferResult)).sip_status == 400
            assert not call.of(LegDisconnected)


async def test_second_leg_is_counted_before_it_starts():
    """A worker that is full places no call, and says so before anything is sent."""
    with await asyncio.to_thread(WorkerProcess, TelephonyConfig(sip_port=0, max_calls=1)) as full:
        async with ringing(full) as call:
            await call.answer()
            assert call.client.num_free == 0
            with pytest.raises(CallRefused, match="in use"):
                await call.client.place_call("sip:desk@127.0.0.1:9")
