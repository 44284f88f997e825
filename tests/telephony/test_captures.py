"""What real peers sent (tests/fixtures/captures/), sent again to a media worker from a raw socket: each is answered as
the RFCs ask for. Named after the peer. Captured by tests/live/capture.py; their RTP is in test_captured_rtp.py."""

from __future__ import annotations

import asyncio
import hashlib
import re

import pytest

pytest.importorskip("pjsua2")

from agent.raw_sip_peer import RawPeer, to_tag  # noqa: E402
from telephony.client import WorkerClient  # noqa: E402
from telephony.config import TelephonyConfig  # noqa: E402
from telephony.leg import HoldChanged, LegDisconnected, LegIncoming, LegState, LegStateChanged  # noqa: E402
from telephony.process import WorkerProcess  # noqa: E402
from telephony.trunk_config import TrunkConfig  # noqa: E402
from tests.telephony.captures import FOLDER, direction, headers, message, payload_types  # noqa: E402
from tests.telephony.replay import Replay, replay  # noqa: E402


@pytest.fixture(scope="module")
def worker():
    with WorkerProcess(TelephonyConfig(sip_port=0, trusted_proxies=("127.0.0.1/32",))) as running:
        yield running


# --------------------------------------------------------------------- INVITEs


async def test_invite_of_baresip_is_answered_with_pcmu(worker):
    async with replay(worker) as call:
        ok = await call.call(message("baresip", "invite"))
        assert payload_types(ok) == {"PCMU/8000": 0, "telephone-event/8000": 101}  # RFC 3264 §6.1: its numbers
        assert (await call.until(LegStateChanged, state=LegState.CONFIRMED)).codec == "PCMU/8000"
        (incoming,) = call.of(LegIncoming)
        assert (incoming.did, incoming.ani) == ("100", "baresip")
        assert headers(ok, "Contact") and "INVITE" in headers(ok, "Allow")[0]


async def test_invite_of_sipp_is_answered_without_the_telephone_event_it_did_not_offer(worker):
    async with replay(worker) as call:
        ok = await call.call(message("sipp", "invite"))
        assert payload_types(ok) == {"PCMU/8000": 0}
        assert direction(ok) == "sendrecv"


async def test_invite_of_sipps_media_scenario_is_answered_with_pcma(worker):
    async with replay(worker) as call:
        ok = await call.call(message("sipp", "invite-pcma"))
        assert payload_types(ok) == {"PCMA/8000": 8, "telephone-event/8000": 101}
        assert (await call.until(LegStateChanged, state=LegState.CONFIRMED)).codec == "PCMA/8000"


async def test_invite_of_linphone_is_answered_with_pcmu_and_events_of_its_clock(worker):
    """It offers Opus and Speex first, and telephone-event at three clock rates (RFC 4733 §2.1: the audio's counts)."""
    async with replay(worker) as call:
        captured = message("linphone", "invite")
        ok = await call.call(captured)
        assert {"opus/48000", "telephone-event/48000", "telephone-event/8000"} <= payload_types(captured).keys()
        assert payload_types(ok) == {"PCMU/8000": 0, "telephone-event/8000": 101}
        assert call.of(LegIncoming)[0].display_name == "Linphone"


async def test_invite_of_pjsua2_gets_its_numbers_and_its_session_timer(worker):
    async with replay(worker) as call:
        ok = await call.call(message("pjsua2", "invite"))
        assert payload_types(ok) == {"PCMU/8000": 0, "telephone-event/8000": 120}
        expires, _, refresher = headers(ok, "Session-Expires", "x")[0].partition(";")
        assert int(expires) == 1800 and refresher in ("refresher=uac", "refresher=uas")
        assert refresher == "refresher=uas" or "timer" in headers(ok, "Require")  # RFC 4028 §9


async def test_invite_that_kamailio_forwarded_keeps_its_route_and_its_vias(worker):
    captured = message("kamailio", "invite-forwarded")
    async with replay(worker) as call:
        ok = await call.call(captured)
        (route,) = headers(captured, "Record-Route")
        route = re.sub(r":\d+;lr=on", f":{call.peer.port};lr", route)  # pjsip writes lr as RFC 3261 §19.1.1 has it
        assert headers(ok, "Record-Route") == [route]  # RFC 3261 §12.1.1
        vias = [set(headers(text, "Via")[-1].split(";")) for text in (ok, captured)]
        assert len(headers(ok, "Via")) == 2 and vias[0] == vias[1]
        (source,) = headers(captured, "X-Minmo-Source")
        assert call.of(LegIncoming)[0].source_address == source  # not the proxy's own
        bye = await call.end()
        assert headers(bye, "Route") == headers(ok, "Record-Route")  # RFC 3261 §12.2.1.1: loose routing
        assert bye.startswith(f"BYE sip:baresip-0x{headers(captured, 'Contact')[0].split('0x')[1].split('@')[0]}@")


# ------------------------------------------------------------ within the dialog


async def held_and_resumed(call: Replay, origin: str) -> None:
    """RFC 3264 §8.4: sendonly is answered recvonly, and back."""
    await call.call(message(origin, "invite"))
    held = await call.send(message(origin, "reinvite-hold"))
    assert held.startswith("SIP/2.0 200") and direction(held) == "recvonly"
    assert (await call.until(HoldChanged, is_held=True)).by == "caller"
    back = await call.send(message(origin, "reinvite-resume"))
    assert back.startswith("SIP/2.0 200") and direction(back) == "sendrecv"
    await call.until(HoldChanged, is_held=False)
    version = [re.findall(r"^o=\S+ \S+ (\d+)", answer, re.MULTILINE)[0] for answer in (held, back)]
    assert int(version[1]) == int(version[0]) + 1  # RFC 3264 §8: our session's version grows


