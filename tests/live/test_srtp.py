"""SDES-SRTP (RFC 4568, RFC 3711) with baresip: encrypted audio crosses both ways, whoever calls; none is downgraded."""

from __future__ import annotations

import asyncio
import contextlib

import numpy as np
import pytest

pytest.importorskip("pjsua2")

from telephony.leg import Play  # noqa: E402
from tests.live.baresip import baresip, silence  # noqa: E402
from tests.live.lines_peers import line  # noqa: E402
from tests.live.sip_agent import RATE, similarity, tone_agent, until, warble  # noqa: E402

pytestmark = [pytest.mark.live, pytest.mark.peers("baresip")]

VOICE = warble(12.0, 500)  # as long as it takes: a busy machine damages some seconds of it
SOURCE = np.concatenate([silence(0.5), VOICE, silence(20)])


async def heard_by(peer):
    """What baresip decoded, once it has ended."""
    peer.press("q")
    await until(lambda: peer.process.poll() is not None)
    return peer.heard()


async def test_encrypted_call_to_us_is_heard_both_ways(tmp_path):
    async with tone_agent(srtp="mandatory") as agent:
        with baresip(tmp_path / "b", SOURCE, dial=f"sip:100@{agent.address}", mediaenc="srtp-mand") as peer:
            await until(lambda: agent.calls and len(agent.calls[0].heard) > 3 * 2 * RATE)
            await until(lambda: similarity(agent.calls[0].heard_samples(), VOICE) > 0.8)
            peer.press("b")
            await until(lambda: agent.calls[0].is_over.is_set())
            assert similarity(await heard_by(peer), agent.voice) > 0.8
            assert "AES_CM_128_HMAC_SHA1_80" in peer.text()


@pytest.mark.parametrize(("ours", "theirs"), [("mandatory", "srtp-mand"), ("optional", "srtp")])
async def test_call_of_ours_is_encrypted_as_it_is_configured(ours, theirs, tmp_path):
    agent_voice = warble(5.0, 300)
    async with line(srtp=ours) as near:
        with baresip(tmp_path / "b", SOURCE, mediaenc=theirs) as peer:
            await until(lambda: "ready" in peer.text() or "1 useragent" in peer.text().lower())
            call = await near.call(uri=f"sip:baresip@127.0.0.1:{peer.port}")
            await call.confirmed()
            play = Play(
                leg_id=call.leg.leg_id, item_id="v", pcm=agent_voice.tobytes(), sample_rate_hz=RATE, is_final=True
            )
            await call.leg.send(play)
            await until(lambda: len(call.samples) > 6 * 2 * RATE)
            await until(lambda: similarity(np.frombuffer(bytes(call.samples), "<i2"), VOICE) > 0.8)
            call.leg.hang_up()
            await call.ended()
            assert similarity(await heard_by(peer), agent_voice) > 0.8
            assert "AES_CM_128_HMAC_SHA1_80" in peer.text()


async def test_plain_call_is_refused_where_srtp_is_mandatory_and_so_is_ours_by_a_plain_party(tmp_path):
    async with tone_agent(srtp="mandatory") as agent:
        with baresip(tmp_path / "b", silence(20), dial=f"sip:100@{agent.address}") as peer:
            await until(lambda: "488" in peer.text())
            await asyncio.sleep(0.3)
            assert not agent.calls or (agent.calls[0].is_over.is_set() and not agent.calls[0].heard)
    async with line(srtp="mandatory") as near:
        with contextlib.ExitStack() as stack:
            peer = stack.enter_context(baresip(tmp_path / "c", silence(20)))
            await until(lambda: "ready" in peer.text())
            call = await near.call(uri=f"sip:baresip@127.0.0.1:{peer.port}")
            ended = await call.ended()
            assert ended.sip_status in (488, 415, 606), peer.text()[-2000:]
            assert not call.samples
