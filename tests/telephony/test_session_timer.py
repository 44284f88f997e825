"""Session timers by themselves (RFC 4028 §10): our refresh at half the interval, and our BYE when the party's does not
come. pjsip takes no interval below 90 s, so the worker's clock runs ten times as fast: clock_gettime behind a shim."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess
import time

import pytest

pytest.importorskip("pjsua2")

from agent.raw_sip_peer import RawPeer, header, to_tag  # noqa: E402
from telephony.client import WorkerClient  # noqa: E402
from telephony.config import TelephonyConfig  # noqa: E402
from telephony.leg import Answer, LegDisconnected  # noqa: E402
from telephony.process import WorkerProcess  # noqa: E402

CC = shutil.which("cc")
SPEED = 10
SHIM = f"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <time.h>
int clock_gettime(clockid_t id, struct timespec *t) {{
    static int (*real)(clockid_t, struct timespec *);
    static long long start;
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int rc = real(id, t);
    if (rc || (id != CLOCK_MONOTONIC && id != CLOCK_MONOTONIC_RAW)) return rc;
    long long now = t->tv_sec * 1000000000LL + t->tv_nsec;
    if (!start) start = now;
    now = start + (now - start) * {SPEED};
    t->tv_sec = now / 1000000000LL;
    t->tv_nsec = now % 1000000000LL;
    return 0;
}}
"""
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CC is None, reason="the shim needs a C compiler")]


@pytest.fixture(scope="module")
def fast_worker(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(SHIM)
    library = folder / "shim.so"
    subprocess.run([CC, "-shared", "-fPIC", "-o", library, folder / "shim.c", "-ldl"], check=True)
    config = TelephonyConfig(sip_port=0, rtp_timeout_s=0, agent_stall_s=120.0, agent_lost_hold_s=120.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LD_PRELOAD", str(library))
        worker = WorkerProcess(config)
    with worker:
        yield worker


@contextlib.asynccontextmanager
async def answered(worker, refresher):
    """A call of 90 s sessions: (peer, events of the leg)."""
    client = await WorkerClient.connect(worker.socket_path)
    peer, events = RawPeer(worker.address), []
    peer.socket.settimeout(20)
    peer.invite(
        headers=f"Supported: timer\r\nSession-Expires: 90;refresher={refresher}\r\nAllow: INVITE, UPDATE, BYE\r\n"
    )
    leg = await asyncio.wait_for(anext(client.legs()), 6)

    async def collect():
        async for event in leg.events():
            events.append(event)

    task = asyncio.create_task(collect())
    await leg.send(Answer(leg_id=leg.leg_id))
    ok = await asyncio.to_thread(peer.final)
    peer.request("ACK", to_tag=to_tag(ok))
    try:
        assert header(ok, "Session-Expires") == f"90;refresher={refresher}"
        yield peer, to_tag(ok), events
    finally:
        peer.request("BYE", 60, to_tag(ok))
        await asyncio.sleep(0.3)
        peer.close()
        task.cancel()
        await client.close()


async def test_we_refresh_a_session_at_half_of_it_and_it_goes_on(fast_worker):
    async with answered(fast_worker, "uas") as (peer, _, events):
        began = time.monotonic()
        seen: set[str] = set()
        while len(seen) < 2:  # T1 is 50 ms here: one that is answered later comes again
            refresh = await asyncio.to_thread(peer.receive, "UPDATE")
            seen.add(header(refresh, "CSeq"))
            assert header(refresh, "Session-Expires") == "90;refresher=uac"  # of this request we are the client
            peer.respond(refresh, "200 OK", headers="Require: timer\r\nSession-Expires: 90;refresher=uac\r\n")
        assert time.monotonic() - began > 0.9 * 90 / SPEED
        assert not [event for event in events if isinstance(event, LegDisconnected)]


async def test_session_that_the_party_does_not_refresh_ends_with_a_bye_of_ours(fast_worker):
    async with answered(fast_worker, "uac") as (peer, _, events):
        began = time.monotonic()
        bye = await asyncio.to_thread(peer.receive, "BYE")
        assert time.monotonic() - began > 0.9 * 60 / SPEED  # RFC 4028 §10: min(32 s, a third) before the end
        peer.respond(bye, "200 OK")
        async with asyncio.timeout(6):
            while not (ended := [event for event in events if isinstance(event, LegDisconnected)]):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert (ended[0].cause, ended[0].by) == ("network_error", "network")
