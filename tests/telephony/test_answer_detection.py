"""What the first sounds after the answer are taken for: utterances, beeps, the tones of the network; and that speech is
no tone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from telephony.answer_detection import AnswerDetector
from telephony.clips import read_clip
from telephony.config import TelephonyConfig
from telephony.dtmf import tones as dtmf
from telephony.frames import CallerAudio
from telephony.leg import AnswerEvidence, LegState, StopAnswerDetection
from telephony.loopback import LoopbackLeg

RATE = 8000
SPEECH = Path(__file__).resolve().parents[3] / "shared" / "speech"
CONFIG = TelephonyConfig(echo_canceller="off")


def tone(seconds: float, *hz: float, amplitude: float = 8000, rate: int = RATE) -> np.ndarray:
    time_s = np.arange(int(seconds * rate)) / rate
    return sum(np.sin(2 * np.pi * each * time_s) for each in hz) * amplitude / len(hz)


def silence(seconds: float, rate: int = RATE) -> np.ndarray:
    return np.zeros(int(seconds * rate))


def voice(seconds: float, hz: float = 140.0, rate: int = RATE) -> np.ndarray:
    """Glottal harmonics whose pitch and loudness wander, in syllables."""
    time_s = np.arange(int(seconds * rate)) / rate
    phase = 2 * np.pi * np.cumsum(hz * (1 + 0.1 * np.sin(2 * np.pi * 1.7 * time_s))) / rate
    harmonics = sum(np.sin(k * phase) / k for k in range(1, 12))
    return 3000 * harmonics * (0.55 + 0.45 * np.sin(2 * np.pi * 4 * time_s))


def mu_law(samples: np.ndarray) -> np.ndarray:
    """There and back (ITU-T G.711, as a curve)."""
    level = np.clip(samples / 32768, -1, 1)
    code = np.round(np.sign(level) * np.log1p(255 * np.abs(level)) / np.log(256) * 127) / 127
    return (np.sign(code) * (256 ** np.abs(code) - 1) / 255 * 32767).astype("<i2")


def heard(*parts: np.ndarray, config: TelephonyConfig = CONFIG) -> list[AnswerEvidence]:
    """Through the received side of a leg, as the worker has it."""
    audio, size = CallerAudio(config), 2 * config.samples_per_frame
    detector = AnswerDetector("l", config.sample_rate_hz, config.vad_hangover_ms)
    pcm = mu_law(np.concatenate(parts)).tobytes()
    found = []
    for start in range(0, len(pcm) - size + 1, size):
        frame = pcm[start : start + size]
        _, is_voiced = audio.listen(frame, bytes(size))
        found += detector.push(frame, is_voiced)
    return found


def kinds(*parts: np.ndarray) -> list[str]:
    return [evidence.kind for evidence in heard(*parts)]


def only(kind: str, *parts: np.ndarray) -> AnswerEvidence:
    (found,) = [evidence for evidence in heard(*parts) if evidence.kind == kind]
    return found


# ------------------------------------------------------------------ utterances


def test_short_word_is_an_utterance_with_its_end_and_its_length() -> None:
    (found,) = heard(silence(0.5), voice(0.6), silence(1.5))
    assert found.kind == "utterance"
    # The last syllable of this voice fades out.
    assert -0.2 <= found.sample / RATE - 1.1 <= 0.05 and -0.25 <= found.num_samples / RATE - 0.6 <= 0.05


def test_utterance_is_told_within_700_ms_of_its_end() -> None:
    assert kinds(silence(0.5), voice(0.6), silence(0.75)) == ["utterance"]


def test_pauses_between_words_do_not_end_an_utterance_and_longer_ones_do() -> None:
    (one,) = heard(voice(0.5), silence(0.3), voice(0.5), silence(1.0))
    assert -0.25 <= one.num_samples / RATE - 1.3 <= 0.05
    assert kinds(voice(0.5), silence(0.9), voice(0.5), silence(1.0)) == ["utterance", "utterance"]


def test_voice_that_speaks_on_is_told_of_while_it_does() -> None:
    found = heard(voice(4.2), silence(1.0))
    assert [evidence.kind for evidence in found] == ["speaking"] * 5 + ["utterance"]
    assert [round(evidence.num_samples / RATE, 1) for evidence in found[:-1]] == [2.0, 2.5, 3.0, 3.5, 4.0]


@pytest.mark.parametrize("sound", [tone(0.03, 1000), np.random.default_rng(1).normal(0, 2000, 300)])
def test_click_is_nothing(sound: np.ndarray) -> None:
    assert kinds(silence(0.5), sound, silence(2.0)) == []


# ------------------------------------------------------------------ beeps


@pytest.mark.parametrize("hz", [420, 440, 600, 850, 1000, 1400, 1950])
@pytest.mark.parametrize("seconds", [0.15, 0.4, 1.2])
def test_beep_after_a_greeting_is_found_at_its_end(hz: float, seconds: float) -> None:
    beep = only("beep", voice(2.5), silence(0.6), tone(seconds, hz), silence(1.0))
    assert abs(beep.frequency_hz - hz) <= 10
    assert abs(beep.sample / RATE - (3.1 + seconds)) <= 0.05 and abs(beep.num_samples / RATE - seconds) <= 0.06


def test_beep_that_follows_the_last_word_at_once_ends_the_utterance_too() -> None:
    found = heard(voice(2.4), tone(0.5, 1000), silence(1.2))
    assert sorted(evidence.kind for evidence in found) == ["beep", "speaking", "utterance"]
    (utterance,) = [evidence for evidence in found if evidence.kind == "utterance"]
    assert -0.25 <= utterance.num_samples / RATE - 2.4 <= 0.05


def test_beep_is_told_soon_enough_to_speak_right_after_it() -> None:
    assert "beep" in kinds(voice(1.0), silence(0.7), tone(0.3, 1000), silence(0.12))


@pytest.mark.parametrize("noise_dbov", [-50, -38])
def test_beep_is_found_in_line_noise(noise_dbov: float) -> None:
    parts = np.concatenate([voice(2.0), silence(0.6), tone(0.4, 1000, amplitude=10000), silence(1.0)])
    noise = np.random.default_rng(3).normal(0, 32768 * 10 ** (noise_dbov / 20), len(parts))
    assert "beep" in kinds(parts + noise)


def test_beep_without_a_greeting_waits_until_nothing_follows_it() -> None:
    beep = only("beep", silence(0.5), tone(0.5, 1000), silence(1.2))
    assert abs(beep.sample / RATE - 1.0) <= 0.05
    assert kinds(silence(0.5), tone(0.5, 1000), silence(0.6)) == []


def test_beep_on_a_wideband_leg() -> None:
    config = TelephonyConfig(echo_canceller="off", codecs=("G722/16000", "PCMU/8000"))
    parts = [voice(2.0, rate=16000), silence(0.6, 16000), tone(0.4, 1000, rate=16000), silence(1.0, 16000)]
    (beep,) = [evidence for evidence in heard(*parts, config=config) if evidence.kind == "beep"]
    assert abs(beep.sample / 16000 - 3.0) <= 0.05


def test_keys_are_no_beep_and_a_glide_is_none() -> None:
    keys = np.frombuffer(dtmf("159#", RATE), "<i2").astype(float)
    assert "beep" not in kinds(voice(1.0), silence(0.7), keys, silence(1.0))
    time_s = np.arange(RATE) / RATE
    glide = 8000 * np.sin(2 * np.pi * (500 * time_s + 300 * time_s**2))
    assert "beep" not in kinds(voice(1.0), silence(0.7), glide, silence(1.0))


# ------------------------------------------------------------------ the network


@pytest.mark.parametrize(
    "three",
    [
        [tone(0.33, 950), tone(0.33, 1400), tone(0.33, 1800)],
        [tone(0.274, 985.2), tone(0.274, 1428.5), tone(0.38, 1776.7)],  # North America: its own lengths and shifts
        [tone(0.38, 913.8), silence(0.03), tone(0.274, 1370.6), silence(0.03), tone(0.38, 1776.7)],
    ],
    ids=["E.180", "no circuit", "intercept, with gaps"],
)
def test_special_information_tone_is_named_once_and_is_no_beep(three: list[np.ndarray]) -> None:
    assert kinds(silence(0.5), *three, silence(0.5), voice(1.0), silence(1.0)) == ["special_information", "utterance"]


def test_three_tones_that_fall_are_no_special_information() -> None:
    falling = [tone(0.33, 1800), tone(0.33, 1400), tone(0.33, 950)]
    assert "special_information" not in kinds(silence(0.5), *falling, silence(1.0))


@pytest.mark.parametrize("hz", [(425,), (480, 620)], ids=["Europe", "North America"])
def test_busy_tone_is_named_after_four_and_none_of_them_is_a_beep(hz: tuple[float, ...]) -> None:
    found = kinds(*[tone(0.5, *hz), silence(0.5)] * 5)
    assert found == ["busy", "busy"]


@pytest.mark.parametrize(
    ("hz", "on_s", "off_s"), [((425,), 1.0, 4.0), ((440, 480), 2.0, 4.0), ((400, 450), 0.4, 0.2)], ids=str
)
def test_ringback_after_the_answer_is_nobodys_voice(hz: tuple[float, ...], on_s: float, off_s: float) -> None:
    found = kinds(silence(0.5), tone(on_s, *hz), silence(off_s), tone(on_s, *hz), silence(3.0))
    assert set(found) <= {"ringback"}


def test_fax_machines_are_named() -> None:
    called = kinds(silence(1.0), tone(3.0, 2100), silence(1.0))
    calling = kinds(silence(1.0), *[tone(0.5, 1100), silence(3.0)] * 2)
    assert called == ["fax"] and calling == ["fax"]


# ------------------------------------------------------------------ the leg


def test_outbound_leg_tells_it_until_it_is_told_to_stop_and_an_inbound_one_never() -> None:
    def leg_events(direction: str, is_stopped: bool) -> list[str]:
        leg = LoopbackLeg("l1", direction=direction, config=CONFIG)
        if direction == "outbound":
            leg.pick_up()
        else:
            leg.ring()
            leg._enter(LegState.CONFIRMED)
        if is_stopped:
            leg.send_now(StopAnswerDetection(leg_id="l1"))
        leg.speak(mu_law(np.concatenate([voice(0.6), silence(1.0)])).tobytes())
        leg.advance(2 * RATE)
        return [event.kind for event in leg.drain() if isinstance(event, AnswerEvidence)]

    assert leg_events("outbound", False) == ["utterance"]
    assert leg_events("outbound", True) == [] and leg_events("inbound", False) == []


def test_detector_stops_by_itself_after_a_minute_and_a_half() -> None:
    assert kinds(silence(90.0), voice(0.5), silence(2.0)) == []


# ------------------------------------------------------------------ real speech


def clips(name: str, most: int, **wanted: Any) -> list[Path]:
    manifest = SPEECH / name / "manifest.jsonl"
    if not manifest.is_file():
        pytest.skip(f"{manifest.parent} is not here")
    rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    fitting = [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]
    return [SPEECH / name / row["path"] for row in fitting[:: max(1, len(fitting) // most)][:most]]


def test_real_speech_holds_no_tones() -> None:
    """2 of 984 prompts and 1 of 259 words hold something like a beep (`minmo bench answers`); none of these here."""
    for path in [*clips("asterisk_ivr_prompts", 40, lang="en"), *clips("kathleen_en_us", 20)]:
        speech = np.frombuffer(read_clip(path, RATE), "<i2").astype(float)
        found = set(kinds(silence(0.4), speech, silence(1.2)))
        assert found <= {"utterance", "speaking"}, path.name
