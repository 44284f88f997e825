"""Where a SIP caller's voice lies in the recording: pjsip's jitter buffer places it by RTP timestamp on our clock.

A caller whose clock is wrong by far more than any crystal (0.5 %), over a line that loses 1 %: in 14 s the two clocks
part by 70 ms, and the recording's channels do not. users.md P15.
"""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest

pytest.importorskip("pjsua2")

from agent.bench_wire import rtp_address  # noqa: E402
from agent.lab import rtp  # noqa: E402
from agent.raw_sip_peer import RawPeer, to_tag  # noqa: E402
from telephony.client import WorkerClient  # noqa: E402
from telephony.config import TelephonyConfig  # noqa: E402
from telephony.leg import Answer  # noqa: E402
from telephony.process import WorkerProcess  # noqa: E402

pytestmark = [pytest.mark.live, pytest.mark.slow]
RATE, PACKET = rtp.RATE_HZ, 160
SECONDS, LOSS, CLICK_EVERY, SKEW = 14, 0.01, 25, 0.005


def click_away(peer: RawPeer, to: tuple[str, int]) -> list[float]:
    """A click every half second by the caller's own clock; when each really left, by the monotonic clock."""
    rng = np.random.default_rng(3)
    silent, loud = (rtp.encode(rtp.PCMU, np.full(PACKET, level)) for level in (0.0, 20_000.0))
    began_s, left_s = time.monotonic(), []
    for number in range(round(SECONDS / 0.02)):
        time.sleep(max(0.0, began_s + number * 0.02 / (1 + SKEW) - time.monotonic()))
        is_click = number % CLICK_EVERY == 10
        if rng.random() < LOSS and not is_click:
            continue
        if is_click:
            left_s.append(time.monotonic())
        packet = rtp.RtpPacket(rtp.PCMU, number & 0xFFFF, number * PACKET, 4711, loud if is_click else silent)
        peer.media.sendto(rtp.build(packet), to)
    return left_s


async def test_loss_and_a_wrong_clock_do_not_move_the_callers_channel() -> None:
    with WorkerProcess(TelephonyConfig(sip_port=0)) as worker:
        client = await WorkerClient.connect(worker.socket_path)
        peer = RawPeer(worker.address)
        peer.invite()
        leg = await asyncio.wait_for(anext(client.legs()), 5)
        found: list[tuple[float, float]] = []  # (position on the leg's clock, when we learned of it)

        def tap(start_sample: int, received: bytes, _sent: bytes) -> None:
            if np.abs(np.frombuffer(received, "<i2").astype(int)).max() > 8_000:
                found.append((start_sample / RATE, time.monotonic()))

        leg.set_tap(tap)
        reading = asyncio.create_task(_drain(leg))
        await leg.send(Answer(leg_id=leg.leg_id))
        answer = await asyncio.to_thread(peer.final)
        peer.request("ACK", to_tag=to_tag(answer))
        left_s = await asyncio.to_thread(click_away, peer, rtp_address(answer))
        await asyncio.sleep(0.3)
        leg.hang_up()
        peer.respond(await asyncio.to_thread(peer.receive, "BYE"), "200 OK")
        await reading
        await client.close()
        peer.close()
    # The leg's clock against ours: no frame is learned of before it was there, so the least difference is its offset.
    offset = min(learned - position for position, learned in found)
    heard_s = np.array([position for position, _ in found])
    onsets_s = heard_s[np.diff(heard_s, prepend=-1.0) > 0.2] + offset
    after = [onsets_s[onsets_s > at - 0.05] - at for at in left_s]
    delays = np.array([waited[0] for waited in after if len(waited) and waited[0] < 0.45])
    assert len(delays) >= 0.9 * len(left_s)
    assert abs(np.median(delays[-8:]) - np.median(delays[2:10])) <= 0.045  # the clocks have parted by 70 ms


async def _drain(leg) -> None:
    async for _ in leg.events():
        pass
