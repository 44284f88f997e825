"""Trunks against a registrar nobody here wrote (Kamailio): REGISTER, digest, failover, and who calls whom."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

pytest.importorskip("pjsua2")

from agent.raw_sip_peer import RawPeer  # noqa: E402
from telephony.leg import Hangup, LegState, LegStateChanged, MediaHealth  # noqa: E402
from telephony.trunk_config import TrunkConfig  # noqa: E402
from tests.live.lines_peers import Kamailio, line, sipp_callee  # noqa: E402
from tests.live.sip_agent import until  # noqa: E402

pytestmark = [pytest.mark.live, pytest.mark.peers("kamailio", "sipp")]

CONFIG = Path(__file__).with_name("registrar.cfg").read_text()
DEAD = "127.0.0.1:9"  # the discard port: nobody answers


@pytest.fixture(autouse=True)
def password(monkeypatch):
    monkeypatch.setenv("TRUNK_PASSWORD", "sesame")


@contextlib.asynccontextmanager
async def carrier(folder: Path) -> AsyncIterator[Kamailio]:
    with sipp_callee(folder) as callee:
        peer = await asyncio.to_thread(Kamailio, folder / "kamailio", CONFIG.replace("CALLEE", callee))
        try:
            yield peer
        finally:
            peer.stop()


def trunk(address: str, **settings: object) -> TrunkConfig:
    return TrunkConfig(**({
        "name": "carrier", "hosts": (address,), "username": "acme", "password_env": "TRUNK_PASSWORD",
        "domain": "carrier.test", "failover_s": 1.0,
    } | settings))  # fmt: skip


async def registered(near, name="carrier"):
    await until(lambda: near.client.trunks.get(name) is not None)
    return near.client.trunks[name]


@pytest.mark.parametrize("transport", ["udp", "tcp"])
async def test_P5_registered_trunk_gets_its_calls_with_the_number_that_was_dialled(transport, tmp_path):
    async with carrier(tmp_path) as kam:
        settings = trunk(kam.address, registers=True, did_from="to", transport=transport, domain="127.0.0.1")
        async with line(trunks=(settings,), transports=("udp", "tcp")) as near:
            assert (await registered(near)).state == "registered"
            peer = RawPeer(kam.address)
            peer.request_uri, peer.to_uri = f"sip:acme@127.0.0.1:{kam.port}", "sip:+390212345@carrier.test"
            peer.invite()
            call = await near.next_call()
            assert (call.incoming.trunk, call.incoming.did, call.incoming.ani) == ("carrier", "+390212345", "raw")
            ok = await asyncio.to_thread(peer.final)
            assert ok.startswith("SIP/2.0 200")
            await call.leg.send(Hangup(leg_id=call.leg.leg_id))
            peer.close()


async def test_of_two_workers_exactly_one_registers(tmp_path):
    async with carrier(tmp_path) as kam:
        trunks = (trunk(kam.address, registers=True),)
        front = "127.0.0.1:5999"
        async with (
            line(trunks=trunks, contact_address=front) as first,
            line(trunks=trunks, is_registrar=False) as second,
        ):
            await registered(first)
            await asyncio.sleep(1.0)
            (seen,) = kam.lines("REGISTER from")
            assert f"acme@{front}" in seen  # the proxy in front of the pool, not the worker
            assert first.client.trunks and not second.client.trunks


async def test_wrong_password_is_reported_and_not_tried_in_a_loop(tmp_path, monkeypatch):
    monkeypatch.setenv("TRUNK_PASSWORD", "wrong")
    async with carrier(tmp_path) as kam:
        async with line(trunks=(trunk(kam.address, registers=True),)) as near:
            changed = await registered(near)
            assert (changed.state, changed.sip_status) in (("refused", 401), ("refused", 403))
            await asyncio.sleep(1.0)
            assert not kam.lines("REGISTER from")


async def test_call_out_is_authenticated_and_shows_our_number(tmp_path):
    async with carrier(tmp_path) as kam:
        settings = trunk(kam.address, caller_id="+390299999", is_identity_trusted=True)
        async with line(trunks=(settings,)) as near:
            call = await near.call(number="+391111")
            await call.confirmed()
            (seen,) = kam.lines("INVITE of")
            assert "INVITE of acme for +391111 from +390299999" in seen and "sip:+390299999@carrier.test" in seen
            await call.leg.send(Hangup(leg_id=call.leg.leg_id))
            assert (await call.ended()).cause == "normal"


@pytest.mark.parametrize(("number", "cause", "status"), [("busy", "busy", 486), ("broken", "overloaded", 503)])
async def test_refused_call_out_ends_with_its_cause(number, cause, status, tmp_path):
    async with carrier(tmp_path) as kam:
        async with line(trunks=(trunk(kam.address),)) as near:
            ended = await (await near.call(number=number)).ended()
            assert (ended.cause, ended.sip_status) == (cause, status)


async def test_silent_host_is_left_for_the_next_and_the_call_is_one_leg(tmp_path):
    async with carrier(tmp_path) as kam:
        settings = trunk(kam.address, hosts=(DEAD, kam.address))
        async with line(trunks=(settings,)) as near:
            call = await near.call(number="+391111")
            await call.confirmed()
            states = [event.state for event in call.of(LegStateChanged)]
            assert states.count(LegState.CALLING) == 1 and LegState.DISCONNECTED not in states
            await call.leg.send(Hangup(leg_id=call.leg.leg_id))
            assert (await call.ended()).cause == "normal"


async def test_trunk_that_answers_503_is_left_for_the_next_trunk(tmp_path):
    async with carrier(tmp_path) as kam:
        with sipp_callee(tmp_path) as other:
            trunks = (trunk(kam.address), TrunkConfig(name="other", hosts=(other,), failover_s=1.0))
            async with line(trunks=trunks) as near:
                call = await near.call(number="broken", trunks=("carrier", "other"))
                await call.confirmed()
                await call.leg.send(Hangup(leg_id=call.leg.leg_id))
                await call.ended()


async def test_options_tell_which_host_answers_and_the_dead_one_is_tried_last(tmp_path):
    async with carrier(tmp_path) as kam:
        settings = trunk(kam.address, hosts=(DEAD, kam.address), options_s=5, failover_s=4.0)
        async with line(trunks=(settings,)) as near:
            await until(lambda: "carrier" in near.client.trunks and near.client.trunks["carrier"].state == "down")
            call = await near.call(number="+391111")
            await call.confirmed(3.5)  # less than failover_s: the dead host was not asked
            await call.leg.send(Hangup(leg_id=call.leg.leg_id))
            await call.ended()


async def test_L11_one_way_audio_is_named_two_seconds_after_the_answer(tmp_path):
    """users.md L11: greeting plays, then silence."""
    async with line() as near:
        with sipp_callee(tmp_path) as callee:  # SIPp's answering scenario sends no RTP
            call = await near.call(uri=f"sip:100@{callee}")
            await call.confirmed()
            health = await call.until(MediaHealth)
            assert (health.verdict, health.packets_in, health.codec) == ("one_way_in_missing", 0, "PCMU/8000")
            assert health.packets_out > 50
            await call.leg.send(Hangup(leg_id=call.leg.leg_id))
            await call.ended()
