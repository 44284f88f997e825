"""RTP of real peers (tests/fixtures/captures/*.pcap) sent into calls of a media worker: keys, voices in both laws,
counters that wrap; and what the lab's relay makes of their offers."""

from __future__ import annotations

import asyncio
import re

import numpy as np
import pytest

pytest.importorskip("pjsua2")

from agent.demo_script import ASSETS  # noqa: E402
from agent.lab import rtp  # noqa: E402
from agent.lab.line import LineProfile  # noqa: E402
from agent.lab.relay import RelayedCall  # noqa: E402
from telephony.clips import read_clip  # noqa: E402
from telephony.config import TelephonyConfig  # noqa: E402
from telephony.leg import AudioFrame, DtmfReceived, Play, WireMetric  # noqa: E402
from telephony.process import WorkerProcess  # noqa: E402
from tests.telephony.captures import FOLDER, headers, message, named, payload_types, read_pcap  # noqa: E402
from tests.telephony.replay import replay  # noqa: E402

RATE = rtp.RATE_HZ
CLIP = np.frombuffer(read_clip(ASSETS / "hours_day.flac", RATE), "<i2").astype(float)  # what the peers said
ENOUGH = (
    0.4  # of the clip, on a machine too busy to send in time; the wrong law gives less than 0.2, a quiet machine 0.9
)


@pytest.fixture(scope="module")
def worker():
    with WorkerProcess(TelephonyConfig(sip_port=0, trusted_proxies=("127.0.0.1/32",))) as running:
        yield running


def packets_of(origin: str, what: str) -> list[list[bytes]]:
    return [[datagram.payload] for datagram in read_pcap(named(origin, f"{what}.pcap"))]


def similarity(heard: np.ndarray, source: np.ndarray = CLIP) -> float:
    """Highest normalised correlation of these samples anywhere in what was heard."""
    energy = np.concatenate([[0.0], np.cumsum(heard**2)])
    norms = np.sqrt(np.maximum(energy[len(source) :] - energy[: -len(source)], 1)) * np.linalg.norm(source)
    return float(np.max(np.correlate(heard, source, "valid") / norms))


