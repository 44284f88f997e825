"""What a call goes through between answer and BYE: hold both ways, session timers, UPDATE, keys in three ways, early
media. Against a raw SIP peer on loopback; users.md L9, L10, P6, J10. Transfers: test_transfers.py."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

pytest.importorskip("pjsua2")

from agent.raw_sip_peer import PCMU, RawPeer, header  # noqa: E402
from telephony.client import WorkerClient  # noqa: E402
from telephony.config import TelephonyConfig  # noqa: E402
from telephony.dtmf import DtmfDetector, tones  # noqa: E402
from telephony.leg import (  # noqa: E402
    DtmfReceived,
    Hold,
    HoldChanged,
    LegDisconnected,
    LegState,
    MediaHealth,
    Play,
    PlayoutProgress,
    Progress,
    Unhold,
)
from telephony.process import WorkerProcess  # noqa: E402
from telephony.trunk_config import TrunkConfig  # noqa: E402
from tests.telephony.call_control import (  # noqa: E402
    RATE,
    WITHOUT_EVENTS,
    direction,
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
