"""A party that sends comfort noise instead of silence (RFC 3389): to us that is silence, not loss and not speech."""

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
from telephony.leg import Answer, AudioFrame, MediaHealth  # noqa: E402

WITH_NOISE = (
    "0 13 101",
    "a=rtpmap:0 PCMU/8000\r\na=rtpmap:13 CN/8000\r\na=rtpmap:101 telephone-event/8000\r\na=fmtp:101 0-15\r\n",
)
COMFORT_NOISE = 13
_NOISE_LEVEL = bytes([58])  # -58 dBov, RFC 3389 §3.1
SPEECH, QUIET = 50, 100  # packet times: 1 s and 2 s
RATE = rtp.RATE_HZ


def talk_and_pause(peer: RawPeer, to: tuple[str, int]) -> None:
    """Tone, then comfort noise every 200 ms and nothing else, then tone: in real time, the stamps going on."""
    tone = (np.sin(2 * np.pi * 440 * np.arange(160) / RATE) * 8_000).astype(float)
    codes, began_s, number = rtp.encode(rtp.PCMU, tone), time.monotonic(), 0
    for tick in range(SPEECH + QUIET + SPEECH):
        time.sleep(max(0.0, began_s + tick * 0.02 - time.monotonic()))
        is_quiet = SPEECH <= tick < SPEECH + QUIET
        if is_quiet and (tick - SPEECH) % 10:
            continue
        packet = rtp.RtpPacket(
            COMFORT_NOISE if is_quiet else rtp.PCMU, number, tick * 160, 4711, _NOISE_LEVEL if is_quiet else codes,
            is_marked=tick == SPEECH + QUIET,
        )  # fmt: skip
        peer.media.sendto(rtp.build(packet), to)
        number += 1


async def test_comfort_noise_is_heard_as_silence_and_the_voice_after_it_at_once(worker_pair):
    near, _ = worker_pair
    client = await WorkerClient.connect(near.socket_path)
    peer = RawPeer(near.address)
    peer.invite(WITH_NOISE)
    leg = await asyncio.wait_for(anext(client.legs()), 5)
    heard, frames, health = bytearray(), [], []
    leg.set_tap(lambda _start, received, _sent: heard.extend(received))

    async def listen():
        async for event in leg.events():
            if isinstance(event, AudioFrame):
                frames.append(event)
            elif isinstance(event, MediaHealth):
                health.append(event)

    listening = asyncio.create_task(listen())
    await leg.send(Answer(leg_id=leg.leg_id))
    answer = await asyncio.to_thread(peer.final)
    peer.request("ACK", to_tag=to_tag(answer))
    await asyncio.to_thread(talk_and_pause, peer, rtp_address(answer))
    await asyncio.sleep(0.3)
    leg.hang_up()
    peer.respond(await asyncio.to_thread(peer.receive, "BYE"), "200 OK")
    await listening
    await client.close()
    peer.close()
    loud = loud_packets(np.frombuffer(bytes(heard), "<i2").astype(float))
    first, last = np.flatnonzero(loud)[[0, -1]]
    quiet = np.flatnonzero(~loud[first:last])
    # What is made up for the packets that did not come dies away within 300 ms; then it is silent until the voice.
    assert quiet[-1] - quiet[0] + 1 == len(quiet)
    assert QUIET - 15 <= len(quiet) <= QUIET + 10
    assert not any(frame.voiced for frame in frames[first + quiet[0] + 20 : first + quiet[-1] - 5])
    assert (health[0].verdict, health[0].lost_in) == ("ok", 0)


def loud_packets(samples: np.ndarray) -> np.ndarray:
    blocks = samples[: len(samples) // 160 * 160].reshape(-1, 160)
    loud: np.ndarray = np.sqrt(np.mean(blocks**2, axis=1)) > 500
    return loud