async def test_hold_of_baresip_is_answered_recvonly_and_taken_back(worker):
    async with replay(worker) as call:
        await held_and_resumed(call, "baresip")


async def test_hold_of_pjsua2_is_answered_recvonly_and_taken_back(worker):
    async with replay(worker) as call:
        await held_and_resumed(call, "pjsua2")


async def test_bye_of_baresip_ends_the_call(worker):
    async with replay(worker) as call:
        await call.call(message("baresip", "invite"))
        assert (await call.send(message("baresip", "bye"))).startswith("SIP/2.0 200")
        ended = await call.until(LegDisconnected)
        assert (ended.by, ended.cause) == ("caller", "normal")


async def test_reinvite_of_baresip_in_no_dialog_of_ours_is_refused(worker):
    async with replay(worker) as call:
        await call.call(message("baresip", "invite"))
        tag, call.tag = call.tag, "another"
        assert (await call.send(message("baresip", "reinvite-hold"))).startswith("SIP/2.0 481")  # RFC 3261 §12.2.2
        call.tag = tag
        assert not call.of(HoldChanged)


# -------------------------------------------------------- OPTIONS and REGISTER


async def options(worker: WorkerProcess, origin: str, what: str) -> str:
    client = await WorkerClient.connect(worker.socket_path)
    call = Replay(worker, client)
    try:
        return await call.send(message(origin, what))
    finally:
        call.peer.close()
        await client.close()


@pytest.mark.parametrize(("origin", "what"), [("sipsak", "options"), ("kamailio", "options-ping")])
async def test_options_are_answered_with_what_we_can(worker, origin, what):
    """RFC 3261 §11.2. Kamailio's dispatcher leaves a worker out that does not answer it (ds_ping_reply_codes)."""
    answer = await options(worker, origin, what)
    assert answer.startswith("SIP/2.0 200")
    assert {"INVITE", "ACK", "BYE", "CANCEL", "OPTIONS", "INFO", "UPDATE"} <= set(
        re.split(r",\s*", headers(answer, "Allow")[0])
    )
    assert "application/sdp" in headers(answer, "Accept")[0] and "timer" in headers(answer, "Supported")[0]
    assert not headers(answer, "Record-Route") and to_tag(answer)


async def test_challenge_of_kamailio_is_answered_with_the_digest_it_asks_for(monkeypatch):
    """RFC 3261 §22.4: without qop, the digest of RFC 2069."""
    monkeypatch.setenv("TRUNK_PASSWORD", "sesame")
    registrar = RawPeer("127.0.0.1:9")
    trunk = TrunkConfig(
        name="carrier", hosts=(f"127.0.0.1:{registrar.port}",), registers=True, username="acme",
        password_env="TRUNK_PASSWORD", domain="carrier.test", options_s=0,
    )  # fmt: skip
    with await asyncio.to_thread(WorkerProcess, TelephonyConfig(sip_port=0, trunks=(trunk,))) as registering:
        client = await WorkerClient.connect(registering.socket_path)
        first = await asyncio.to_thread(register, registrar)
        assert not headers(first, "Authorization")
        challenge = message("kamailio", "register-challenge")
        registrar.socket.sendto(as_answer(challenge, first), registrar.target)
        second = await asyncio.to_thread(register, registrar)
        registrar.socket.sendto(as_answer(message("kamailio", "register-ok"), second), registrar.target)
        given = dict(re.findall(r'(\w+)="([^"]*)"', headers(second, "Authorization")[0]))
        asked = dict(re.findall(r'(\w+)="([^"]*)"', headers(challenge, "WWW-Authenticate")[0]))
        assert {name: given[name] for name in ("realm", "nonce")} == asked
        assert given["response"] == digest(given, "sesame")
        async with asyncio.timeout(8):
            while "registered" not in {trunk.state for trunk in client.trunks.values()}:  # noqa: ASYNC110 - the worker's
                await asyncio.sleep(0.02)
        await client.close()
        await asyncio.to_thread(registering.stop)
    registrar.close()


def register(registrar: RawPeer) -> str:
    while True:
        received, registrar.target = registrar.socket.recvfrom(65536)
        if received.startswith(b"REGISTER"):
            return received.decode()


def as_answer(captured: str, request: str) -> bytes:
    """A captured answer to a request of now: what an answer copies (RFC 3261 §8.2.6.2), and the contact."""
    for name in ("Via", "From", "Call-ID", "CSeq", "To", "Contact"):
        (value,) = headers(request, name)
        kept = re.findall(rf"^{name}:.*?(;tag=[^;\r]+|;expires=\d+)\r$", captured, re.MULTILINE)
        value += kept[0] if kept and name in ("To", "Contact") else ""
        captured = re.sub(rf"^{name}: .*\r$", f"{name}: {value}\r", captured, flags=re.MULTILINE)
    return captured.encode()


def digest(given: dict[str, str], password: str) -> str:
    def md5(text: str) -> str:
        return hashlib.md5(text.encode()).hexdigest()

    who = md5(f"{given['username']}:{given['realm']}:{password}")
    return md5(f"{who}:{given['nonce']}:{md5('REGISTER:' + given['uri'])}")


# ------------------------------------------------------------------ the folder


def test_every_capture_stands_in_the_folders_readme_with_its_origin():
    rows = dict(re.findall(r"^\| `([^`]+)` \| (\S+ \S+) \|", (FOLDER / "README.md").read_text(), re.MULTILINE))
    files = {path.name for path in FOLDER.iterdir() if path.name != "README.md"}
    assert rows.keys() == files and len(files) > 20
    assert all(name.startswith(origin.replace(" ", "-") + "-") for name, origin in rows.items())
    assert sum((FOLDER / name).stat().st_size for name in files) < 200_000