def share_heard(heard: np.ndarray) -> float:
    """Of the clip's loud tenths of a second, those that were heard as they are.

    Not the clip as a whole: a jitter buffer that grows or shrinks on a busy machine moves what follows by a packet.
    """
    pieces = CLIP[: len(CLIP) // 800 * 800].reshape(-1, 800)
    loud = [piece for piece in pieces if np.sqrt(np.mean(piece**2)) > 1_000]
    assert len(loud) > 8
    return float(np.mean([similarity(heard, piece) > 0.9 for piece in loud]))


@pytest.mark.parametrize(("law", "other"), [(rtp.PCMU, rtp.PCMA), (rtp.PCMA, rtp.PCMU)])
def test_a_law_taken_for_the_other_would_not_pass_for_the_clip(law, other):
    codes = np.frombuffer(rtp.encode(law, CLIP), np.uint8)
    assert share_heard(rtp.DECODE[law][codes].astype(float)) == 1.0
    assert share_heard(rtp.DECODE[other][codes].astype(float)) < 0.2


def level_db(samples: np.ndarray) -> float:
    """Of the loudest second."""
    power = np.convolve(samples**2, np.ones(RATE) / RATE, "valid")
    return float(10 * np.log10(power.max()))


async def test_keys_of_baresip_arrive_once_each(worker):
    """RFC 4733 §2.5.1.3: an event is 17 packets, the last three the same."""
    async with replay(worker) as call:
        ok = await call.call(message("baresip", "invite"))
        await call.talk(ok, packets_of("baresip", "telephone-event"))
        await call.until(DtmfReceived, digit="#")
        assert "".join(event.digit for event in call.of(DtmfReceived)) == "123#"
        assert not any(frame.voiced for frame in call.of(AudioFrame))


@pytest.mark.parametrize(
    ("origin", "what", "invite"),
    [("baresip", "pcmu", "invite"), ("baresip", "pcma", "invite-pcma"), ("sipp", "pcma", "invite-pcma")],
)
async def test_voice_of_a_peer_is_heard_as_it_was_said(worker, origin, what, invite):
    """The same clip in both laws and from two stacks: the same words, equally loud."""
    async with replay(worker) as call:
        ok = await call.call(message("sipp" if invite == "invite-pcma" else origin, invite))
        heard = await call.talk(ok, packets_of(origin, what))
        assert share_heard(heard) > ENOUGH
        assert level_db(heard) == pytest.approx(level_db(CLIP), abs=1)
        assert sum(frame.voiced for frame in call.of(AudioFrame)) > 40
        assert [event.kind for event in call.of(WireMetric)].count("caller_onset") >= 1


async def test_voice_of_baresip_is_whole_when_packets_are_swapped_doubled_and_counters_wrap(worker):
    """RFC 3550 §5.1: 16 and 32 bits that wrap a tenth of a second into the clip, so that most of it comes after."""
    async with replay(worker) as call:
        ok = await call.call(message("baresip", "invite"))
        packets = [rtp.parse(packet) for (packet,) in packets_of("baresip", "pcmu")]
        moved = []
        for number, packet in enumerate(packets):
            sequence_number, timestamp = (2**16 - 33 + number) % 2**16, (2**32 - 160 * 36 + 160 * number) % 2**32
            moved.append(rtp.build(rtp.RtpPacket(0, sequence_number, timestamp, packet.ssrc, packet.payload)))
        for at in range(40, len(moved) - 1, 8):
            moved[at], moved[at + 1] = moved[at + 1], moved[at]
        heard = await call.talk(ok, [[packet] * (1 + (number % 10 == 5)) for number, packet in enumerate(moved)])
        assert share_heard(heard) > ENOUGH


async def test_call_in_a_law_is_as_intelligible_both_ways_as_one_in_mu_law(worker):
    """users.md, Dograh: "A-law countries get degrading audio"."""
    async with replay(worker) as call:
        ok = await call.call(message("sipp", "invite-pcma"))
        assert payload_types(ok)["PCMA/8000"] == 8 and "PCMU/8000" not in payload_types(ok)
        said = asyncio.create_task(call.talk(ok, packets_of("sipp", "pcma")))
        pcm = CLIP.astype("<i2").tobytes()
        await call.leg.send(Play(leg_id=call.leg.leg_id, item_id="clip", pcm=pcm, sample_rate_hz=RATE, is_final=True))
        got = [rtp.parse(await asyncio.to_thread(call.peer.media.recv, 2_048)) for _ in range(100)]
        assert {packet.payload_type for packet in got} == {rtp.PCMA}
        assert np.all(np.diff([packet.sequence_number for packet in got]) % 2**16 == 1)
        assert np.all(np.diff([packet.timestamp for packet in got]) % 2**32 == 160)
        sent = np.concatenate([rtp.decode(packet) for packet in got]).astype(float)
        assert similarity(sent) > 0.99 and level_db(sent) == pytest.approx(level_db(CLIP), abs=0.5)
        assert share_heard(await said) > ENOUGH


# ----------------------------------------------------------------- the lab's relay


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*invite*.sip")), ids=lambda path: path.stem)
async def test_relay_changes_addresses_and_ports_of_a_real_offer_and_nothing_else(path):
    captured = path.read_bytes()
    relayed = RelayedCall(LineProfile(), 1)
    await relayed.open("127.0.0.1")
    try:
        to_agent = relayed.sdp_to_agent(captured, "127.0.0.1")
        to_caller = relayed.sdp_to_caller(captured, "127.0.0.1")
    finally:
        relayed.close()
    ports = [int(re.findall(rb"^m=audio (\d+)", text, re.MULTILINE)[0]) for text in (captured, to_agent, to_caller)]
    assert len(set(ports)) == 3
    for port, text in zip(ports[1:], (to_agent, to_caller), strict=True):
        assert neutral(text) == neutral(captured)
        assert re.findall(rb"^c=(.*)\r", text, re.MULTILINE) == [b"IN IP4 127.0.0.1"]
        head, _, body = text.partition(b"\r\n\r\n")
        assert int(headers(head.decode(), "Content-Length")[0]) == len(body)
        assert f"m=audio {port} ".encode() in body


def neutral(text: bytes) -> list[bytes]:
    """Without what a relay may change: connection address, media port, RTCP's port, and the length that follows."""
    text = re.sub(rb"^c=IN IP4 \S+", b"c=", text, flags=re.MULTILINE)
    text = re.sub(rb"^m=audio \d+", b"m=audio", text, flags=re.MULTILINE)
    lines = text.split(b"\r\n")
    return [line for line in lines if not line.startswith((b"a=rtcp:", b"Content-Length:"))]
