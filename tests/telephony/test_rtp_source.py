"""Whose RTP a call hears when others send to its port from the very first packet: the party's, and the forger is named.

The party sends silence or a tone from the address its SDP names, or (NAT) from another one; forgers come from
127.0.0.66, which is not listed, or from the party's own host.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket

import numpy as np
import pytest

pytest.importorskip("pjsua2")

from agent.raw_sip_peer import RawPeer, to_tag  # noqa: E402
from telephony.sip import packet_filter  # noqa: E402
from telephony.sip.rtp_lock import RUN_PACKETS, OwnSource, Verdict  # noqa: E402
from tests.live.lines_peers import line  # noqa: E402
from tests.live.sip_agent import until  # noqa: E402

STRANGER = "127.0.0.66"
LISTED = {"allowed_sources": ("127.0.0.1/32",)}
TONE, NOISE = bytes([0x80 if i // 4 % 2 else 0x00 for i in range(160)]), bytes([0x9F, 0x1F] * 80)  # mu-law
PACKETS = 150
AUDIBLE = 0.5  # of the time: less is lost by a busy machine, more by a forger

pytestmark = pytest.mark.skipif(not packet_filter.IS_AVAILABLE, reason="no kernel filter")


def rtp(sequence, payload, ssrc=1, payload_type=0):
    head = bytes([0x80, payload_type]) + sequence.to_bytes(2, "big") + (160 * sequence).to_bytes(4, "big")
    return head + ssrc.to_bytes(4, "big") + payload


def udp(address):
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    made.bind((address, 0))
    return made


@contextlib.asynccontextmanager
async def confirmed(near):
    """(peer, what we heard, where its RTP goes) of a confirmed call."""
    peer = RawPeer(near.address)
    try:
        peer.invite()
        call = await near.next_call()
        ok = await asyncio.to_thread(peer.final)
        peer.request("ACK", to_tag=to_tag(ok))
        await call.confirmed()
        media = next(row for row in ok.splitlines() if row.startswith("m=audio"))
        yield peer, call, ("127.0.0.1", int(media.split()[1]))
        peer.request("BYE", 2, to_tag=to_tag(ok))
        await call.ended()
    finally:
        peer.close()


async def talk(target, party, forgers, packets=PACKETS):
    """The party's tone at 50 packets a second; each forger's packet comes just before and just after."""
    for sequence in range(packets):
        for sender, packet in forgers:
            sender.sendto(packet(sequence), target)
        if party is not None:
            party.sendto(rtp(sequence, TONE), target)
        for sender, packet in forgers:
            sender.sendto(packet(sequence), target)
        await asyncio.sleep(0.02)


def share_of_tone(samples):
    """The tone swings between the two loudest values of mu-law; nothing else here does."""
    return float(np.mean(np.abs(np.frombuffer(bytes(samples), "<i2").astype(int)) > 30000))


def middle(call, first_s=0.6, last_s=2.6):
    return call.samples[int(16000 * first_s) : int(16000 * last_s)]


FORGERIES = {
    "one byte": lambda sequence: b"x",
    "RTP of another SSRC": lambda sequence: rtp(9000 + sequence, NOISE, ssrc=9),
    "RTP of the party's SSRC": lambda sequence: rtp(sequence, NOISE),
    "RTP of no negotiated type": lambda sequence: rtp(sequence, NOISE, payload_type=8),
}


@pytest.mark.parametrize("kind", FORGERIES)
async def test_forger_who_sends_from_the_first_packet_is_not_heard_and_is_named(kind):
    async with line(**LISTED) as near:
        async with confirmed(near) as (peer, call, target), contextlib.AsyncExitStack() as stack:
            forger = stack.enter_context(udp(STRANGER))
            forger.sendto(FORGERIES[kind](0), target)
            await talk(target, peer.media, [(forger, FORGERIES[kind])])
            assert share_of_tone(middle(call)) >= AUDIBLE, "the party is not audible"
            (event,) = [event for event in near.security if event.kind == "rtp_source"]
            assert event.source_address == STRANGER
            assert f"port {forger.getsockname()[1]}" in event.detail
            assert f"own comes from 127.0.0.1:{peer.media.getsockname()[1]}" in event.detail
            assert peer.media.recv(2048), "our voice does not reach the party"


async def test_forger_on_the_partys_own_host_is_not_heard_either():
    """A listed address: only that the SDP's source has been heard keeps it out."""
    async with line(**LISTED) as near:
        async with confirmed(near) as (peer, call, target):
            with udp("127.0.0.1") as forger:
                await talk(target, None, [(forger, FORGERIES["RTP of another SSRC"])], 25)  # it is taken for the party
                await talk(target, peer.media, [(forger, FORGERIES["RTP of another SSRC"])], PACKETS)
                assert share_of_tone(call.samples[-32000:]) >= AUDIBLE
                await until(lambda: any(event.kind == "rtp_source" for event in near.security))


