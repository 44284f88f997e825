"""Line echo on real voices: what is removed, what counts as the caller, and the duck that follows from it.
users.md P11, L15: hears its own voice."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from agent import doctor
from agent.config import Config
from agent.floor import TurnTakingConfig
from agent.lab import rtp
from telephony.clips import read_clip
from telephony.config import TelephonyConfig
from telephony.echo import LineEcho
from telephony.frames import CallerAudio
from telephony.leg import Answer, AudioFrame, Duck, Play, Resume, WireMetric
from telephony.loopback import LoopbackLeg
from telephony.playout import Playout
from telephony.speexdsp import SpeexMissing, load

RATE = 8000
FRAME = 160
CLIPS = Path(__file__).resolve().parents[2] / "agent" / "demo_assets"
CONFIG = TelephonyConfig()
LEARNT_S = 6  # the length of a notice: our voice before anything of the caller counts


def has_speex() -> bool:
    try:
        load()
    except SpeexMissing:
        return False
    return True


needs_speex = pytest.mark.skipif(not has_speex(), reason="libspeexdsp1 is not installed: the gate works alone")


@cache
def agent_voice() -> np.ndarray:
    names = ["hours_day", "what_can_you_do", "order_status", "number_prefix", "goodbye", "backchannel_okay"] * 2
    samples = np.concatenate([np.frombuffer(read_clip(CLIPS / f"{name}.flac"), "<i2") for name in names])
    return samples[: len(samples) // FRAME * FRAME].astype(float)


@cache
def caller_voice() -> np.ndarray:
    """The same speaker a quarter lower: another voice."""
    clip = np.frombuffer(read_clip(CLIPS / "what_can_you_do.flac"), "<i2").astype(float)
    return np.interp(np.arange(0, len(clip) - 1, 0.8), np.arange(len(clip)), clip)


def echo_of(sent: np.ndarray, delay_ms: int, return_loss_db: float) -> np.ndarray:
    """A line: a delay, some dispersion, a loss, and the hiss of the line itself."""
    rng = np.random.default_rng(delay_ms)
    taps = 0.3 * rng.standard_normal(80) * np.exp(-np.arange(80) / 20)
    taps[0] = 1.0
    taps *= 10 ** (-return_loss_db / 20) / np.sqrt(np.sum(taps**2))
    delayed = np.concatenate([np.zeros(delay_ms * RATE // 1000), np.convolve(sent, taps)])[: len(sent)]
    return delayed + rng.standard_normal(len(sent)) * 10


def over_g711(samples: np.ndarray) -> np.ndarray:
    return rtp.DECODE[rtp.PCMU][np.frombuffer(rtp.encode(rtp.PCMU, samples), np.uint8)].astype(float)


def pcm(samples: np.ndarray) -> bytes:
    return np.clip(np.rint(samples), -32768, 32767).astype("<i2").tobytes()


def frames(received: np.ndarray, sent: np.ndarray):
    for at in range(0, len(sent) - FRAME + 1, FRAME):
        yield pcm(received[at : at + FRAME]), pcm(sent[at : at + FRAME])


def likeness(samples: np.ndarray, wanted: np.ndarray) -> float:
    """Correlation above the canceller's own high pass: differences, so that bass does not decide."""
    return float(np.corrcoef(np.diff(samples), np.diff(wanted[: len(samples)]))[0, 1])


def level_db(samples: np.ndarray) -> float:
    return 10 * np.log10(np.mean(samples**2))


