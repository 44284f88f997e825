"""How strong is the echo of a line: found on lines over G.711, on one that distorts, under a caller's voice, and in a
call whose peer sends our audio back. users.md P11: "echo-return check at answer"."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque

import numpy as np
import pytest

from agent.bench_wire import rtp_address
from agent.lab import rtp
from agent.raw_sip_peer import RawPeer, to_tag
from telephony.client import WorkerClient
from telephony.config import TelephonyConfig
from telephony.echo import LineEcho
from telephony.leg import Answer, EchoMeasured, Play
from telephony.loopback import LoopbackLeg
from telephony.wire import encode, ring_events
from tests.telephony.test_echo import (
    CONFIG,
    FRAME,
    RATE,
    agent_voice,
    caller_voice,
    echo_of,
    frames,
    needs_speex,
    over_g711,
    pcm,
)


def hiss(num_samples: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(num_samples) * 10


def talking(seconds_of_four: float) -> np.ndarray:
    """The caller's voice over 27 s, so many seconds of every four."""
    num_samples = 2 * len(agent_voice())
    voice = np.tile(caller_voice(), num_samples // len(caller_voice()) + 1)[:num_samples] * 0.6
    return np.where(np.arange(num_samples) % (4 * RATE) < seconds_of_four * RATE, voice, 0)


def measured(received: np.ndarray, config: TelephonyConfig = CONFIG) -> EchoMeasured | None:
    echo = LineEcho(config)
    echo.measure_return("l")
    sent = np.tile(agent_voice(), 2)
    for received_frame, sent_frame in frames(over_g711(received), sent):
        echo.push(received_frame, sent_frame)
        if (found := echo.take_measured()) is not None:
            return found
    return None


def echo_27_s(delay_ms: int, return_loss_db: float) -> np.ndarray:
    return echo_of(np.tile(agent_voice(), 2), delay_ms, return_loss_db)


def of_a_clipping_loudspeaker(delay_ms: int, return_loss_db: float) -> np.ndarray:
    """A speakerphone: driven too far, bent, in a room."""
    sent, rng = np.tile(agent_voice(), 2), np.random.default_rng(3)
    bent = np.clip(sent, -3_000, 3_000) + 0.3 * np.abs(sent)
    room = rng.standard_normal(480) * np.exp(-np.arange(480) / 100)
    echo = np.convolve(bent, room)[: len(sent)]
    echo *= np.sqrt(np.mean(sent**2) / np.mean(echo**2)) * 10 ** (-return_loss_db / 20)
    return np.concatenate([np.zeros(delay_ms * RATE // 1000), echo])[: len(sent)] + hiss(len(sent))


@needs_speex
@pytest.mark.parametrize("delay_ms", [80, 200])
@pytest.mark.parametrize("return_loss_db", [10, 20])
def test_delay_loss_and_what_is_removed_are_found(delay_ms, return_loss_db):
    found = measured(echo_27_s(delay_ms, return_loss_db))
    assert found.verdict == "cancelled"
    assert found.delay_ms == pytest.approx(delay_ms, abs=2)
    assert found.return_loss_db == pytest.approx(return_loss_db, abs=2)
    assert found.enhancement_db >= 10 and found.left_dbov < -50


def test_hiss_silence_noise_and_a_caller_who_talks_all_the_time_are_no_echo():
    num_samples = 2 * len(agent_voice())
    for received in (np.zeros(num_samples), hiss(num_samples), 10 * hiss(num_samples), talking(4)):
        assert measured(received).verdict == "none"


@needs_speex
@pytest.mark.parametrize("return_loss_db", [0, 10, 20])
def test_an_echo_that_a_loudspeaker_bends_is_found_and_strong(return_loss_db):
    found = measured(of_a_clipping_loudspeaker(120, return_loss_db))
    assert found.verdict == "strong" and found.enhancement_db < 7
    assert found.delay_ms == pytest.approx(120, abs=5)
    assert found.return_loss_db == pytest.approx(return_loss_db, abs=4)


def test_an_echo_that_nothing_cancels_is_strong():
    found = measured(echo_27_s(80, 10), TelephonyConfig(echo_canceller="off"))
    assert found.verdict == "strong" and found.enhancement_db == 0
    assert measured(echo_27_s(80, 30), TelephonyConfig(echo_canceller="off", vad_min_dbov=-40.0)).verdict == "cancelled"


@needs_speex
def test_the_callers_voice_is_not_taken_for_an_echo_that_is_left():
    half = measured(echo_27_s(80, 10) + talking(2))
    assert half.verdict == "cancelled" and half.return_loss_db == pytest.approx(10, abs=2)
    always = measured(echo_27_s(80, 10) + talking(4))
    assert always.verdict in ("unclear", "cancelled") and always.delay_ms == pytest.approx(80, abs=2)


@needs_speex
def test_a_delay_that_is_still_moving_is_waited_for():
    """Our jitter buffer finds its depth: 20 ms up or down each second, for 6 s."""
    lines = [echo_27_s(delay_ms, 10) for delay_ms in (80, 100, 120)]
    second = np.arange(len(lines[0])) // RATE
    found = measured(np.choose(np.minimum(second, 6) % 3, lines))
    assert found.verdict == "cancelled" and found.delay_ms == pytest.approx(80, abs=2)


def test_it_is_said_once_and_begins_with_the_answer():
    leg = LoopbackLeg("leg", echo_gain=0.3, echo_delay_ms=100)
    leg.ring()
    leg.send_now(Answer(leg_id="leg"))
    voice = pcm(np.tile(agent_voice(), 2))
    leg.send_now(Play(leg_id="leg", item_id="a1", pcm=voice, sample_rate_hz=RATE, is_final=True))
    leg.advance(4 * RATE)
    assert not [event for event in leg.drain() if isinstance(event, EchoMeasured)]
    leg.advance(20 * RATE)
    (found,) = [event for event in leg.drain() if isinstance(event, EchoMeasured)]
    assert found.delay_ms == pytest.approx(100, abs=2) and found.return_loss_db == pytest.approx(10.5, abs=2)
    assert ring_events.decode(encode(found)) == found


def test_where_no_echo_is_looked_for_none_is_measured():
    assert measured(echo_27_s(80, 10), TelephonyConfig(echo_max_delay_ms=0)) is None


# ------------------------------------------------------------------- on the wire


def send_back(peer: RawPeer, to: tuple[str, int], delay_ms: int, return_loss_db: float, done: threading.Event) -> None:
    """What a bad line does: every packet of ours, some packets later and quieter."""
    line: deque[bytes] = deque([bytes([0xFF]) * FRAME] * (delay_ms // 20))
    peer.media.settimeout(0.2)
    number = 0
    while not done.is_set():
        with contextlib.suppress(TimeoutError):
            packet = rtp.parse(peer.media.recv(2048))
            if packet is None or packet.payload_type != rtp.PCMU:
                continue
            heard = rtp.DECODE[rtp.PCMU][np.frombuffer(packet.payload, np.uint8)].astype(float)
            line.append(rtp.encode(rtp.PCMU, heard * 10 ** (-return_loss_db / 20)))
            peer.media.sendto(rtp.build(rtp.RtpPacket(rtp.PCMU, number, number * FRAME, 4711, line.popleft())), to)
            number += 1


@pytest.mark.slow
async def test_P11_a_peer_that_sends_our_audio_back_has_its_echo_measured(worker_pair):
    """The delay is the line's and that of our jitter buffer."""
    near, _ = worker_pair
    found = None
    for _ in range(3):  # a line that stands still while we are starved has no steady echo
        found = await echo_of_a_call(near)
        if found is not None and found.verdict != "none":
            break
    assert found is not None and found.verdict != "none"
    assert found.return_loss_db == pytest.approx(10, abs=2)
    assert 80 <= found.delay_ms <= 250


async def echo_of_a_call(near) -> EchoMeasured | None:
    client, peer, done = await WorkerClient.connect(near.socket_path), RawPeer(near.address), threading.Event()
    peer.invite()
    leg = await asyncio.wait_for(anext(client.legs()), 5)
    await leg.send(Answer(leg_id=leg.leg_id))
    answer = await asyncio.to_thread(peer.final)
    peer.request("ACK", to_tag=to_tag(answer))
    line = asyncio.create_task(asyncio.to_thread(send_back, peer, rtp_address(answer), 80, 10.0, done))
    voice = pcm(np.tile(agent_voice(), 2))
    await leg.send(Play(leg_id=leg.leg_id, item_id="a1", pcm=voice, sample_rate_hz=RATE, is_final=True))
    found = None
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(25):
            async for event in leg.events():
                if isinstance(event, EchoMeasured):
                    found = event
                    break
    done.set()
    await line
    leg.hang_up()
    peer.respond(await asyncio.to_thread(peer.receive, "BYE"), "200 OK")
    await client.close()
    peer.close()
    return found
