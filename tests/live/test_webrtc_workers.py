"""Several processes for browsers behind one page: each call stays with its process, a full house is a clear 503."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest

pytest.importorskip("aiortc")
pytest.importorskip("pjsua2")

from telephony.webrtc.ice import gather_only_on  # noqa: E402
from telephony.webrtc.peer import BrowserPeer  # noqa: E402
from tests.live.test_webrtc_browser import Running, page_with_fake_engine  # noqa: E402

pytestmark = [pytest.mark.live, pytest.mark.slow]


@pytest.fixture(autouse=True)
def loopback_only(monkeypatch: pytest.MonkeyPatch) -> None:
    import aioice.ice

    monkeypatch.setattr(aioice.ice, "get_host_addresses", aioice.ice.get_host_addresses)
    gather_only_on("127.0.0.1")


class Site:
    """A page of one's own: signs in once, starts calls by HTTP."""

    def __init__(self, running: Running) -> None:
        self._origin, self._token = running.url.rstrip("/"), running.token
        self._client = httpx.AsyncClient(base_url=self._origin, headers={"origin": self._origin}, timeout=40)

    async def __aenter__(self) -> Site:
        answer = await self._client.post("/login", data={"token": self._token})
        assert answer.status_code == 303, answer.text
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def offer(self, peer: BrowserPeer) -> httpx.Response:
        ticket = (await self._client.post("/api/browser-calls/tokens", json={"did": "100"})).json()
        return await self._client.post("/api/browser-calls", json={"token": ticket["token"], "sdp": await peer.offer()})

    async def call(self, peer: BrowserPeer) -> str:
        answer = await self.offer(peer)
        assert answer.status_code == 200, answer.text
        assert await peer.take(answer.json()["sdp"]) == ""
        return str(answer.json()["call_id"])


async def ended(running: Running, call_id: str) -> dict:
    async with asyncio.timeout(20):
        while (call := running.call(call_id))["state"] != "closed":  # noqa: ASYNC110 - another process writes it
            await asyncio.sleep(0.1)
    return call


async def test_two_processes_take_a_call_each_the_third_is_refused_and_a_place_that_is_free_is_found(
    tmp_path: Path,
) -> None:
    async with page_with_fake_engine(tmp_path, num_workers=2, max_calls=1) as running, Site(running) as site:
        peers = [BrowserPeer() for _ in range(4)]
        first, second = [await site.call(peer) for peer in peers[:2]]
        refused = await site.offer(peers[2])
        assert refused.status_code == 503 and refused.json()["error"] == "all lines are busy"
        assert int(refused.headers["retry-after"]) > 0
        await asyncio.sleep(2.0)
        peers[1].control.send('{"hangup": true}')  # over the connection itself: it cannot reach the other process
        assert (await ended(running, second))["ended_by"] == "caller"
        assert running.call(first)["state"] != "closed"
        third = await site.call(peers[3])
        await asyncio.sleep(1.0)
        for peer in peers:
            await peer.hang_up()
        for call_id in (first, third):
            call = await ended(running, call_id)
            assert (call["ended_by"], call["codec"]) == ("caller", "opus/48000")
    assert all(len(peer.gaps_ms(0.0)) > 25 for peer in (peers[0], peers[1], peers[3]))  # each heard the agent
    assert peers[2].gaps_ms(0.0) == []
