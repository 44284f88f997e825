"""What strangers and broken peers get from a worker: the SIP answer that the RFC asks for, or silence; one event; and
the live call goes on. Raw bytes on loopback; strangers come from 127.0.0.66."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import socket
import ssl
import subprocess

import pytest

pytest.importorskip("pjsua2")

from agent.raw_sip_peer import RawPeer, to_tag  # noqa: E402
from telephony.client import WorkerClient  # noqa: E402
from telephony.config import TelephonyConfig  # noqa: E402
from telephony.leg import Answer, LegDisconnected, LegState  # noqa: E402
from telephony.process import WorkerFailed, WorkerProcess  # noqa: E402
from telephony.security_log import SecurityLog  # noqa: E402
from telephony.sip import packet_filter  # noqa: E402
from telephony.sip.floods import TokenBucket  # noqa: E402
from telephony.sip.shed import openssl_version  # noqa: E402
from tests.telephony.torture import TORTURE, after_invite  # noqa: E402

STRANGER = "127.0.0.66"


@pytest.fixture(scope="module")
def guarded():
    config = TelephonyConfig(sip_port=0, transports=("udp", "tcp"), allowed_sources=("127.0.0.1/32",), invites_per_s=20)
    with WorkerProcess(config) as worker:
        yield worker


class Desk:
    """The agent's side: every leg is answered; events are kept."""

    def __init__(self, client):
        self.client, self.security, self.legs, self.ended = client, [], [], []
        client.on_security_event = self.security.append
        self.task = asyncio.create_task(self._serve())

    async def _serve(self):
        async with asyncio.TaskGroup() as group:
            async for leg in self.client.legs():
                self.legs.append(leg)
                group.create_task(self._follow(leg))

    async def _follow(self, leg):
        await leg.send(Answer(leg_id=leg.leg_id))
        async for event in leg.events():
            if isinstance(event, LegDisconnected):
                self.ended.append(event)


@contextlib.asynccontextmanager
async def desk_of(worker):
    client = await WorkerClient.connect(worker.socket_path)
    desk = Desk(client)
    try:
        yield desk
    finally:
        for leg in desk.legs:
            leg.hang_up()
        await asyncio.sleep(0.3)
        await client.close()
        await desk.task


@contextlib.contextmanager
def raw(address, source="127.0.0.1"):
    peer = RawPeer(address, source)
    try:
        yield peer
    finally:
        peer.close()


async def until(condition, limit_s=10.0):
    async with asyncio.timeout(limit_s):
        while not condition():  # noqa: ASYNC110 - another process changes it
            await asyncio.sleep(0.02)


async def call_up(peer, desk):
    """A confirmed call of a raw peer: the 200 OK."""
    number = len(desk.legs)
    peer.invite()
    ok = await asyncio.to_thread(peer.final)
    peer.request("ACK", to_tag=to_tag(ok))
    await until(lambda: len(desk.legs) > number and desk.legs[-1].state is LegState.CONFIRMED)
    return ok


# ------------------------------------------------------------------ strangers


OF_SCANNER = (
    "Via: SIP/2.0/UDP 127.0.0.66:5060;branch=z9hG4bK-1;rport\r\n"
    "From: <sip:100@1.1.1.1>;tag=1\r\nTo: <sip:100@1.1.1.1>\r\nCall-ID: 1\r\nContact: <sip:100@127.0.0.66>\r\n"
    "User-Agent: friendly-scanner\r\nMax-Forwards: 70\r\n"
)
SCANS = (
    "OPTIONS sip:100@{to} SIP/2.0\r\n" + OF_SCANNER + "CSeq: 1 OPTIONS\r\nContent-Length: 0\r\n\r\n",
    "REGISTER sip:{to} SIP/2.0\r\n" + OF_SCANNER + "CSeq: 1 REGISTER\r\nContent-Length: 0\r\n\r\n",
    "\x00\x01GET / HTTP/1.1\r\n\r\n",
)


