"""The gate in front of the encoder: pre-roll, hangover, gaps, and the bounded queue. No model."""

from __future__ import annotations

import numpy as np

from minmo_runtime.api import PushAudio
from minmo_runtime.config import RuntimeConfig
from minmo_runtime.ear import Ear

PACKET = 320


def push(ear: Ear, milliseconds: int, voiced: bool, value: int = 1, is_agent_speaking: bool = False) -> None:
    for _ in range(milliseconds // 20):
        pcm = np.full(PACKET, value, "<i2").tobytes()
        ear.push(PushAudio(call_id="c", pcm=pcm, start_sample=ear.clock, voiced=voiced), is_agent_speaking)


def test_a_segment_has_its_preroll_and_its_hangover() -> None:
    ear = Ear("c", RuntimeConfig())
    push(ear, 1000, False, value=1)
    push(ear, 300, True, value=2)
    push(ear, 1000, False, value=3)
    (segment,) = ear.segments
    pcm = segment.take_pcm()
    assert segment.is_closed and segment.onset_sample == 16_000
    assert [int((pcm == v).sum()) // 16 for v in (1, 2, 3)] == [480, 300, 640]


def test_a_short_pause_stays_inside_the_segment() -> None:
    ear = Ear("c", RuntimeConfig())
    push(ear, 300, True)
    push(ear, 600, False)
    push(ear, 300, True)
    assert len(ear.segments) == 1 and ear.open_segment is not None


def test_long_silence_is_never_kept() -> None:
    ear = Ear("c", RuntimeConfig())
    push(ear, 20_000, False)
    assert not ear.segments and ear._preroll_samples <= 500 * 16


def test_a_second_segment_does_not_use_samples_twice() -> None:
    ear = Ear("c", RuntimeConfig())
    push(ear, 300, True)
    push(ear, 640, False)
    push(ear, 100, False)
    push(ear, 300, True)
    first, second = ear.segments
    assert second.start_sample == 940 * 16  # where the first one ended, not 480 ms before the onset
    assert first.num_samples + second.num_samples == ear.clock


def test_a_gap_on_the_clock_is_silence_and_old_samples_are_skipped() -> None:
    ear = Ear("c", RuntimeConfig())
    push(ear, 300, True)
    ear.push(PushAudio(call_id="c", pcm=bytes(2 * PACKET), start_sample=ear.clock + PACKET, voiced=False), False)
    assert ear.clock == 300 * 16 + 2 * PACKET
    ear.push(PushAudio(call_id="c", pcm=bytes(2 * PACKET), start_sample=ear.clock - PACKET, voiced=False), False)
    assert ear.clock == 300 * 16 + 2 * PACKET
    assert ear.segments[0].num_samples == ear.clock


def test_a_late_engine_loses_the_oldest_audio_and_counts_it() -> None:
    ear = Ear("c", RuntimeConfig(max_unheard_input_s=1.0))
    push(ear, 3000, True)
    assert ear.num_dropped_samples == 2 * 16_000
    assert ear.segments[0].num_samples == 16_000


def test_what_closed_segments_hold_counts_for_the_bound_too() -> None:
    ear = Ear("c", RuntimeConfig(max_unheard_input_s=1.0))
    for _ in range(5):
        push(ear, 500, True)
        push(ear, 700, False)
    assert sum(len(part) for segment in ear.segments for part in segment.pcm) <= 16_000
    assert ear.num_dropped_samples > 4 * 16_000


def test_overlap_becomes_the_user_turn_only_when_adopted() -> None:
    ear = Ear("c", RuntimeConfig())
    push(ear, 300, True, is_agent_speaking=True)
    push(ear, 700, False)
    segment = ear.segments[0]
    segment.is_final = True
    caption = ear.take_text(segment, "no wait")
    assert caption is not None and caption.during_reply and caption.is_final
    assert ear.heard_so_far(overlap=True) == "no wait" and not ear.user_text
    ear.adopt_overlap()
    assert ear.take_user_turn() == "no wait"
