"""Comfort noise both ways. Ours leaves from the ACK on wherever nothing is played, survives G.711 and is nobody's
speech (users.md L10); a party's (RFC 3389) is silence to us, not loss and not speech."""

from __future__ import annotations

import asyncio
import itertools
import time

import numpy as np
import pytest

pytest.importorskip("pjsua2")

from agent.bench_wire import rtp_address  # noqa: E402
from agent.lab import rtp  # noqa: E402
from agent.raw_sip_peer import RawPeer, to_tag  # noqa: E402
from telephony.client import WorkerClient  # noqa: E402
from telephony.config import TelephonyConfig  # noqa: E402
from telephony.echo import LineEcho  # noqa: E402
from telephony.leg import Answer, AudioFrame, LegState, LegStateChanged, MediaHealth, Play, WireMetric  # noqa: E402
from telephony.playout import Playout  # noqa: E402
from telephony.voice_activity import VoiceActivity  # noqa: E402
from telephony.wire_metrics import VoicedEnergyMeter, dbov  # noqa: E402

WITH_NOISE = (
    "0 13 101",
    "a=rtpmap:0 PCMU/8000\r\na=rtpmap:13 CN/8000\r\na=rtpmap:101 telephone-event/8000\r\na=fmtp:101 0-15\r\n",
)
PCMA_ONLY = ("8 101", "a=rtpmap:8 PCMA/8000\r\na=rtpmap:101 telephone-event/8000\r\n")
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
    for _ in range(3):  # what comes late on a starved machine moves the edges of the silence
        heard, frames, health = await call_with_a_pause(near)
        loud = loud_packets(np.frombuffer(bytes(heard), "<i2").astype(float))
        first, last = np.flatnonzero(loud)[[0, -1]]
        quiet = np.flatnonzero(~loud[first:last])
        # In one piece: a late sender makes a hole in the tone.
        quiet = max(np.split(quiet, np.flatnonzero(np.diff(quiet) > 1) + 1), key=len)
        # What is made up for the packets that did not come dies away within 300 ms; then it is silent until the voice.
        if is_as_long := QUIET - 15 <= len(quiet) <= QUIET + 10:
            break
    assert is_as_long, len(quiet)
    assert not any(frame.voiced for frame in frames[first + quiet[0] + 20 : first + quiet[-1] - 5])
    assert (health[0].verdict, health[0].lost_in) == ("ok", 0)


async def call_with_a_pause(near):
    """(samples, frames, health) of a call whose party pauses."""
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
    return heard, frames, health


