"""WebRTC offers of real browsers (tests/fixtures/captures/*.sdp) given to a worker for browsers: what its answer
chooses, and whether it calls back where the offer says. Only their candidates are rewritten, to a socket of ours."""

from __future__ import annotations

import asyncio
import re
import socket

import pytest

pytest.importorskip("aiortc")

from aioice import stun  # noqa: E402

from telephony.leg import Answer, LegIncoming, LegState  # noqa: E402
from telephony.webrtc.signaling import Answered, Offer, Refused, Reply, send_offer  # noqa: E402
from tests.telephony.captures import FOLDER, named, payload_types  # noqa: E402
from tests.telephony.webrtc_peer import RunningWorker, browser_worker  # noqa: E402

pytestmark = pytest.mark.slow
OFFERS = sorted(FOLDER.glob("*-offer.sdp"))


def with_our_candidate(offer: str, port: int) -> str:
    """One candidate in each section, of the connection that listens here; the browser's own is long over."""
    lines = [line for line in offer.splitlines() if not re.match(r"a=(candidate|end-of-candidates)", line)]
    ours = f"a=candidate:1 1 udp 2122194687 127.0.0.1 {port} typ host"
    placed = [one for line in lines for one in ([ours, line] if line.startswith("a=ice-ufrag") else [line])]
    return "\r\n".join(placed) + "\r\n"


async def answered(worker: RunningWorker, offer: str) -> Reply:
    """The agent takes the call; what the browser is told."""
    client = await worker.agent()
    try:
        asking = asyncio.create_task(
            send_offer(worker.offers, Offer(sdp=offer, did="100", ani="web", source_address="127.0.0.1"), 15.0)
        )
        leg = await asyncio.wait_for(anext(client.legs()), 15)
        events = leg.events()
        assert isinstance(await anext(events), LegIncoming)
        if leg.state is LegState.INCOMING:
            await leg.send(Answer(leg_id=leg.leg_id))
        reply = await asking
        leg.hang_up()
        return reply
    finally:
        await client.close()


def sections(sdp: str) -> list[str]:
    return re.split(r"(?=^m=)", sdp, flags=re.MULTILINE)[1:]


def value(section: str, name: str) -> str:
    found = re.search(rf"^a={name}:([^\r\n]*)", section, re.MULTILINE)
    assert found, f"no a={name} in {section}"
    return found[1]


def first_check(own: socket.socket) -> stun.Message:
    """The first STUN message that comes (RFC 8445 §7.2)."""
    return stun.parse_message(own.recv(2_048))


@pytest.mark.parametrize("path", OFFERS, ids=lambda path: path.stem)
async def test_offer_of_a_browser_is_answered_with_opus_and_its_own_transport(path):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as own:
        own.bind(("127.0.0.1", 0))
        own.settimeout(10)
        offer = with_our_candidate(path.read_text(), own.getsockname()[1])
        async with browser_worker(bind="127.0.0.1") as worker:
            check = asyncio.create_task(asyncio.to_thread(first_check, own))
            reply = await answered(worker, offer)
            assert isinstance(reply, Answered)
            audio, data = sections(reply.sdp)
            offered_audio, offered_data = sections(offer)
            request = await check
    assert payload_types(audio)["opus/48000"] == payload_types(offered_audio)["opus/48000"]
    assert audio.split()[3] == str(payload_types(audio)["opus/48000"])  # the one that is spoken stands first
    assert data.startswith("m=application") and " UDP/DTLS/SCTP webrtc-datachannel" in data.splitlines()[0]
    for section, offered in ((audio, offered_audio), (data, offered_data)):
        assert value(section, "mid") == value(offered, "mid")  # RFC 8829 §5.3.1
        assert value(offered, "setup") == "actpass" and value(section, "setup") in ("active", "passive")  # RFC 8842
        assert value(section, "fingerprint").startswith("sha-256 ")
        assert " 127.0.0.1 " in value(section, "candidate") and value(section, "candidate").endswith("typ host")
    assert "a=rtcp-mux" in audio and "a=sendrecv" in audio
    assert re.search(r"^a=group:BUNDLE 0 1\r?$", reply.sdp, re.MULTILINE)
    names = f"{value(offered_audio, 'ice-ufrag')}:{value(audio, 'ice-ufrag')}"
    assert request.attributes["USERNAME"] == names  # it calls back with the credentials of this very offer


async def test_offer_of_chromium_without_opus_is_answered_in_a_law_or_mu_law():
    """RFC 7874 §3: G.711 is what every browser has besides Opus."""
    offer = with_our_candidate(named("chromium", "offer.sdp").read_text(), 9)
    offer = re.sub(r"^(m=audio \d+ \S+) [^\r]*", r"\1 0 8", offer, flags=re.MULTILINE)
    offer = re.sub(r"^a=(rtpmap|fmtp|rtcp-fb):(?!0 |8 ).*\r\n", "", offer, flags=re.MULTILINE)
    async with browser_worker(bind="127.0.0.1") as worker:
        reply = await answered(worker, offer)
        assert isinstance(reply, Answered)
        assert payload_types(sections(reply.sdp)[0]) == {"PCMU/8000": 0, "PCMA/8000": 8}


async def test_offer_of_chromium_that_was_cut_short_is_refused_and_no_call():
    whole = named("chromium", "offer.sdp").read_text()
    async with browser_worker(bind="127.0.0.1") as worker:
        client = await worker.agent()
        reply = await cut_short(worker, client, whole[: whole.index("a=ice-pwd")])
        await client.close()
    assert isinstance(reply, Refused) and reply.status == 400


async def cut_short(worker: RunningWorker, client, offer: str) -> Reply:
    asking = asyncio.create_task(
        send_offer(worker.offers, Offer(sdp=offer, did="100", ani="web", source_address="127.0.0.1"), 15.0)
    )
    leg = await asyncio.wait_for(anext(client.legs()), 15)
    await leg.send(Answer(leg_id=leg.leg_id))
    return await asking