@needs_speex
@pytest.mark.parametrize(("delay_ms", "return_loss_db"), [(20, 6), (250, 15), (400, 6)])
def test_after_a_notice_the_echo_is_at_least_12_db_quieter_and_never_voiced(delay_ms, return_loss_db):
    sent = agent_voice()
    received = echo_of(sent, delay_ms, return_loss_db)
    audio = CallerAudio(CONFIG)
    heard = [audio.listen(*frame) for frame in frames(received, sent)]
    cleaned = np.frombuffer(b"".join(pcm for pcm, _ in heard), "<i2").astype(float)
    learnt = LEARNT_S * RATE
    assert level_db(received[learnt:]) - level_db(cleaned[learnt:]) >= 12
    assert sum(voiced for _, voiced in heard[learnt // FRAME :]) <= 15  # 0.3 s


def longest(voiced: list[bool]) -> float:
    """Seconds of the longest voiced stretch."""
    best = run = 0
    for is_voiced in voiced:
        run = run + 1 if is_voiced else 0
        best = max(best, run)
    return best * FRAME / RATE


@needs_speex
@pytest.mark.parametrize(
    ("delay_ms", "return_loss_db"),
    [(80, 0), (20, 6), (80, 6), (80, 30), (160, 12), (250, 6), (250, 20), (400, 6), (400, 30)],
)
def test_an_echo_is_never_voiced_as_long_as_it_takes_to_stop_us_not_even_before_the_line_is_learnt(
    delay_ms, return_loss_db
):
    sent = agent_voice()
    received = over_g711(echo_of(sent, delay_ms, return_loss_db))
    audio = CallerAudio(CONFIG)
    voiced = [audio.listen(*frame)[1] for frame in frames(received, sent)]
    assert longest(voiced) < TurnTakingConfig().burst_voiced_s
    assert sum(voiced) * FRAME / RATE < 0.75  # of 13.7 s


@needs_speex
@pytest.mark.parametrize(("delay_ms", "return_loss_db"), [(20, 6), (160, 12), (400, 12)])
@pytest.mark.parametrize("at_s", [1, 9])
def test_a_caller_over_an_echo_is_voiced_within_a_fifth_of_a_second_learnt_or_not(delay_ms, return_loss_db, at_s):
    sent, voice, at = agent_voice(), caller_voice() * 0.6, at_s * RATE
    received = echo_of(sent, delay_ms, return_loss_db)
    end = min(len(received), at + len(voice))
    received[at:end] += voice[: end - at]
    audio = CallerAudio(CONFIG)
    voiced = [audio.listen(*frame)[1] for frame in frames(over_g711(received), sent)]
    over = voiced[at // FRAME : end // FRAME]
    assert 20 * over.index(True) <= 200 and np.mean(over) > 0.5


@needs_speex
@pytest.mark.parametrize("delay_ms", [20, 250])
def test_a_caller_over_our_echo_is_voiced_at_once_and_passes_with_the_echo_taken_out(delay_ms):
    sent, voice = agent_voice(), caller_voice() * 0.6
    received, at = echo_of(sent, delay_ms, 10), 9 * RATE
    both = received.copy()
    both[at : at + len(voice)] += voice[: len(both) - at]
    audio = CallerAudio(CONFIG)
    heard = [audio.listen(*frame) for frame in frames(both, sent)]
    over = [voiced for _, voiced in heard[at // FRAME :]]
    assert 20 * over.index(True) <= 200 and np.mean(over[: len(voice) // FRAME]) > 0.6
    cleaned = np.frombuffer(b"".join(pcm for pcm, _ in heard), "<i2").astype(float)
    span = slice(at, at + len(voice))
    assert likeness(cleaned[span], voice) > 0.85  # with 20 ms of delay the two together give 0.77


@needs_speex
def test_while_we_are_silent_the_caller_passes_bit_for_bit():
    echo = LineEcho(CONFIG)
    for received, sent in frames(caller_voice(), np.zeros(len(caller_voice()))):
        assert echo.push(received, sent) == (received, False)


@needs_speex
@pytest.mark.parametrize(("return_loss_db", "at_s"), [(None, 0), (None, 1), (6, 0)])
def test_after_both_have_talked_at_once_a_silent_line_stays_silent(return_loss_db, at_s):
    """Double talk leads the filter astray; the echo of the last word is then made up for half a second."""
    at, end = at_s * RATE, (at_s + 5) * RATE
    sent = np.concatenate([agent_voice()[:end], np.zeros(RATE)])
    received = np.zeros(len(sent)) if return_loss_db is None else echo_of(sent, 20, return_loss_db)
    received[at:end] += np.tile(caller_voice(), 4)[: end - at] * 1.5
    received = over_g711(received)
    echo = LineEcho(CONFIG)
    heard = b"".join(echo.push(*frame)[0] for frame in frames(received, sent))
    cleaned = np.frombuffer(heard, "<i2").astype(float).reshape(-1, FRAME)
    before = received.reshape(-1, FRAME)[: len(cleaned)]
    is_silent = np.mean(before**2, axis=1) < 32768**2 * 10**-6  # -60 dBov
    assert is_silent.sum() > 40
    assert np.mean(cleaned[is_silent] ** 2, axis=1).max() < 32768**2 * 10**-5.5


def test_a_filter_that_has_only_added_sound_for_a_third_of_a_second_learns_anew(monkeypatch):
    class Astray:
        num_resets = 0

        def __init__(self, *_arguments):
            pass

        def cancel(self, received, sent):
            return sent

        def reset(self):
            self.num_resets += 1

    monkeypatch.setattr("telephony.echo.SpeexEchoCanceller", Astray)
    echo = LineEcho(CONFIG)
    quiet, loud = pcm(np.full(FRAME, 30)), pcm(np.full(FRAME, 3_000))
    for count in range(1, 31):
        assert echo.push(quiet, loud)[0] == quiet
        assert echo._canceller.num_resets == count // 15


def test_without_the_library_the_gate_works_alone(monkeypatch):
    def missing(*_arguments):
        raise SpeexMissing("libspeexdsp.so.1 is not installed; run: sudo apt-get install libspeexdsp1")

    monkeypatch.setattr("telephony.echo.SpeexEchoCanceller", missing)
    echo = LineEcho(CONFIG)
    assert not echo.is_cancelling
    sent = agent_voice()
    received = echo_of(sent, 100, 15)
    heard = [echo.push(*frame) for frame in frames(received, sent)]
    assert b"".join(pcm for pcm, _ in heard) == b"".join(frame for frame, _ in frames(received, sent))
    assert sum(is_echo for _, is_echo in heard) > 200
    with pytest.raises(SpeexMissing, match="apt-get install libspeexdsp1"):
        LineEcho(TelephonyConfig(echo_canceller="speexdsp"))


def test_no_echo_is_looked_for_where_the_line_has_none():
    assert not LineEcho(TelephonyConfig(echo_max_delay_ms=0)).is_cancelling


# --------------------------------------------------------------- the duck in the media process


def loopback(**play: bool) -> LoopbackLeg:
    leg = LoopbackLeg("leg")
    leg.ring()
    leg.send_now(Answer(leg_id="leg"))
    leg.send_now(Play(leg_id="leg", item_id="a1", pcm=pcm(agent_voice()), sample_rate_hz=RATE, **play))
    leg.advance(RATE)
    leg.drain()
    return leg


def first(leg_events, kind):
    return next((e.sample for e in leg_events if isinstance(e, WireMetric) and e.kind == kind), None)


def test_P9_an_item_that_may_duck_does_so_at_the_callers_onset_without_the_agent():
    leg = loopback(may_duck=True)
    leg.speak(pcm(caller_voice()))
    leg.advance(len(caller_voice()))
    events = leg.drain()
    voiced = next(e.start_sample for e in events if isinstance(e, AudioFrame) and e.voiced)
    ducked = first(events, "agent_ducked")
    assert 0 <= ducked - voiced <= 2 * FRAME
    leg.advance(RATE)
    assert first(leg.drain(), "agent_unducked") is not None  # nobody said anything about it: loud when the voice ends


def test_a_protected_item_stays_loud_whatever_the_caller_says():
    leg = loopback()
    leg.speak(pcm(caller_voice()))
    leg.advance(2 * RATE)
    assert first(leg.drain(), "agent_ducked") is None
    assert leg.heard[: 6 * RATE] == pcm(agent_voice())[: 6 * RATE]


def tick(playout: Playout, is_voiced: bool, num: int = 1) -> list[int]:
    """Frames of a constant item; the last sample of each."""
    last = []
    for _ in range(num):
        out, _ = playout.pull(FRAME)
        playout.caller_is_voiced(is_voiced)
        last.append(int(np.frombuffer(out, "<i2")[-1]))
    return last


def speaking(**settings: float) -> Playout:
    playout = Playout("leg", TelephonyConfig(**settings))
    playout.play("a1", np.full(10 * RATE, 10_000, "<i2").tobytes(), may_duck=True)
    tick(playout, False, 2)
    return playout


def test_the_agents_own_duck_and_resume_rule_over_the_local_one():
    playout = speaking()
    assert tick(playout, True, 3)[-1] == pytest.approx(1259, abs=1)  # -18 dB
    playout.apply(Duck(leg_id="leg", gain_db=-18.0))
    assert tick(playout, False, 10)[-1] == pytest.approx(1259, abs=1)  # the agent keeps it down
    playout.apply(Resume(leg_id="leg"))
    assert tick(playout, False, 2)[-1] == 10_000


def test_a_voice_the_agent_took_for_noise_does_not_duck_again_until_it_was_silent():
    playout = speaking()
    tick(playout, True, 3)
    playout.apply(Resume(leg_id="leg"))
    assert tick(playout, True, 20)[-1] == 10_000
    tick(playout, False, 3)  # a gap of 60 ms inside the voice
    assert tick(playout, True, 5)[-1] == 10_000
    tick(playout, False, 8)
    assert tick(playout, True, 3)[-1] == pytest.approx(1259, abs=1)


def test_the_local_duck_can_be_switched_off():
    playout = speaking(local_duck_db=0.0)
    assert tick(playout, True, 10)[-1] == 10_000


def test_the_doctor_says_what_is_missing_and_how_to_get_it(monkeypatch):
    def missing():
        raise SpeexMissing("libspeexdsp.so.1 is not installed; run: sudo apt-get install libspeexdsp1")

    monkeypatch.setattr("telephony.speexdsp.load", missing)
    (found,) = doctor._echo(Config())
    assert found.state is doctor.State.WARNING and "apt-get install libspeexdsp1; only the gate works" in found.text
    (found,) = doctor._echo(Config(telephony=TelephonyConfig(echo_canceller="speexdsp")))
    assert found.state is doctor.State.FAULT
