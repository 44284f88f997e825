"""The verdict on a call's audio where the party's receiver reports speak of it (users.md L11, RFC 3550 §6.4.2).

A raw peer sends RTP, and reports as it is told. The other direction: tests/live/test_lines_trunks.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import struct

import pytest

pytest.importorskip("pjsua2")

from telephony.config import TelephonyConfig  # noqa: E402
from telephony.leg import MediaHealth  # noqa: E402
from telephony.process import WorkerProcess  # noqa: E402
from telephony.sip.media_health import level_of  # noqa: E402
from tests.telephony.call_control import ringing  # noqa: E402
from tests.telephony.test_rtp_source import rtp  # noqa: E402

VOICE = bytes([0x10, 0x90] * 80)  # 20 ms of PCMU, loud
HEALTH_AFTER_S = 1.0


@pytest.fixture(scope="module")
def worker():
    with WorkerProcess(TelephonyConfig(sip_port=0, health_after_s=HEALTH_AFTER_S)) as running:
        yield running


def receiver_report(about_ssrc: int, lost_of_256: int, num_lost: int, highest_sequence: int) -> bytes:
    """One report block, from SSRC 1."""
    lost = lost_of_256 << 24 | num_lost & 0xFFFFFF
    return struct.pack("!BBHIIIIIII", 0x81, 201, 7, 1, about_ssrc, lost, highest_sequence, 0, 0, 0)


@pytest.mark.parametrize(
    ("share_lost", "verdict"),
    [(1.0, "one_way_out_missing"), (0.2, "ok"), (None, "ok")],
    ids=["all", "some", "no reports"],
)
async def test_ours_that_do_not_arrive_are_named_when_the_partys_reports_say_so(worker, share_lost, verdict):
    async with ringing(worker) as call:
        ok = await call.answer()
        host, port = "127.0.0.1", int(re.search(r"m=audio (\d+)", ok).group(1))
        ours = await asyncio.to_thread(call.peer.media.recv, 2048)  # RTP flows with nothing to say, too
        first, our_ssrc = struct.unpack("!H", ours[2:4])[0], struct.unpack("!I", ours[8:12])[0]
        sequence, health = 0, []
        call.peer.media.setblocking(False)
        while not health:
            call.peer.media.sendto(rtp(sequence, VOICE), (host, port))
            with contextlib.suppress(BlockingIOError):
                while True:  # however late either side is: the reports count what was really sent
                    ours = call.peer.media.recv(2048)
            num_ours = (struct.unpack("!H", ours[2:4])[0] - first & 0xFFFF) + 1
            if share_lost is not None and sequence % 10 == 9:
                lost = receiver_report(our_ssrc, int(255 * share_lost), int(num_ours * share_lost), first + num_ours)
                call.peer.media.sendto(lost, (host, port + 1))
            sequence += 1
            await asyncio.sleep(0.02)
            health = call.of(MediaHealth)
    assert health[0].verdict == verdict, health[0]
    assert health[0].packets_in > 20 and health[0].packets_out > 20


def test_level_is_the_mean_magnitude_on_the_scale_of_mu_law():
    assert [level_of(struct.pack("<2h", value, -value)) for value in (0, 64, 1_000, 32_767)] == [0, 8, 49, 127]
    assert level_of(b"") == 0