async def test_unlisted_source_gets_no_reply_no_call_and_one_event(guarded):
    async with desk_of(guarded) as desk:
        with raw(guarded.address, STRANGER) as stranger:
            stranger.socket.settimeout(0.5)
            for text in SCANS:
                stranger.socket.sendto(text.format(to=guarded.address).encode(), stranger.target)
            for _ in range(3):
                stranger.invite()
            with pytest.raises(TimeoutError):
                await asyncio.to_thread(stranger.socket.recv, 4096)
            await until(lambda: desk.security)
            await asyncio.sleep(0.3)
            (event,) = desk.security
            assert (event.kind, event.source_address) == ("unlisted_source", STRANGER)
            assert event.detail.startswith("OPTIONS sip:100@") and not desk.legs


async def test_unlisted_source_cannot_even_connect_by_tcp(guarded):
    host, port = guarded.address.split(":")
    with socket.socket() as stranger:
        stranger.settimeout(0.5)
        stranger.bind((STRANGER, 0))
        with pytest.raises(TimeoutError):
            await asyncio.to_thread(stranger.connect, (host, int(port)))
    with socket.socket() as listed:
        listed.settimeout(2)
        await asyncio.to_thread(listed.connect, (host, int(port)))


async def test_bye_of_a_third_party_ends_nothing(guarded):
    async with desk_of(guarded) as desk:
        with raw(guarded.address) as peer, raw(guarded.address) as listed, raw(guarded.address, STRANGER) as stranger:
            ok = await call_up(peer, desk)
            for intruder in (listed, stranger):
                intruder.call_id = peer.call_id
                intruder.socket.settimeout(1.0)
                intruder.request("BYE", 2, to_tag="guessed")
            assert (await asyncio.to_thread(listed.final)).split()[1] == "481"  # RFC 3261 §15.1.2
            stranger.tag = peer.tag  # even with the right tags: it is not heard
            stranger.request("BYE", 3, to_tag=to_tag(ok))
            with pytest.raises(TimeoutError):
                await asyncio.to_thread(stranger.socket.recv, 4096)
            assert desk.legs[-1].state is LegState.CONFIRMED
            peer.request("BYE", 4, to_tag=to_tag(ok))
            assert (await asyncio.to_thread(peer.final)).startswith("SIP/2.0 200")
            await until(lambda: desk.ended)
            of_bye = [event for event in desk.security if event.kind == "third_party_bye"]
            assert [(event.source_address, event.count) for event in of_bye] == [("127.0.0.1", 1)]
            assert of_bye[0].detail.startswith("BYE sip:100@")


async def test_bye_that_is_sent_again_is_no_third_party(guarded):
    async with desk_of(guarded) as desk:
        with raw(guarded.address) as peer:
            ok = await call_up(peer, desk)
            for _ in range(3):  # RFC 3261 §17.1.2.2: until our 200 arrives
                peer.request("BYE", 2, to_tag=to_tag(ok))
            await until(lambda: desk.ended)
            peer.request("BYE", 2, to_tag=to_tag(ok))
            await asyncio.sleep(0.5)
            assert not [event for event in desk.security if event.kind == "third_party_bye"]


async def test_register_at_us_is_refused_and_noted_once(guarded):
    async with desk_of(guarded) as desk:
        with raw(guarded.address) as peer:
            for cseq in range(1, 6):
                peer.request("REGISTER", cseq, headers='Authorization: Digest username="100", response="0"\r\n')
                assert (await asyncio.to_thread(peer.final)).split()[1] == "501"
            await until(lambda: desk.security)
            assert [(event.kind, event.source_address) for event in desk.security] == [("not_served", "127.0.0.1")]


def rtp(sequence, value, ssrc=1):
    return (
        b"\x80\x00"
        + sequence.to_bytes(2, "big")
        + (160 * sequence).to_bytes(4, "big")
        + ssrc.to_bytes(4, "big")
        + bytes([value]) * 160
    )


