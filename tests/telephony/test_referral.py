"""An inbound REFER: refused unless the trunk allows the host; then the same leg goes on with the party it is sent to,
and the referrer reads the outcome in NOTIFYs (RFC 3515). users.md J2."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

pytest.importorskip("pjsua2")

from agent.raw_sip_peer import PCMU, RawPeer, header, to_tag  # noqa: E402
from telephony.client import WorkerClient  # noqa: E402
from telephony.config import TelephonyConfig  # noqa: E402
from telephony.leg import Answer, LegDisconnected, Referred  # noqa: E402
from telephony.process import WorkerProcess  # noqa: E402
from telephony.sip.referral import may_refer  # noqa: E402
from telephony.trunk_config import TrunkConfig  # noqa: E402

PBX = TrunkConfig(name="pbx", hosts=("127.0.0.1",), refer_hosts=("127.0.0.1",))


@pytest.fixture(scope="module")
def worker():
    with WorkerProcess(TelephonyConfig(sip_port=0, trunks=(PBX,))) as running:
        yield running


class Referrer:
    """A call of a PBX that can send us elsewhere; every NOTIFY is answered and kept."""

    def __init__(self, worker, client):
        self.peer, self.client, self.cseq = RawPeer(worker.address), client, 10
        self.peer.socket.settimeout(6)
        self.events, self.fragments = [], []

    async def come_in(self):
        self.peer.invite(PCMU)
        self.leg = await asyncio.wait_for(anext(self.client.legs()), 6)
        self.task = asyncio.create_task(self._collect())
        await self.leg.send(Answer(leg_id=self.leg.leg_id))
        ok = await asyncio.to_thread(self.peer.final)
        self.tag = to_tag(ok)
        self.peer.request("ACK", to_tag=self.tag)
        await asyncio.sleep(0.2)

    async def _collect(self):
        async for event in self.leg.events():
            self.events.append(event)

    async def refer(self, target):
        self.cseq += 1
        self.peer.request("REFER", self.cseq, self.tag, headers=f"Refer-To: <{target}>\r\n")
        return (await asyncio.to_thread(self.peer.final)).split()[1]

    def bye(self):
        self.cseq += 1
        self.peer.request("BYE", self.cseq, self.tag)

    async def notified(self, last):
        """Statuses of the NOTIFYs, up to this one."""
        while last not in self.fragments:
            notify = await asyncio.to_thread(self.peer.receive, "NOTIFY")
            assert header(notify, "Content-Type").startswith("message/sipfrag")
            self.peer.respond(notify, "200 OK")
            self.fragments.append(int(notify.partition("\r\n\r\n")[2].split()[1]))
        return self.fragments

    def of(self, kind):
        return [event for event in self.events if isinstance(event, kind)]

    async def until(self, kind, **fields):
        async with asyncio.timeout(8):
            while True:
                for event in self.of(kind):
                    if all(getattr(event, name) == value for name, value in fields.items()):
                        return event
                await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def referrer(worker):
    client = await WorkerClient.connect(worker.socket_path)
    caller = Referrer(worker, client)
    try:
        await caller.come_in()
        yield caller
    finally:
        caller.bye()  # theirs, because nobody here would answer ours and the worker would wait for 32 s
        await asyncio.sleep(0.3)
        caller.peer.close()
        caller.task.cancel()
        await client.close()


@pytest.fixture
def target(worker):
    peer = RawPeer(worker.address)
    peer.socket.settimeout(6)
    yield peer
    peer.close()


def loud_packets(peer, for_packets):
    peer.media.settimeout(3)
    return [peer.media.recv(2048) for _ in range(for_packets)]


async def test_referrer_reads_the_outcome_and_the_same_leg_goes_on_with_the_target(worker, target):
    async with referrer(worker) as call:
        assert await call.refer(f"sip:desk@127.0.0.1:{target.port}") == "202"
        invite = await asyncio.to_thread(target.receive, "INVITE")
        assert (await call.until(Referred)).target.endswith(f":{target.port}")
        target.respond(invite, "180 Ringing")
        target.respond(invite, "200 OK", target.sdp())
        assert await call.notified(200)
        await call.until(Referred, sip_status=200)
        call.bye()
        assert (await asyncio.to_thread(call.peer.final)).startswith("SIP/2.0 200")
        assert len(await asyncio.to_thread(loud_packets, target, 30)) == 30  # the agent's RTP goes there now
        assert not call.of(LegDisconnected)
        samples = []
        call.leg.set_tap(lambda start, _received, _sent: samples.append(start))
        await asyncio.sleep(0.5)
        assert len(samples) > 10 and len(set(samples)) == len(samples)  # one clock, and it goes on
        await hung_up(call, target)


async def test_referrer_that_leaves_at_once_does_not_end_the_call(worker, target):
    async with referrer(worker) as call:
        assert await call.refer(f"sip:desk@127.0.0.1:{target.port}") == "202"
        invite = await asyncio.to_thread(target.receive, "INVITE")
        call.bye()
        await asyncio.sleep(0.3)
        assert not call.of(LegDisconnected)
        target.respond(invite, "200 OK", target.sdp())
        await call.until(Referred, sip_status=200)
        assert len(await asyncio.to_thread(loud_packets, target, 20)) == 20
        await hung_up(call, target)


async def hung_up(call, target):
    """By the agent, whose BYE goes to the party it speaks to now."""
    call.leg.hang_up()
    target.respond(await asyncio.to_thread(target.receive, "BYE"), "200 OK")
    await call.until(LegDisconnected)


async def test_target_that_is_busy_leaves_the_call_as_it_was(worker, target):
    async with referrer(worker) as call:
        await call.refer(f"sip:desk@127.0.0.1:{target.port}")
        target.respond(await asyncio.to_thread(target.receive, "INVITE"), "486 Busy Here")
        assert (await call.notified(486))[-1] == 486
        await call.until(Referred, sip_status=486)
        await asyncio.sleep(0.3)
        assert not call.of(LegDisconnected)


@pytest.mark.parametrize("refer_to", ["sip:desk@192.0.2.1", "tel:+390212345", "sips:desk@127.0.0.1"])
async def test_host_that_the_trunk_does_not_list_is_refused(worker, refer_to):
    async with referrer(worker) as call:
        assert await call.refer(refer_to) == "603"
        assert not call.of(Referred)


def test_only_the_trunk_that_says_so_may_send_us_elsewhere():
    silent = TrunkConfig(name="carrier", hosts=("192.0.2.9",))
    config = TelephonyConfig(trunks=(PBX, silent))
    assert may_refer(config, "pbx", "sip:desk@127.0.0.1:5070")
    for trunk, target in (
        ("carrier", "sip:desk@127.0.0.1"),
        ("", "sip:desk@127.0.0.1"),
        ("pbx", "sip:a@127.0.0.1?X=1"),
    ):
        assert not may_refer(config, trunk, target)
    with pytest.raises(ValueError, match="refer_hosts"):
        TrunkConfig(name="t", hosts=("h",), refer_hosts=("a b",))
