"""G.722 end to end: speech coded by an encoder nobody here wrote (FFmpeg's) is heard by the agent up to 7 kHz, and what
the agent says can be decoded by FFmpeg. users.md J11. ITU-T G.722, RFC 3551 §4.5.2.

The clip is "she sells six fresh fish" of espeak-ng (voice gmw/en-US+m7) at 16 kHz: its hisses lie above 4 kHz, where a
call over G.711 carries nothing.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import av
import numpy as np
import pytest

pytest.importorskip("pjsua2")

from agent.bench_wire import rtp_address  # noqa: E402
from agent.lab import rtp  # noqa: E402
from telephony.clips import read_clip  # noqa: E402
from telephony.config import TelephonyConfig  # noqa: E402
from telephony.leg import LegState, LegStateChanged, Play, PlayoutProgress  # noqa: E402
from telephony.process import WorkerProcess  # noqa: E402
from tests.telephony.call_control import ringing  # noqa: E402

RATE = 16_000
PIECE = RATE // 10
G722, PACKET_BYTES, TICKS = 9, 160, 160  # RFC 3551 §4.5.2: 20 ms are 320 samples, and 160 ticks of its RTP clock
OFFER = ("9 101", "a=rtpmap:9 G722/8000\r\na=rtpmap:101 telephone-event/8000\r\n")
CLIP = np.frombuffer(read_clip(Path(__file__).parent.parent / "fixtures/speech/wideband.flac", RATE), "<i2")
WHOLE, HIGH = (50.0, 7_000.0), (4_000.0, 7_000.0)  # bands, Hz


def encoded(pcm: np.ndarray) -> list[bytes]:
    """By FFmpeg, a packet each 20 ms."""
    coder = av.CodecContext.create("g722", "w")
    coder.sample_rate, coder.format, coder.layout = RATE, "s16", "mono"
    frame = av.AudioFrame.from_ndarray(pcm[None, : len(pcm) // 320 * 320], format="s16", layout="mono")
    frame.sample_rate = RATE
    data = b"".join(bytes(packet) for packet in [*coder.encode(frame), *coder.encode(None)])
    return [data[at : at + PACKET_BYTES] for at in range(0, len(data), PACKET_BYTES)]


def decoded(payload: bytes) -> np.ndarray:
    coder = av.CodecContext.create("g722", "r")
    coder.sample_rate, coder.layout = RATE, "mono"
    frames = [*coder.decode(av.Packet(payload)), *coder.decode(None)]
    return np.concatenate([frame.to_ndarray().reshape(-1) for frame in frames])


def at(loudness: float) -> np.ndarray:
    return np.clip(CLIP * loudness, -32768, 32767).astype("<i2")


def band(samples: np.ndarray, limits_hz: tuple[float, float]) -> np.ndarray:
    """Only what lies in this band."""
    spectrum, frequencies = np.fft.rfft(samples.astype(float)), np.fft.rfftfreq(len(samples), 1 / RATE)
    return np.fft.irfft(spectrum * ((frequencies >= limits_hz[0]) & (frequencies < limits_hz[1])), len(samples))


def best_match(heard: np.ndarray, piece: np.ndarray) -> tuple[float, float]:
    """Where this piece is most alike: (normalised correlation, level against the piece in dB)."""
    products = np.correlate(heard, piece, "valid")
    energy = np.concatenate([[0.0], np.cumsum(heard**2)])
    norms = np.sqrt(np.maximum(energy[len(piece) :] - energy[: -len(piece)], 1.0))
    at = int(np.argmax(products / norms))
    power = float(np.sum(piece**2))
    return float(products[at] / norms[at] / np.sqrt(power)), float(20 * np.log10(norms[at] / np.sqrt(power)))


def likeness(heard: np.ndarray, limits_hz: tuple[float, float]) -> tuple[float, float]:
    """Medians over the clip's loud tenths of a second in this band.

    Medians, and pieces: a jitter buffer that grows or shrinks on a busy machine moves what follows by a packet.
    """
    sound, clip = band(heard, limits_hz), band(CLIP, limits_hz)
    pieces = clip[: len(clip) // PIECE * PIECE].reshape(-1, PIECE)
    power = np.mean(pieces**2, axis=1)
    loud = pieces[power > power.max() / 30]
    assert len(loud) >= 4
    correlation, level_db = np.median([best_match(sound, piece) for piece in loud], axis=0)
    return float(correlation), float(level_db)


def assert_is_the_clip(heard: np.ndarray) -> None:
    for limits_hz in (WHOLE, HIGH):
        correlation, level_db = likeness(heard, limits_hz)
        assert correlation > 0.9, (limits_hz, correlation)
        assert abs(level_db) < 2, (limits_hz, level_db)


def test_clip_that_went_through_a_narrow_band_would_not_pass() -> None:
    assert_is_the_clip(decoded(b"".join(encoded(CLIP))))
    with pytest.raises(AssertionError):
        assert_is_the_clip(band(CLIP, (50.0, 3_900.0)))


@pytest.fixture(scope="module")
def wide_worker():
    with WorkerProcess(TelephonyConfig(sip_port=0, codecs=("G722/16000", "PCMU/8000"))) as running:
        yield running


async def test_J11_wideband_is_negotiated_and_makes_the_leg_16_khz(wide_worker):
    async with ringing(wide_worker, OFFER) as call:
        ok = await call.answer()
        assert "G722/8000" in ok  # RFC 3551 §4.5.2: its RTP clock is 8000 while the audio is 16000
        confirmed = await call.until(LegStateChanged, state=LegState.CONFIRMED)
        assert (confirmed.codec, call.leg.sample_rate_hz) == ("G722/16000", RATE)


@pytest.mark.parametrize("loudness", [0.1, 1.25])
async def test_speech_in_g722_of_another_encoder_is_heard_by_the_agent_as_loud_and_above_4_khz_too(
    wide_worker, loudness
):
    """1.25: its peaks are cut off, as those of a caller who shouts."""
    async with ringing(wide_worker, OFFER) as call:
        assert_is_the_clip(await agent_hears(call, await call.answer(), loudness) / loudness)


async def agent_hears(call, ok, loudness: float) -> np.ndarray:
    heard = bytearray()
    call.leg.set_tap(lambda _start, received, _sent: heard.extend(received))
    said = np.concatenate([np.zeros(3200, "<i2"), at(loudness)])
    await asyncio.to_thread(send, call.peer, rtp_address(ok), encoded(said))
    await asyncio.sleep(0.4)
    return np.frombuffer(bytes(heard), "<i2")


def send(peer, target: tuple[str, int], payloads: list[bytes]) -> None:
    began_s = time.monotonic()
    for number, payload in enumerate(payloads):
        time.sleep(max(0.0, began_s + 0.02 * number - time.monotonic()))
        peer.media.sendto(rtp.build(rtp.RtpPacket(G722, number, TICKS * number, 7, payload)), target)


@pytest.mark.parametrize("loudness", [0.1, 1.0])
async def test_what_the_agent_says_in_g722_is_decoded_as_loud_and_above_4_khz_too_also_after_a_shout(
    wide_worker, loudness
):
    async with ringing(wide_worker, OFFER) as call:
        await agent_hears(call, await call.answer(), 1.25)
        leg_id, pcm = call.leg.leg_id, at(loudness).tobytes()
        await call.leg.send(Play(leg_id=leg_id, item_id="clip", pcm=pcm, sample_rate_hz=RATE, is_final=True))
        await call.until(PlayoutProgress, is_finished=True)
        await asyncio.sleep(0.2)
        call.peer.media.setblocking(False)
        got = []
        while packet := received(call.peer.media):
            got.append(packet)
    assert {packet.payload_type for packet in got} == {G722}
    assert {len(packet.payload) for packet in got} == {PACKET_BYTES}
    assert np.all(np.diff([packet.sequence_number for packet in got]) % 2**16 == 1)
    assert np.all(np.diff([packet.timestamp for packet in got]) % 2**32 == TICKS)
    heard = decoded(b"".join(packet.payload for packet in got))  # from the first packet on: it is adaptive
    assert_is_the_clip(heard / loudness)


def received(media) -> rtp.RtpPacket | None:
    """The next RTP packet that waits there."""
    try:
        while (packet := rtp.parse(media.recv(2048))) is None:
            pass
    except BlockingIOError:
        return None
    return packet