async def test_rtp_of_another_source_is_not_heard_once_the_party_has_sent(guarded):
    """Silence from the party, loud noise from a third one who knows the port."""
    async with desk_of(guarded) as desk:
        with raw(guarded.address) as peer, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as forger:
            ok = await call_up(peer, desk)
            heard = bytearray()
            desk.legs[-1].set_tap(lambda _start, received, _sent: heard.extend(received))
            media = next(line for line in ok.splitlines() if line.startswith("m=audio"))
            target = ("127.0.0.1", int(media.split()[1]))
            for sequence in range(100):
                peer.media.sendto(rtp(sequence, 0xFF), target)
                if sequence > 60:
                    forger.sendto(rtp(5000 + sequence, 0x00 if sequence % 2 else 0x80, ssrc=9), target)
                await asyncio.sleep(0.02)
            assert len(heard) > 16000 and max(heard) in (0, 0xFF) and set(bytes(heard)) <= {0, 0xFF, 0xFE, 1, 8, 0xF8}
            await until(lambda: any(event.kind == "rtp_source" for event in desk.security))
            peer.request("BYE", 2, to_tag=to_tag(ok))
            await until(lambda: desk.ended)


async def test_flood_of_invites_is_refused_and_the_live_call_goes_on(guarded):
    """60 calls at once, most of them refused, exhausted the wheel's sockets when each was a call of pjsip first."""
    async with desk_of(guarded) as desk:
        with raw(guarded.address) as peer:
            ok = await call_up(peer, desk)
            with contextlib.ExitStack() as stack:
                flooders = [stack.enter_context(raw(guarded.address)) for _ in range(60)]
                for _ in range(4):
                    for flooder in flooders:
                        flooder.invite()
                    await asyncio.sleep(0.1)
                await asyncio.sleep(1.0)
                assert guarded.poll() is None
                assert desk.legs[0].state is LegState.CONFIRMED
                statuses = await asyncio.to_thread(lambda: [end_call(flooder) for flooder in flooders])
                assert statuses.count("200") < guarded.ready["max_calls"] and "503" in statuses
                peer.request("BYE", 2, to_tag=to_tag(ok))
                assert (await asyncio.to_thread(peer.final)).startswith("SIP/2.0 200")
                await until(lambda: any(event.leg_id == desk.legs[0].leg_id for event in desk.ended))


def end_call(peer):
    """ACK of what an INVITE got, and BYE of a call; its status, "" = nothing."""
    peer.socket.settimeout(0.05)
    with contextlib.suppress(TimeoutError):
        final = peer.final()
        peer.request("ACK", to_tag=to_tag(final))
        if final.startswith("SIP/2.0 200"):
            peer.request("BYE", 2, to_tag=to_tag(final))
        return final.split()[1]
    return ""


# ---------------------------------------------------------------- malformed


async def torture(torturer, address, number, text):
    """The status of the final answer, "" = none."""
    fields = {"to": address, "port": torturer.port, "n": number, "media": 9}
    torturer.socket.sendto(text.format(**fields).encode(), torturer.target)
    try:
        answer = await asyncio.to_thread(torturer.final)
    except TimeoutError:
        return ""
    status = answer.split()[1]
    if text.startswith("INVITE"):
        rest = [after_invite("ACK", 1, to_tag(answer))] + [after_invite("BYE", 2, to_tag(answer))] * (status == "200")
        for message in rest:
            torturer.socket.sendto(message.format(**fields).encode(), torturer.target)
    return status


async def test_malformed_messages_get_what_the_rfc_asks_for_and_harm_no_call(guarded):
    async with desk_of(guarded) as desk:
        with raw(guarded.address) as peer:
            ok = await call_up(peer, desk)
            wrong = {}
            for number, (name, (text, allowed)) in enumerate(TORTURE.items()):
                with raw(guarded.address) as torturer:
                    torturer.socket.settimeout(0.6 if "" in allowed else 5)
                    status = await torture(torturer, guarded.address, number, text)
                    if status not in allowed:
                        wrong[name] = status
            assert not wrong
            kinds = [event.kind for event in desk.security]
            assert kinds.count("malformed") == 1  # of one source, within a minute
            assert desk.legs[0].state is LegState.CONFIRMED and guarded.poll() is None
            await until(lambda: all(leg.state is LegState.DISCONNECTED for leg in desk.legs[1:]))
            peer.request("BYE", 99, to_tag=to_tag(ok))
            assert (await asyncio.to_thread(peer.final)).startswith("SIP/2.0 200")
            await until(lambda: desk.ended)


