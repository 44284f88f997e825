"""What a call goes through between answer and BYE: hold both ways, session timers, UPDATE, keys in three ways, early
media, transfer targets verbatim. Against a raw SIP peer on loopback; users.md L9, L10, P6, J1, J10."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time

import numpy as np
import pytest

pytest.importorskip("pjsua2")

from agent.raw_sip_peer import PCMU, RawPeer, header, to_tag  # noqa: E402
from telephony.client import CallRefused, WorkerClient  # noqa: E402
from telephony.config import TelephonyConfig  # noqa: E402
from telephony.dtmf import DtmfDetector, tones  # noqa: E402
from telephony.leg import (  # noqa: E402
    Answer,
    DtmfReceived,
    Hangup,
    Hold,
    HoldChanged,
    LegDisconnected,
    LegState,
    LegStateChanged,
    MediaHealth,
    Play,
    PlayoutProgress,
    Progress,
    Refer,
    ReferResult,
    Unhold,
)
from telephony.process import WorkerProcess  # noqa: E402
from telephony.trunk_config import TrunkConfig  # noqa: E402

RATE = 8000
WITHOUT_EVENTS = ("0", "a=rtpmap:0 PCMU/8000\r\n")


@pytest.fixture(scope="module")
def worker():
    with WorkerProcess(TelephonyConfig(sip_port=0, rtp_timeout_s=1.5, health_after_s=1.0)) as running:
        yield running


class Call:
    """A raw peer's call and the agent's side of it."""

    def __init__(self, worker, client):
        self.client, self.events, self.leg = client, [], None
        self.peer = RawPeer(worker.address)
        self.peer.socket.settimeout(6)
        self.cseq = 10
        self.tag = ""

    async def ring(self, formats=PCMU, headers=""):
        self.peer.invite(formats, headers)
        self.leg = await asyncio.wait_for(anext(self.client.legs()), 6)
        self.task = asyncio.create_task(self._collect())

    async def _collect(self):
        async for event in self.leg.events():
            self.events.append(event)

    async def answer(self):
        await self.leg.send(Answer(leg_id=self.leg.leg_id))
        ok = await asyncio.to_thread(self.peer.final)
        self.tag = to_tag(ok)
        self.peer.request("ACK", to_tag=self.tag)
        await self.until(LegStateChanged, state=LegState.CONFIRMED)
        return ok

    async def request(self, method, body="", headers=""):
        """In the dialog: the final answer."""
        self.cseq += 1
        self.peer.request(method, self.cseq, self.tag, body, headers)
        answer = await asyncio.to_thread(self.peer.final)
        if method == "INVITE":
            self.peer.request("ACK", self.cseq, self.tag)
        return answer

    def of(self, kind):
        return [event for event in self.events if isinstance(event, kind)]

    async def until(self, kind, limit_s=8.0, **fields):
        async with asyncio.timeout(limit_s):
            while True:
                for event in self.of(kind):
                    if all(getattr(event, name) == value for name, value in fields.items()):
                        return event
                await asyncio.sleep(0.01)

    async def reinvite_of_ours(self):
        """Our re-INVITE, answered with the direction that follows from it (RFC 3264 §6.1)."""
        request = await asyncio.to_thread(self.peer.receive, "INVITE")
        offered = direction(request)
        answered = {"sendonly": "recvonly", "sendrecv": "sendrecv"}[offered]
        self.peer.respond(request, "200 OK", self.peer.sdp((PCMU[0], PCMU[1] + f"a={answered}\r\n")))
        await asyncio.to_thread(self.peer.receive, "ACK")
        return offered

    def close(self):
        self.peer.request("BYE", 99, self.tag)
        self.peer.close()


@contextlib.asynccontextmanager
async def ringing(worker, formats=PCMU, headers=""):
    client = await WorkerClient.connect(worker.socket_path)
    call = Call(worker, client)
    try:
        await call.ring(formats, headers)
        yield call
    finally:
        call.close()
        with contextlib.suppress(TimeoutError):
            await call.until(LegDisconnected, 4)
        await client.close()


def direction(message):
    found = re.findall(r"^a=(sendrecv|sendonly|recvonly|inactive)", message, re.MULTILINE)
    return found[-1] if found else "sendrecv"


def packets(peer, for_s):
    """RTP the peer gets within this time."""
    got, until_s = [], time.monotonic() + for_s
    peer.media.settimeout(0.1)
    while time.monotonic() < until_s:
        with contextlib.suppress(TimeoutError):
            got.append(peer.media.recv(2048))
    return got


def mu_law_to_pcm(payload):
    """From the definition of G.711: inverted, sign, three bits of exponent, four of mantissa."""
    value = ~np.frombuffer(payload, np.uint8).astype(int) & 0xFF
    magnitude = (((value & 0x0F) << 3) + 132 << ((value >> 4) & 7)) - 132
    return np.where(value & 0x80, -magnitude, magnitude).astype("<i2")


def pcm_to_mu_law(pcm):
    samples = np.frombuffer(pcm, "<i2").astype(int)
    magnitude = np.minimum(np.abs(samples), 32635) + 132
    exponent = np.floor(np.log2(magnitude)).astype(int) - 7
    return (
        (~((samples < 0) * 0x80 | exponent << 4 | (magnitude >> (exponent + 3)) & 0x0F) & 0xFF)
        .astype(np.uint8)
        .tobytes()
    )


async def send_rtp(call, ok, pcm):
    port = int(next(line for line in ok.splitlines() if line.startswith("m=audio")).split()[1])
    payload = pcm_to_mu_law(pcm)
    for number in range(len(payload) // 160):
        head = b"\x80\x00" + number.to_bytes(2, "big") + (160 * number).to_bytes(4, "big") + b"\0\0\0\1"
        call.peer.media.sendto(head + payload[160 * number : 160 * number + 160], ("127.0.0.1", port))
        await asyncio.sleep(0.02)


# ---------------------------------------------------------------------- hold


@pytest.mark.parametrize(
    ("offered", "answered", "is_held"),
    [("sendonly", "recvonly", True), ("inactive", "inactive", True), ("recvonly", "sendonly", False)],
)
async def test_hold_by_the_party_is_answered_as_rfc_3264_says_and_never_times_out(worker, offered, answered, is_held):
    async with ringing(worker) as call:
        await call.answer()
        held = await call.request("INVITE", call.peer.sdp((PCMU[0], PCMU[1] + f"a={offered}\r\n")))
        assert held.startswith("SIP/2.0 200") and direction(held) == answered
        if is_held:
            assert (await call.until(HoldChanged, is_held=True)).by == "caller"
        await asyncio.sleep(2.2)  # rtp_timeout_s is 1.5
        assert not call.of(LegDisconnected)
        back = await call.request("INVITE", call.peer.sdp())
        assert direction(back) == "sendrecv"
        if is_held:
            await call.until(HoldChanged, is_held=False)


async def test_hold_by_us_is_a_reinvite_and_is_taken_back(worker):
    async with ringing(worker) as call:
        await call.answer()
        await call.leg.send(Hold(leg_id=call.leg.leg_id))
        assert await call.reinvite_of_ours() == "sendonly"
        assert (await call.until(HoldChanged, is_held=True)).by == "agent"
        await call.leg.send(Unhold(leg_id=call.leg.leg_id))
        assert await call.reinvite_of_ours() == "sendrecv"
        await call.until(HoldChanged, is_held=False)


async def test_session_timer_is_agreed_and_update_refreshes_it(worker):
    """RFC 4028."""
    async with ringing(worker, headers="Supported: timer\r\nSession-Expires: 120;refresher=uac\r\n") as call:
        ok = await call.answer()
        assert header(ok, "Session-Expires").startswith("120")
        refreshed = await call.request("UPDATE", headers="Supported: timer\r\nSession-Expires: 120;refresher=uac\r\n")
        assert refreshed.startswith("SIP/2.0 200") and header(refreshed, "Session-Expires").startswith("120")


async def test_too_short_a_session_is_refused_with_what_is_allowed(worker):
    client = await WorkerClient.connect(worker.socket_path)
    peer = RawPeer(worker.address)
    peer.socket.settimeout(6)
    peer.invite(headers="Supported: timer\r\nSession-Expires: 20\r\n")
    answer = await asyncio.to_thread(peer.final)
    assert answer.startswith("SIP/2.0 422") and int(header(answer, "Min-SE")) >= 90
    peer.close()
    await client.close()


# ---------------------------------------------------------------------- keys


async def test_P6_keys_by_sip_info_arrive(worker):
    async with ringing(worker) as call:
        await call.answer()
        for body in ("Signal=5\r\nDuration=160\r\n", "Signal= #\r\nDuration= 100\r\n"):
            answer = await call.request("INFO", body, "Content-Type: application/dtmf-relay\r\n")
            assert answer.startswith("SIP/2.0 200")
        await call.until(DtmfReceived, digit="#")
        assert [event.digit for event in call.of(DtmfReceived)] == ["5", "#"]


async def test_trunk_says_that_its_keys_come_as_tones_although_events_were_negotiated():
    """Some carriers agree to telephone-event and send tones (users.md J10)."""
    trunk = TrunkConfig(name="tones", hosts=("127.0.0.1",), inband_dtmf="on")
    with WorkerProcess(TelephonyConfig(sip_port=0, trunks=(trunk,))) as worker:
        async with ringing(worker) as call:
            ok = await call.answer()
            await send_rtp(call, ok, bytes(4000) + tones("12#", RATE) + bytes(4000))
            await call.until(DtmfReceived, digit="#")
            assert "".join(event.digit for event in call.of(DtmfReceived)) == "12#"


async def test_J10_keys_as_tones_arrive_where_no_telephone_event_was_offered(worker):
    async with ringing(worker, WITHOUT_EVENTS) as call:
        ok = await call.answer()
        await send_rtp(call, ok, bytes(4000) + tones("12#", RATE) + bytes(4000))
        await call.until(DtmfReceived, digit="#")
        assert "".join(event.digit for event in call.of(DtmfReceived)) == "12#"


async def test_L16_keys_out_are_events_or_tones_as_the_party_can(worker):
    async with ringing(worker) as call:
        await call.answer()
        await call.leg.send_dtmf("7")
        events = {packet[12] for packet in await asyncio.to_thread(packets, call.peer, 1.0) if packet[1] & 0x7F == 101}
        assert events == {7}
    async with ringing(worker, WITHOUT_EVENTS) as call:
        await call.answer()
        await call.leg.send_dtmf("19")
        sound = b"".join(packet[12:] for packet in await asyncio.to_thread(packets, call.peer, 1.5))
        assert DtmfDetector(RATE).push(mu_law_to_pcm(sound).tobytes()) == "19"


async def test_keys_out_by_info_when_asked(worker):
    async with ringing(worker) as call:
        await call.answer()
        await call.leg.send_dtmf("3", method="info")
        info = await asyncio.to_thread(call.peer.receive, "INFO")
        assert header(info, "Content-Type") == "application/dtmf-relay" and "Signal=3" in info
        call.peer.respond(info, "200 OK")


# ---------------------------------------------------------- before the answer


async def test_early_media_is_heard_before_the_answer_and_goes_on_after_it(worker):
    async with ringing(worker) as call:
        voice = (np.sin(np.arange(4 * RATE) * 0.4) * 8000).astype("<i2").tobytes()
        leg_id = call.leg.leg_id
        await call.leg.send(Play(leg_id=leg_id, item_id="early", pcm=voice, sample_rate_hz=RATE, is_final=True))
        assert not [p for p in await asyncio.to_thread(packets, call.peer, 0.5) if loud(p)]  # 180 only: nothing yet
        await call.leg.send(Progress(leg_id=leg_id))
        progress = await asyncio.to_thread(call.peer.receive, "SIP/2.0 183")
        assert "m=audio" in progress
        assert len([p for p in await asyncio.to_thread(packets, call.peer, 1.0) if loud(p)]) > 25
        await call.answer()
        assert len([p for p in await asyncio.to_thread(packets, call.peer, 1.0) if loud(p)]) > 25


def loud(packet):
    return len(packet) == 172 and np.abs(mu_law_to_pcm(packet[12:])).mean() > 1000


async def test_notice_that_was_early_media_is_reported_as_heard_before_the_answer(worker, tone):
    """What agent/answering.py waits for."""
    async with ringing(worker) as call:
        leg_id = call.leg.leg_id
        await call.leg.send(Play(leg_id=leg_id, item_id="n", pcm=tone(1.0), sample_rate_hz=RATE, is_final=True))
        await call.leg.send(Progress(leg_id=leg_id))
        heard = await call.until(PlayoutProgress, is_finished=True)
        assert (heard.item_id, heard.played_samples) == ("n", RATE) and call.leg.state is LegState.EARLY
        assert (await call.answer()).startswith("SIP/2.0 200")


async def test_L10_rtp_flows_at_once_after_the_ack_even_with_nothing_to_say(worker):
    """users.md L10: symmetric RTP of a party behind NAT opens with our first packet."""
    async with ringing(worker) as call:
        await call.answer()
        got = await asyncio.to_thread(packets, call.peer, 1.0)
        assert len(got) > 30


async def test_audio_goes_to_where_the_party_really_sends_from(worker):
    """Symmetric RTP (RFC 4961): the SDP promised an address that nobody reads."""
    async with ringing(worker) as call:
        ok = await call.answer()
        promised, call.peer.media = call.peer.media, type(call.peer.media)(2, 2)
        call.peer.media.bind(("127.0.0.1", 0))
        await send_rtp(call, ok, bytes(2 * RATE))
        assert len(await asyncio.to_thread(packets, call.peer, 1.0)) > 30
        promised.close()


async def test_verdict_of_a_silent_party_is_one_way_and_of_a_talking_one_ok(worker, tone):
    async with ringing(worker) as call:
        ok = await call.answer()
        await send_rtp(call, ok, tone(2.0))
        assert (await call.until(MediaHealth)).verdict == "ok"
    async with ringing(worker) as call:
        await call.answer()
        assert (await call.until(MediaHealth)).verdict == "one_way_in_missing"


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


def key_event(peer, to, event, number):
    """One key as RFC 4733 §2.5.1.3 sends it: its last packet three times. `to`: the SDP of who gets it."""
    to_port, payload_type = media_port(to), int(re.search(r"rtpmap:(\d+) telephone-event/8000", to).group(1))
    for step in range(8):
        end = 0x80 if step >= 5 else 0
        head = b"\x80" + bytes([payload_type | (0x80 if step == 0 else 0)]) + (number + step).to_bytes(2, "big")
        duration = (160 * min(step + 1, 6)).to_bytes(2, "big")
        body = (160 * number).to_bytes(4, "big") + b"\0\0\0\1" + bytes([event, end | 10]) + duration
        peer.media.sendto(head + body, ("127.0.0.1", to_port))
        time.sleep(0.02)


def events_in(got):
    """Keys of RFC 4733 packets, each once: one event keeps its timestamp."""
    return list(dict.fromkeys((p[4:8], p[12]) for p in got if p[1] & 0x7F == 101))


def media_port(message):
    return int(next(line for line in message.splitlines() if line.startswith("m=audio")).split()[1])


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