async def test_party_behind_nat_is_heard_from_where_it_really_sends_and_gets_our_voice_there():
    """RFC 4961: the SDP names an address that never sends."""
    async with line(**LISTED) as near:
        async with confirmed(near) as (_peer, call, target):
            with udp("127.0.0.1") as behind_nat, udp(STRANGER) as forger:
                await talk(target, behind_nat, [(forger, FORGERIES["one byte"])])
                assert share_of_tone(middle(call)) >= AUDIBLE
                behind_nat.settimeout(1)
                assert len(await asyncio.to_thread(behind_nat.recv, 2048)) == 172
                (event,) = [event for event in near.security if event.kind == "rtp_source"]
                assert event.source_address == STRANGER


async def test_unlisted_source_is_no_party_behind_nat():
    async with line(**LISTED) as near:
        async with confirmed(near) as (_peer, call, target):
            with udp(STRANGER) as forger:
                await talk(target, None, [(forger, FORGERIES["RTP of another SSRC"])])
                quiet = np.frombuffer(bytes(middle(call)), "<i2").astype(int)
                assert len(quiet) and np.abs(quiet).max() < 100
                (event,) = [event for event in near.security if event.kind == "rtp_source"]
                assert event.source_address == STRANGER


# --------------------------------------------------------------------- parts


def own_source(may_send=lambda host: True):
    return OwnSource("192.0.2.1:4000", frozenset({0, 101}), may_send)


def feed(own, source, packets, per_poll=2):
    return [own.judge(source, packet, index // per_poll) is Verdict.OWN for index, packet in enumerate(packets)]


def run(ssrc=1, first=0, count=RUN_PACKETS + 2):
    return [rtp((first + n) & 0xFFFF, TONE, ssrc) for n in range(count)]


def test_source_of_the_sdp_takes_its_place_whenever_it_sends():
    own = own_source()
    assert any(feed(own, "192.0.2.9:7", run())) and own.address == "192.0.2.9:7" and own.is_heard
    assert not any(feed(own, "192.0.2.8:7", run()))
    assert own.judge("192.0.2.1:4000", rtp(5, TONE), 99) is Verdict.OWN and own.address == own.promised


@pytest.mark.parametrize(
    "packets",
    [
        [b"x"] * 50,
        [b"\x80\x00" + bytes(9)] * 50,  # no whole header
        [rtp(n, TONE, payload_type=8) for n in range(50)],
        [rtp(n, TONE, ssrc=n) for n in range(50)],  # no one SSRC
        [rtp(n * 777, TONE) for n in range(50)],  # no run
        [rtp(5, TONE)] * 50,
        run(count=RUN_PACKETS - 1),
    ],
)
def test_what_is_no_run_of_the_calls_rtp_moves_nothing(packets):
    own = own_source()
    assert not any(feed(own, "192.0.2.9:7", packets)) and own.address == own.promised


def test_run_that_comes_all_at_once_moves_nothing_and_one_over_the_wrap_does():
    own = own_source()
    assert not any(feed(own, "192.0.2.9:7", run(count=40), per_poll=100))
    assert any(feed(own_source(), "192.0.2.9:7", run(first=0xFFFB)))


def test_nobody_else_is_taken_once_the_source_of_the_sdp_was_heard_nor_who_may_not_send():
    own = own_source()
    own.is_heard = True
    assert not any(feed(own, "192.0.2.9:7", run()))
    assert not any(feed(own_source(lambda host: host != "192.0.2.9"), "192.0.2.9:7", run()))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_packets_of_one_source_go_to_the_first_socket_and_all_others_beside_it(host):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as first, contextlib.ExitStack() as stack:
        first.bind((host, 0))
        first.settimeout(0.2)
        trap = stack.enter_context(packet_filter.socket_beside(first.fileno(), 1 << 16))
        own, other = (stack.enter_context(socket.socket(family, socket.SOCK_DGRAM)) for _ in range(2))
        own.bind((host, 0)), other.bind((host, 0))
        packet_filter.steer(first.fileno(), packet_filter.from_one_source(host, own.getsockname()[1], 0, 1))
        for _ in range(5):
            other.sendto(b"other", first.getsockname()), own.sendto(b"own", first.getsockname())
        assert [first.recv(9) for _ in range(5)] == [b"own"] * 5 and [trap.recv(9) for _ in range(5)] == [b"other"] * 5
        with pytest.raises(TimeoutError):
            first.recv(9)
        trap.close()
        other.sendto(b"other", first.getsockname())
        assert first.recv(9) == b"other"
        with socket.socket(family, socket.SOCK_DGRAM) as third, pytest.raises(OSError):  # no second call at its port
            third.bind(first.getsockname())
