"""TLS ends in the Kamailio of deploy/, and the call goes on to a worker in plain SIP on the private side."""

from __future__ import annotations

import asyncio
import contextlib
import re
from pathlib import Path

import pytest

pytest.importorskip("pjsua2")

from agent.raw_sip_peer import header, to_tag  # noqa: E402
from tests.live.lines_peers import MODULES, Kamailio, free_port, line  # noqa: E402
from tests.live.tls_peer import Authority, TlsPeer, connect  # noqa: E402

pytestmark = [
    pytest.mark.live,
    pytest.mark.peers("kamailio"),
    pytest.mark.skipif(not (MODULES / "tls.so").is_file(), reason="missing: kamailio-tls-modules"),
]

DEPLOYED = Path(__file__).parent.parent.parent / "deploy" / "kamailio"


@contextlib.contextmanager
def tls_proxy(folder: Path, authority: Authority, worker: str):
    """(Kamailio, its TLS port)"""
    own, port = authority.certificate("localhost"), free_port()
    tls = (DEPLOYED / "tls.cfg").read_text()
    tls = tls.replace("/etc/minmo/cert.pem", str(own.cert)).replace("/etc/minmo/key.pem", str(own.key))
    (folder / "tls.cfg").write_text(tls.replace("/etc/ssl/certs/ca-certificates.crt", str(authority.file)))
    (folder / "dispatcher.list").write_text(f"1 sip:{worker}\n")
    peer = Kamailio(
        folder / "kamailio", (DEPLOYED / "kamailio.cfg").read_text(), "-A", f'WORKERS="{folder}/dispatcher.list"',
        "-A", "WITH_TLS", "-A", f'TLS_FILE="{folder}/tls.cfg"', "-l", f"tls:127.0.0.1:{port}",
    )  # fmt: skip
    try:
        yield port
    finally:
        peer.stop()


def in_dialog(peer: TlsPeer, ok: str) -> str:
    """Sets the peer's target to what a 200 says (RFC 3261 §12.1.2); the Route headers."""
    peer.request_uri = re.search(r"<(.*)>", header(ok, "Contact")).group(1)
    routes = re.findall(r"^Record-Route:\s*(.*?)\s*$", ok, re.MULTILINE | re.IGNORECASE)
    entries = [entry.strip() for row in routes for entry in row.split(",")]
    return "".join(f"Route: {entry}\r\n" for entry in reversed(entries))


async def test_call_over_tls_reaches_a_worker_and_ends_from_either_side(tmp_path):
    authority = Authority(tmp_path)
    async with line(trusted_proxies=("127.0.0.1/32",)) as near:
        with tls_proxy(tmp_path, authority, near.address) as port:
            for who_ends in ("caller", "agent"):
                with contextlib.closing(await asyncio.to_thread(connect, port, authority)) as peer:
                    assert peer.socket.version() in ("TLSv1.2", "TLSv1.3")
                    peer.invite()
                    call = await near.next_call()
                    assert call.incoming.did == "100"
                    assert call.incoming.source_address == f"127.0.0.1:{peer.port}"  # the caller's, not the proxy's
                    ok = await asyncio.to_thread(peer.final)
                    assert ok.startswith("SIP/2.0 200") and "transport=tls" in header(ok, "Record-Route").lower() + ok
                    routes = in_dialog(peer, ok)
                    peer.request("ACK", to_tag=to_tag(ok), headers=routes)
                    await call.confirmed()
                    if who_ends == "caller":
                        peer.request("BYE", 2, to_tag=to_tag(ok), headers=routes)
                        assert (await asyncio.to_thread(peer.final)).startswith("SIP/2.0 200")
                    else:
                        call.leg.hang_up()
                        peer.respond(await asyncio.to_thread(peer.receive, "BYE"), "200 OK")
                    assert (await call.ended()).by == who_ends