async def test_rtp_that_is_none_harms_no_call(guarded):
    async with desk_of(guarded) as desk:
        with raw(guarded.address) as peer:
            ok = await call_up(peer, desk)
            media = next(line for line in ok.splitlines() if line.startswith("m=audio"))
            port = int(media.split()[1])
            garbage = (
                b"", b"\x80", b"\x80\x00" + b"\xff" * 8, b"\x9f\x00" + bytes(10), b"\x80\x7f" + bytes(200),
                b"\x00" * 1400, b"\xff" * 1400, b"\x90\x00" + bytes(10) + b"\xff\xff\xff\xff",
            )  # fmt: skip
            for packet in garbage * 5:
                peer.media.sendto(packet, ("127.0.0.1", port))
                peer.media.sendto(packet, ("127.0.0.1", port + 1))
            await asyncio.sleep(0.5)
            assert desk.legs[-1].state is LegState.CONFIRMED and guarded.poll() is None
            peer.request("BYE", 2, to_tag=to_tag(ok))
            assert (await asyncio.to_thread(peer.final)).startswith("SIP/2.0 200")
            await until(lambda: desk.ended)


# ----------------------------------------------------------------- TLS, SRTP

PLAIN = ("0", "a=rtpmap:0 PCMU/8000\r\n")
CRYPTO = "a=crypto:1 AES_CM_128_HMAC_SHA1_80 inline:WVNfX19zZW1jdGwgKCkgewkyMjA7fQp9CnVubGVz\r\n"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")],
        check=True, capture_output=True,
    )  # fmt: skip
    return folder


def secured(folder, **settings):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return TelephonyConfig(**({
        "sip_port": 0, "transports": ("udp", "tls"), "tls_port": port, "tls_cert_file": str(folder / "cert.pem"),
        "tls_key_file": str(folder / "key.pem"), "accepts_old_openssl": True, "srtp": "mandatory",
    } | settings))  # fmt: skip


def test_old_openssl_is_not_offered_unless_it_is_accepted(certificate, capfd):
    if not openssl_version().startswith("1.0"):
        pytest.skip("this pjsua2 has a newer OpenSSL")
    with pytest.raises(WorkerFailed):
        WorkerProcess(secured(certificate, accepts_old_openssl=False))
    assert "OpenSSL 1.0" in capfd.readouterr().err


async def test_tls_answers_and_srtp_is_never_downgraded(certificate):
    config = secured(certificate)
    with await asyncio.to_thread(WorkerProcess, config) as worker:
        async with desk_of(worker) as desk:
            with raw(worker.address) as peer:
                peer.invite(PLAIN)
                assert (await asyncio.to_thread(peer.final)).startswith("SIP/2.0 488")  # RTP/AVP where SRTP is a must
            with raw(worker.address) as peer:
                offer = peer.sdp((PLAIN[0], PLAIN[1] + CRYPTO)).replace("RTP/AVP", "RTP/SAVP")
                peer.request("INVITE", body=offer)
                ok = await asyncio.to_thread(peer.final)
                assert ok.startswith("SIP/2.0 200") and "RTP/SAVP" in ok and "a=crypto:1 AES_CM_128_HMAC_SHA1_80" in ok
                peer.request("ACK", to_tag=to_tag(ok))
                await until(lambda: desk.legs and desk.legs[-1].state is LegState.CONFIRMED)
                peer.request("BYE", 2, to_tag=to_tag(ok))
                await until(lambda: desk.ended)
            answer = await asyncio.to_thread(tls_options, config.tls_port)
            assert answer.startswith("SIP/2.0 200")