def loud_packets(samples: np.ndarray) -> np.ndarray:
    blocks = samples[: len(samples) // 160 * 160].reshape(-1, 160)
    loud: np.ndarray = np.sqrt(np.mean(blocks**2, axis=1)) > 500
    return loud


# ---------------------------------------------------------------------- ours

CONFIG = TelephonyConfig()
VOICE = np.full(800, 9_000, "<i2").tobytes()


def level(samples: np.ndarray) -> float:
    return dbov(float(np.mean(np.asarray(samples, float) ** 2)))


def pulled(playout: Playout, num_samples: int, size: int = 160, is_held: bool = False) -> np.ndarray:
    pcm = b"".join(playout.pull(size, is_held)[0] for _ in range(num_samples // size))
    return np.frombuffer(pcm, "<i2")


def test_noise_leaves_wherever_nothing_is_played_and_is_not_mixed_into_what_is():
    playout = Playout("leg", CONFIG)
    assert level(pulled(playout, 8_000)) == pytest.approx(CONFIG.comfort_noise_dbov, abs=0.5)
    playout.play("item", VOICE[:1_000])  # 3 packets and 20 samples; the rest of the item comes late
    sent = pulled(playout, 800)
    assert (sent[:500] == 9_000).all() and level(sent[500:]) == pytest.approx(CONFIG.comfort_noise_dbov, abs=2)
    playout.play("item", VOICE, is_final=True)
    assert (pulled(playout, 800) == 9_000).all()
    assert level(pulled(playout, 8_000)) == pytest.approx(CONFIG.comfort_noise_dbov, abs=0.5)


def test_noise_is_as_loud_while_the_agent_is_ducked_or_paused():
    playout = Playout("leg", CONFIG)
    playout.duck(-18.0)
    playout.play("item", VOICE)
    playout.pause()
    assert level(pulled(playout, 8_000)) == pytest.approx(CONFIG.comfort_noise_dbov, abs=0.5)
    playout.resume()
    assert level(pulled(playout, 1_600)[800:]) == pytest.approx(CONFIG.comfort_noise_dbov, abs=2)


def test_nothing_leaves_for_a_party_on_hold_nor_where_noise_is_switched_off():
    assert not pulled(Playout("leg", CONFIG), 1_600, is_held=True).any()
    assert not pulled(Playout("leg", TelephonyConfig(comfort_noise_dbov=0)), 1_600).any()


def test_noise_of_a_leg_depends_on_its_clock_alone():
    of_leg = pulled(Playout("leg", CONFIG), 96_000)
    assert np.array_equal(of_leg, pulled(Playout("leg", CONFIG), 96_000, size=480))
    assert np.array_equal(of_leg[:40_000], of_leg[40_000:80_000])  # a loop of five seconds
    assert np.corrcoef(of_leg, pulled(Playout("other leg", CONFIG), 96_000))[0, 1] < 0.1


@pytest.mark.parametrize("law", [rtp.PCMU, rtp.PCMA])
@pytest.mark.parametrize("noise_dbov", [-70.0, -65.0, -62.0])
def test_noise_survives_both_laws_and_is_voiced_nowhere(law, noise_dbov):
    noise = pulled(Playout("leg", TelephonyConfig(comfort_noise_dbov=noise_dbov)), 40_000)
    heard = rtp.DECODE[law][np.frombuffer(rtp.encode(law, noise), np.uint8)]
    assert level(heard) == pytest.approx(noise_dbov, abs=1)
    most_lenient = TelephonyConfig(vad_mode=0)
    for samples in (noise, heard):
        pcm = samples.astype("<i2").tobytes()
        assert not VoicedEnergyMeter("leg", "agent", CONFIG).push(pcm)
        activity = VoiceActivity(most_lenient)
        assert not any(activity.push(pcm[at : at + 320]) for at in range(0, len(pcm), 320))


def test_noise_is_nothing_to_cancel_so_the_callers_sound_comes_bit_for_bit():
    echo, playout = LineEcho(CONFIG), Playout("leg", CONFIG)
    caller = np.random.default_rng(1).integers(-3_000, 3_000, 80_000).astype("<i2").tobytes()
    for at in range(0, len(caller), 320):
        cleaned, is_echo = echo.push(caller[at : at + 320], playout.pull(160)[0])
        assert cleaned == caller[at : at + 320] and not is_echo


@pytest.mark.parametrize(
    ("setting", "said"),
    [({"comfort_noise_dbov": -50.0}, "-70 to -62, or 0"), ({"wire_voiced_dbov": -64.0}, "6 dB below wire_voiced_dbov")],
)
def test_noise_that_could_be_taken_for_speech_does_not_start(setting, said):
    with pytest.raises(ValueError, match=said):
        TelephonyConfig(**setting)


@pytest.mark.parametrize(("formats", "law"), [(WITH_NOISE, rtp.PCMU), (PCMA_ONLY, rtp.PCMA)])
async def test_from_the_ack_on_the_caller_hears_a_living_line(worker_pair, formats, law):
    """users.md L10. Nothing is played for a second; what the caller gets is what the recording's tap says was sent."""
    near, _ = worker_pair
    client = await WorkerClient.connect(near.socket_path)
    peer = RawPeer(near.address)
    peer.invite(formats)
    leg = await asyncio.wait_for(anext(client.legs()), 5)
    sent, events = bytearray(), []
    leg.set_tap(lambda _start, _received, agent: sent.extend(agent))

    async def listen():
        async for event in leg.events():
            events.append(event)

    listening = asyncio.create_task(listen())
    await leg.send(Answer(leg_id=leg.leg_id))
    peer.request("ACK", to_tag=to_tag(await asyncio.to_thread(peer.final)))
    heard = await asyncio.to_thread(heard_of, peer, 75, law)
    # pjsip sends silence by itself between its 200 and the ACK; the first tick of the leg's clock ends that for good.
    noise = list(itertools.dropwhile(lambda packet: len(set(packet.tolist())) == 1, heard))
    assert len(noise) > 25
    assert all(level(packet) == pytest.approx(CONFIG.comfort_noise_dbov, abs=3) for packet in noise)
    assert level(np.concatenate(noise)) == pytest.approx(CONFIG.comfort_noise_dbov, abs=1.5)
    assert [event.state for event in events if isinstance(event, LegStateChanged)][-1] is LegState.CONFIRMED
    assert "agent_onset" not in [event.kind for event in events if isinstance(event, WireMetric)]
    tone = (np.sin(np.arange(1_600) * 0.4) * 8_000).astype("<i2").tobytes()
    await leg.send(Play(leg_id=leg.leg_id, item_id="voice", pcm=tone, sample_rate_hz=RATE, is_final=True))
    heard += await asyncio.to_thread(heard_of, peer, 25, law)
    async with asyncio.timeout(10):
        while "agent_onset" not in [event.kind for event in events if isinstance(event, WireMetric)]:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    first_ticks = np.frombuffer(bytes(sent), "<i2")[: 20 * 160].astype(float)
    assert is_part_of(first_ticks, np.concatenate(heard).astype(float))
    leg.hang_up()
    peer.respond(await asyncio.to_thread(peer.receive, "BYE"), "200 OK")
    await listening
    await client.close()
    peer.close()


def heard_of(peer: RawPeer, num_packets: int, law: int) -> list[np.ndarray]:
    """The next packets, each of the law that was asked for."""
    peer.media.settimeout(5)
    packets = [rtp.parse(peer.media.recv(2_048)) for _ in range(num_packets)]
    assert {packet.payload_type for packet in packets} == {law}
    return [rtp.decode(packet) for packet in packets]


def is_part_of(samples: np.ndarray, whole: np.ndarray) -> bool:
    """These samples stand in the whole somewhere, but for what a law makes of them."""
    energy = np.concatenate([[0.0], np.cumsum(whole**2)])
    norms = np.sqrt(np.maximum(energy[len(samples) :] - energy[: -len(samples)], 1)) * np.linalg.norm(samples)
    return bool(np.max(np.correlate(whole, samples, "valid") / norms) > 0.9)
