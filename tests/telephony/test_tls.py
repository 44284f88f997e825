"""A trunk over TLS: its certificate must be of the configured authority and bear its name; else not a word is said."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

pytest.importorskip("pjsua2")

from telephony.config import TelephonyConfig  # noqa: E402
from telephony.process import WorkerFailed, WorkerProcess  # noqa: E402
from telephony.trunk_config import TrunkConfig  # noqa: E402
from tests.live.lines_peers import free_port, line  # noqa: E402
from tests.live.sip_agent import until  # noqa: E402
from tests.live.tls_peer import Authority, TlsDoor  # noqa: E402

WITHOUT_PORT = "127.0.0.77"  # a loopback address of its own, so that 5061 is free there


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("tls"))


@contextlib.contextmanager
def door(certificate, *address):
    made = TlsDoor(certificate, *address)
    try:
        yield made
    finally:
        made.close()


def secured(authority, host, **trunk):
    own = authority.certificate("localhost")
    return {
        "transports": ("udp", "tls"), "tls_port": free_port(), "tls_cert_file": str(own.cert),
        "tls_key_file": str(own.key), "tls_ca_file": str(authority.file), "accepts_old_openssl": True,
        "trunks": (TrunkConfig(name="secure", hosts=(host,), transport="tls", **trunk),),
    }  # fmt: skip


async def test_call_by_a_tls_trunk_goes_out_and_its_options_are_answered(authority):
    """The host names no port: 5061 (RFC 3261 §19.1.2)."""
    with door(authority.certificate(WITHOUT_PORT), WITHOUT_PORT, 5061) as carrier:
        accepting = asyncio.create_task(asyncio.to_thread(carrier.accept))
        async with line(**secured(authority, WITHOUT_PORT, options_s=5)) as near:
            peer = await accepting
            try:
                peer.respond(await asyncio.to_thread(peer.receive, "OPTIONS"), "200 OK")
                await until(lambda: "secure" in near.client.trunks)
                assert near.client.trunks["secure"].state == "up"
                call = await near.call(number="+391111")
                invite = await asyncio.to_thread(peer.receive, "INVITE")
                assert invite.startswith(f"INVITE sip:+391111@{WITHOUT_PORT};transport=tls SIP/2.0")
                assert "Via: SIP/2.0/TLS" in invite
                peer.respond(invite, "200 OK", peer.sdp())
                await asyncio.to_thread(peer.receive, "ACK")
                await call.confirmed()
                call.leg.hang_up()
                peer.respond(await asyncio.to_thread(peer.receive, "BYE"), "200 OK")
                await call.ended()
            finally:
                peer.close()


@pytest.mark.parametrize("wrong", ["authority", "name"])
async def test_trunk_with_a_wrong_certificate_is_not_called(authority, wrong, tmp_path):
    if wrong == "authority":
        certificate = Authority(tmp_path, "other").certificate("localhost")
    else:
        certificate = authority.certificate("elsewhere.example")
    with door(certificate) as impostor:
        async with line(**secured(authority, f"localhost:{impostor.port}")) as near:
            accepting = asyncio.create_task(asyncio.to_thread(impostor.accept))
            call = await near.call(number="+391111")
            assert (await call.ended()).cause in ("overloaded", "network_error")
            with pytest.raises(OSError):  # refused in the handshake, or closed before a word
                with contextlib.closing(await accepting) as peer:
                    await asyncio.to_thread(peer.receive, "INVITE")


@pytest.mark.parametrize("content", [None, "no certificate", "the system's"])
def test_file_of_authorities_that_is_none_or_too_long_stops_the_start(content, authority, tmp_path, capfd):
    path = tmp_path / "authorities.pem"
    if content == "no certificate":
        path.write_text(content)
    elif content:
        path.write_text("".join(Authority(tmp_path, f"a{n}").file.read_text() for n in range(51)))
    settings = secured(authority, "localhost") | {"sip_port": 0, "tls_ca_file": str(path)}
    with pytest.raises(WorkerFailed):
        WorkerProcess(TelephonyConfig(**settings))
    assert f"telephony.tls_ca_file = '{path}': must " in capfd.readouterr().err


def test_tls_trunk_needs_an_authority():
    trunk = TrunkConfig(name="secure", hosts=("sip.example",), transport="tls")
    files = {"tls_cert_file": "c", "tls_key_file": "k", "transports": ("udp", "tls")}
    with pytest.raises(ValueError, match=r"trunks\['secure'\].transport = 'tls': tls needs telephony\.tls_ca_file"):
        TelephonyConfig(trunks=(trunk,), **files)
    assert (trunk.default_port, TrunkConfig(name="t", hosts=("h",)).default_port) == (5061, 5060)
