"""A browser that may use nothing but a TURN relay: coturn with credentials that end by themselves (make peers)."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("aiortc")
pytest.importorskip("pjsua2")

from aioice import stun, turn  # noqa: E402

from telephony.webrtc.tickets import ice_servers  # noqa: E402
from tests.live.browser import browser  # noqa: E402
from tests.live.served import what_was  # noqa: E402
from tests.live.test_webrtc_browser import (  # noqa: E402
    CAPTURE,
    FAKE_MEDIA,
    Running,
    begin_call,
    microphone,
    open_page,
    page_with_fake_engine,
)
from tests.live.turn_server import SECRET, TurnServer, turn_server  # noqa: E402

pytestmark = [pytest.mark.live, pytest.mark.slow]
# Keeps every connection that the page makes, to look at.
SPY = """
(() => {
  window.connections = [];
  const Real = RTCPeerConnection;
  window.RTCPeerConnection = class extends Real {
    constructor(...settings) { super(...settings); window.connections.push([this, settings[0]]); }
  };
})()
"""
# [type of our own candidate, packets received] of the path in use.
PATH = """
(async () => {
  const stats = [...(await window.connections[0][0].getStats()).values()];
  const pair = stats.find((row) => row.type === 'candidate-pair' && row.nominated && row.state === 'succeeded');
  const local = stats.find((row) => row.id === pair.localCandidateId);
  const inbound = stats.find((row) => row.type === 'inbound-rtp');
  return [local.candidateType, inbound.packetsReceived];
})()
"""


@pytest.mark.peers("chromium", "turnserver")
def test_a_browser_that_may_only_use_the_relay_talks_through_it(tmp_path: Path) -> None:
    async def run(server: TurnServer) -> None:
        settings = {"ice_urls": [server.url], "turn_secret_file": str(server.secret_file), "is_relay_only": True}
        async with page_with_fake_engine(tmp_path, **settings) as running:
            await asyncio.to_thread(call_through_the_relay, running)

    with turn_server(tmp_path / "turn") as server:
        asyncio.run(run(server))
        assert "ALLOCATE processed, success" in server.log.read_text()


def call_through_the_relay(running: Running) -> None:
    spoken = microphone(running.folder / "mic.wav", "order_status", 4.0, 3.0, times=8)
    with browser(running.folder, *FAKE_MEDIA, spoken) as page:
        open_page(page, running.url, running.token)
        page.value(SPY)
        call_id = begin_call(page)
        page.value(CAPTURE)
        page.wait("window.heard.length > 16000 * 10", 90)
        kind, packets = page.value(PATH)
        settings = page.value("window.connections[0][1]")
        loudest = page.value("window.heard.reduce((most, sample) => Math.max(most, sample), 0)")
        page.value("[...document.querySelectorAll('#call .danger')].at(-1).click()")
        page.wait("document.getElementById('call').dataset.state === 'idle'", 60)
    assert kind == "relay" and packets > 300 and loudest > 1_000
    assert settings["iceTransportPolicy"] == "relay"
    expires_at_s, _, name = settings["iceServers"][0]["username"].partition(":")
    assert name == "supervisor" and 0 < int(expires_at_s) - time.time() <= 600
    call = running.call(call_id)
    assert "where is my order" in what_was(call, "caller")
    assert np.abs(running.channel(call_id, 0)).max() > 1_000


async def allocate(server: TurnServer, expires_at_s: int, secret: bytes = SECRET.encode()) -> None:
    (entry,) = ice_servers((server.url,), secret, "ann", expires_at_s)
    transport, _ = await turn.create_turn_endpoint(
        asyncio.DatagramProtocol, server_addr=server.address, username=entry["username"], password=entry["credential"]
    )
    transport.close()
    await asyncio.sleep(0.1)


@pytest.mark.peers("turnserver")
def test_a_relay_takes_our_credentials_until_they_end_and_nobody_elses(tmp_path: Path) -> None:
    async def run(server: TurnServer) -> None:
        now_s = int(time.time())
        await allocate(server, now_s + 60)
        with pytest.raises(stun.TransactionFailed):
            await allocate(server, now_s - 1)
        with pytest.raises(stun.TransactionFailed):
            await allocate(server, now_s + 60, b"another-secret-altogether")

    with turn_server(tmp_path / "turn") as server:
        asyncio.run(run(server))