def tls_options(port):
    """OPTIONS over TLS 1.2, by Python's own OpenSSL."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection(("127.0.0.1", port), 5) as plain, context.wrap_socket(plain) as wrapped:
        wrapped.sendall(
            f"OPTIONS sip:100@127.0.0.1:{port};transport=tls SIP/2.0\r\n"
            "Via: SIP/2.0/TLS 127.0.0.1:9;branch=z9hG4bK1\r\n"
            "Max-Forwards: 70\r\nFrom: <sip:raw@127.0.0.1>;tag=1\r\nTo: <sip:100@127.0.0.1>\r\nCall-ID: tls-1\r\n"
            "CSeq: 1 OPTIONS\r\nContent-Length: 0\r\n\r\n".encode()
        )
        return wrapped.recv(4096).decode()


async def test_plain_calls_are_plain_when_srtp_is_off(guarded):
    async with desk_of(guarded):
        with raw(guarded.address) as peer:
            peer.request("INVITE", body=peer.sdp((PLAIN[0], PLAIN[1] + CRYPTO)).replace("RTP/AVP", "RTP/SAVP"))
            assert (await asyncio.to_thread(peer.final)).split()[1] in ("488", "406")


# -------------------------------------------------------------------- parts


def sent_through(program, *sources):
    """Which of these local addresses get a packet through the filter."""
    passed = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as door:
        door.bind(("127.0.0.1", 0))
        door.settimeout(0.1)
        packet_filter.attach(door.fileno(), program)
        for source in sources:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                sender.bind((source, 0))
                sender.sendto(b"x", door.getsockname())
                with contextlib.suppress(TimeoutError):
                    passed.append(door.recvfrom(8)[1][0])
    return passed


def networks(*texts):
    return [ipaddress.ip_network(text) for text in texts]


def test_filter_lets_networks_through_however_many_there_are():
    listed = networks("10.0.0.0/8", "::1/128", *(f"172.16.{n}.0/24" for n in range(250)), "127.0.0.4/30")
    program = packet_filter.by_source(listed, 0xFFFFFFFF, 0)
    assert sent_through(program, "127.0.0.3", "127.0.0.5", "127.0.0.8") == ["127.0.0.5"]


def test_filter_for_more_networks_than_fit_is_refused():
    with pytest.raises(ValueError, match="too many networks"):
        packet_filter.by_source(networks(*(f"10.{a}.{b}.0/24" for a in range(8) for b in range(200))), 1, 0)


def test_one_event_a_minute_for_each_source_with_what_came_in_between():
    told = []
    log = SecurityLog(told.append)
    for second in range(90):
        log.note("flood", "192.0.2.1", "line\r\nEvil: 1", float(second))
        log.on_time(float(second))
    log.on_time(200.0)
    assert [event.count for event in told] == [1, 60, 29] and "\r" not in told[0].detail


def test_forged_sources_become_one_event():
    told = []
    log = SecurityLog(told.append)
    for number in range(1000):
        log.note("unlisted_source", f"10.0.{number // 250}.{number % 250}", "", 1.0)
    assert len(told) == 257 and told[-1].source_address == "many"


def test_bucket_lets_a_burst_through_and_then_so_many_a_second():
    bucket = TokenBucket(per_s=10, burst=3)
    assert [bucket.take(100.0) for _ in range(5)] == [True, True, True, False, False]
    assert [bucket.take(100.1) for _ in range(2)] == [True, False]
    assert [bucket.take(200.0) for _ in range(4)] == [True, True, True, False]


def test_looking_for_a_socket_leaves_no_descriptor_behind():
    """Each answered call looks twice; at 1,024 descriptors pjlib takes no more calls (select)."""
    read_end, write_end = os.pipe()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as wanted:
        wanted.bind(("127.0.0.1", 0))
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(10):
            assert packet_filter.find_socket(wanted.getsockname()[1], socket.SOCK_DGRAM) == wanted.fileno()
        assert len(os.listdir("/proc/self/fd")) == before
    os.close(read_end)
    os.close(write_end)
