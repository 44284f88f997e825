"""Whose voice it is, by its level: far away beside the caller's own turns. No model."""

from __future__ import annotations

import numpy as np
import pytest

from minmo_runtime.api import PushAudio
from minmo_runtime.config import RuntimeConfig
from minmo_runtime.duplex_steps import FACT_NAMES, facts
from minmo_runtime.ear import Ear
from minmo_runtime.loudness import VoicedLevel


def level_of(value: int, seconds: float) -> VoicedLevel:
    level = VoicedLevel()
    level.hear(np.full(int(16_000 * seconds), value, np.int16))
    return level


def push(ear: Ear, milliseconds: int, value: int, is_agent_speaking: bool = False) -> None:
    """A voice of this level (0: nobody)."""
    for _ in range(milliseconds // 20):
        pcm = np.full(320, value, "<i2").tobytes()
        ear.push(PushAudio(call_id="c", pcm=pcm, start_sample=ear.clock, voiced=value > 0), is_agent_speaking)


def loudness_db(ear: Ear) -> float | None:
    return ear.moment(ear.clock, is_agent_speaking=True).loudness_db


def test_a_tenth_of_the_amplitude_is_20_db_quieter_and_too_short_a_stretch_says_nothing() -> None:
    assert level_of(300, 1).beside(level_of(3000, 2)) == pytest.approx(-20, abs=0.1)
    assert level_of(300, 0.1).beside(level_of(3000, 2)) is None
    assert level_of(300, 1).beside(VoicedLevel()) is None


def test_the_latest_of_many_voices_counts_most() -> None:
    own = VoicedLevel()
    for value in (8000, 800, 800, 800):
        own.remember(level_of(value, 10))
    assert level_of(800, 1).beside(own) == pytest.approx(-1, abs=1)


def test_an_overlap_is_beside_the_callers_turns_and_silence_between_words_does_not_count() -> None:
    ear = Ear("c", RuntimeConfig())
    assert loudness_db(ear) is None
    push(ear, 500, 4000)
    assert loudness_db(ear) is None  # the first turn: nothing to be beside of
    push(ear, 400, 0)
    push(ear, 500, 4000)
    push(ear, 1000, 0)
    push(ear, 300, 400, is_agent_speaking=True)
    assert loudness_db(ear) == pytest.approx(-20, abs=0.1)
    far = dict(zip(FACT_NAMES, facts(ear.view(ear.moment(ear.clock, True), 0)), strict=True))
    assert far["is_loudness_known"] == 1 and far["loudness"] == pytest.approx(-20 / 24, abs=0.01)


def test_a_television_never_becomes_the_callers_level_but_an_interruption_does() -> None:
    ear = Ear("c", RuntimeConfig())
    push(ear, 1000, 4000)
    push(ear, 1000, 0)
    push(ear, 5000, 400, is_agent_speaking=True)
    ear.discard(overlap=True)  # while it goes on
    push(ear, 1000, 0)
    push(ear, 300, 4000, is_agent_speaking=True)
    assert loudness_db(ear) == pytest.approx(0, abs=0.1)
    push(ear, 4700, 4000, is_agent_speaking=True)
    push(ear, 1000, 0)
    ear.adopt_overlap()
    push(ear, 300, 4000)
    assert loudness_db(ear) == pytest.approx(0, abs=0.1) and ear.own_level.num_samples > 16_000 * 3


def test_a_voice_that_moved_away_is_the_caller_once_it_was_answered() -> None:
    ear = Ear("c", RuntimeConfig())
    push(ear, 1000, 4000)
    push(ear, 1000, 0)
    push(ear, 12_000, 400)
    push(ear, 1000, 0)
    push(ear, 300, 400, is_agent_speaking=True)
    found = loudness_db(ear)
    assert found is not None and found > -6
