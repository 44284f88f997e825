from __future__ import annotations

import datetime as dt
import io
from pathlib import Path

import numpy as np
import pytest
import soundfile

from storage.calls import CallStore
from storage.config import StorageConfig
from storage.recordings import CallRecorder, RecordingReader, Segment, wav_header

RATE = 8_000


def recorder_of(folder: Path, policy: str = "always") -> tuple[CallRecorder, list[Segment]]:
    segments: list[Segment] = []
    recorder = CallRecorder(
        folder, sample_rate_hz=RATE, policy=policy, segment_s=1.0, on_segment=segments.append, run=lambda write: write()
    )
    return recorder, segments


def noise(seed: int, num_samples: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-20_000, 20_000, num_samples, dtype=np.int16)


def push_in_frames(recorder: CallRecorder, caller: np.ndarray, agent: np.ndarray) -> None:
    for start in range(0, len(caller), 160):
        recorder.push("caller", start, caller[start : start + 160].tobytes())
        recorder.push("agent", start, agent[start : start + 160].tobytes())


def test_both_channels_come_back_bit_exact_and_aligned(tmp_path: Path) -> None:
    recorder, segments = recorder_of(tmp_path)
    caller, agent = noise(1, RATE * 3 + 77), noise(2, RATE * 3 + 77)
    push_in_frames(recorder, caller, agent)
    recorder.finish()
    samples = RecordingReader(tmp_path, segments).samples()
    assert np.array_equal(samples[:, 0], caller) and np.array_equal(samples[:, 1], agent)
    assert [segment.num_samples for segment in segments] == [RATE, RATE, RATE, 77]


def test_P4_sound_is_on_disk_while_the_call_goes_on(tmp_path: Path) -> None:
    recorder, segments = recorder_of(tmp_path)
    push_in_frames(recorder, noise(1, RATE * 4), noise(2, RATE * 4))
    assert len(segments) == 3  # the fourth second may still get late sound
    assert len(list(tmp_path.glob("*.flac"))) == 3 and not list(tmp_path.glob("*.part"))


def test_agent_reported_late_is_placed_where_it_was_played(tmp_path: Path) -> None:
    recorder, segments = recorder_of(tmp_path)
    agent = noise(2, 800)
    recorder.push("caller", 0, np.zeros(RATE * 2, np.int16).tobytes())
    recorder.push("agent", RATE + 100, agent.tobytes())
    recorder.finish()
    samples = RecordingReader(tmp_path, segments).samples()
    assert np.array_equal(samples[RATE + 100 : RATE + 900, 1], agent)
    assert not samples[: RATE + 100, 1].any()


def test_off_keeps_nothing(tmp_path: Path) -> None:
    recorder, segments = recorder_of(tmp_path / "none", policy="off")
    push_in_frames(recorder, noise(1, RATE), noise(2, RATE))
    recorder.notice_finished(10)
    push_in_frames(recorder, noise(1, RATE), noise(2, RATE))
    recorder.finish()
    assert segments == [] and not (tmp_path / "none").exists()


def test_before_the_notice_was_heard_nothing_is_kept(tmp_path: Path) -> None:
    recorder, segments = recorder_of(tmp_path, policy="after_notice")
    caller = noise(1, RATE * 4)
    recorder.push("caller", 0, caller[: RATE * 2].tobytes())
    notice_end = RATE + 4_000  # learned late: part of it was already pushed, and is gone
    recorder.notice_finished(notice_end)
    for start in range(RATE, RATE * 4, 160):
        recorder.push("caller", start, caller[start : start + 160].tobytes())
    recorder.finish()
    samples = RecordingReader(tmp_path, segments).samples()
    assert not samples[:notice_end].any()
    assert np.array_equal(samples[notice_end:, 0], caller[notice_end:])
    assert segments[0].segment == 1


def test_call_without_a_heard_notice_is_not_recorded(tmp_path: Path) -> None:
    recorder, segments = recorder_of(tmp_path, policy="after_notice")
    push_in_frames(recorder, noise(1, RATE * 3), noise(2, RATE * 3))
    recorder.finish()
    assert segments == []


def test_position_far_ahead_cannot_fill_the_memory(tmp_path: Path) -> None:
    recorder, segments = recorder_of(tmp_path)
    recorder.push("caller", 10**12, noise(1, 160).tobytes())
    recorder.finish()
    assert segments == [] and recorder.num_late_samples == 160


@pytest.mark.parametrize("seed", range(5))
def test_any_byte_range_equals_the_whole_files_bytes(tmp_path: Path, seed: int) -> None:
    recorder, segments = recorder_of(tmp_path)
    push_in_frames(recorder, noise(1, RATE * 3 + 80), noise(2, RATE * 3 + 80))
    recorder.finish()
    reader = RecordingReader(tmp_path, [segment for segment in segments if segment.segment != 1])  # with a gap
    whole = b"".join(reader.read(0, reader.num_bytes - 1))
    assert len(whole) == reader.num_bytes
    rng = np.random.default_rng(seed)
    for _ in range(40):
        first, last = sorted(int(value) for value in rng.integers(0, reader.num_bytes, 2))
        assert b"".join(reader.read(first, last)) == whole[first : last + 1]
    frames, rate = soundfile.read(io.BytesIO(whole), dtype="int16")
    assert rate == RATE and frames.shape == (RATE * 3 + 80, 2) and not frames[RATE : RATE * 2].any()


def test_lost_segment_file_sounds_as_silence(tmp_path: Path) -> None:
    recorder, segments = recorder_of(tmp_path)
    push_in_frames(recorder, noise(1, RATE * 3), noise(2, RATE * 3))
    recorder.finish()
    (tmp_path / segments[1].file_name).write_bytes(b"not flac")
    samples = RecordingReader(tmp_path, segments).samples()
    assert samples.shape == (RATE * 3, 2) and not samples[RATE : RATE * 2].any() and samples[:RATE].any()


def test_header_is_what_soundfile_reads(tmp_path: Path) -> None:
    path = tmp_path / "x.wav"
    path.write_bytes(wav_header(100, 16_000) + bytes(400))
    found = soundfile.info(path)
    assert (found.frames, found.samplerate, found.channels, found.subtype) == (100, 16_000, 2, "PCM_16")


def test_restarted_agent_goes_on_recording_and_keeps_what_was_there(config: StorageConfig, now: dt.datetime) -> None:
    caller = noise(1, RATE * 26)
    dead = CallStore(config)
    dead.open_call("c1", did="100", ani="", now=now)
    recorder = dead.start_recording("c1", policy="after_notice", now=now)
    dead.notice_finished("c1", 800, now=now)
    for at in range(0, RATE * 12, 160):
        recorder.push("caller", at, caller[at : at + 160].tobytes())
    dead.close()
    store = CallStore(config)
    store.adopt_call("c1")
    recorder = store.resume_recording("c1", now=now)
    for at in range(RATE * 13, RATE * 26, 160):
        recorder.push("caller", at, caller[at : at + 160].tobytes())
    store.close_call("c1", disposition="completed", cause="normal", now=now)
    reader = store.open_recording("c1")
    assert reader is not None
    heard = reader.samples()[:, 0]
    assert np.array_equal(heard[800 : RATE * 10], caller[800 : RATE * 10])
    assert not heard[RATE * 10 : RATE * 13].any()  # the segment that was open, and the time without an agent
    assert np.array_equal(heard[RATE * 13 :], caller[RATE * 13 :])
    store.close()


def test_store_keeps_segments_by_call_id(store: CallStore, config: StorageConfig, now: dt.datetime) -> None:
    store.open_call("c1", did="100", ani="", now=now)
    recorder = store.start_recording("c1", policy="after_notice", now=now)
    recorder.push("caller", 0, noise(1, RATE).tobytes())
    store.notice_finished("c1", RATE, now=now)
    frames: list[list[tuple[str, int, bytes]]] = []
    for channel, sound in (("caller", noise(1, RATE * 7)), ("agent", noise(2, RATE * 7))):
        frames.append([(channel, RATE + at, sound[at : at + 400].tobytes()) for at in range(0, RATE * 7, 400)])
    for pair in zip(*frames, strict=True):
        for channel, start, pcm in pair:
            recorder.push(channel, start, pcm)
    store.close_call("c1", disposition="completed", cause="normal", now=now)
    call = store.get_call("c1")
    assert call["recording"] == {"num_samples": RATE * 8, "sample_rate_hz": RATE}
    assert (call["recording_policy"], call["notice_end_sample"]) == ("after_notice", RATE)
    reader = store.open_recording("c1")
    assert reader is not None
    samples = reader.samples()
    assert not samples[:RATE].any() and np.array_equal(samples[RATE:, 1], noise(2, RATE * 7))
    peaks = reader.peaks(8)
    assert peaks[0] == (0.0, 0.0) and all(0.5 < level < 1 for level in peaks[4])
    out = config.folder / "whole.wav"
    reader.write_wav(out)
    assert soundfile.info(out).frames == RATE * 8
    assert store.open_recording("nobody") is None


def test_nothing_that_is_said_in_a_pause_is_kept_and_time_runs_on(tmp_path: Path) -> None:
    recorder, segments = recorder_of(tmp_path)
    caller, agent = noise(1, RATE * 4), noise(2, RATE * 4)
    push_in_frames(recorder, caller[:RATE], agent[:RATE])
    recorder.pause(RATE - 800)  # asked for a little late: what was not on disk yet is blanked, too
    for at in range(RATE, RATE * 4, 160):
        if at == RATE * 3:
            recorder.go_on(RATE * 3 + 80)
        recorder.push("caller", at, caller[at : at + 160].tobytes())
        recorder.push("agent", at, agent[at : at + 160].tobytes())
    recorder.finish()
    samples = RecordingReader(tmp_path, segments).samples()
    for channel, pcm in enumerate((caller, agent)):
        heard = samples[:, channel]
        assert np.array_equal(heard[: RATE - 800], pcm[: RATE - 800])
        assert not heard[RATE - 800 : RATE * 3 + 80].any()
        assert np.array_equal(heard[RATE * 3 + 80 :], pcm[RATE * 3 + 80 :])


def test_a_paused_recording_stays_paused_when_the_agent_dies(config: StorageConfig, now: dt.datetime) -> None:
    caller = noise(1, RATE * 20)
    dead = CallStore(config)
    dead.open_call("c1", did="100", ani="", now=now)
    dead.start_recording("c1", policy="always", now=now)
    dead.pause_recording("c1", RATE, now=now)
    dead.close()
    store = CallStore(config)
    store.adopt_call("c1")
    recorder = store.resume_recording("c1", now=now)
    recorder.push("caller", RATE * 2, caller[RATE * 2 : RATE * 10].tobytes())
    store.go_on_recording("c1", RATE * 10, now=now)
    recorder.push("caller", RATE * 10, caller[RATE * 10 :].tobytes())
    store.close_call("c1", disposition="completed", cause="normal", now=now)
    reader = store.open_recording("c1")
    assert reader is not None
    heard = reader.samples()[:, 0]
    assert not heard[: RATE * 10].any() and np.array_equal(heard[RATE * 10 :], caller[RATE * 10 :])
    store.close()


def test_journal_says_where_the_recording_was_paused_and_by_whom(config: StorageConfig, now: dt.datetime) -> None:
    store = CallStore(config)
    store.open_call("c1", did="100", ani="", now=now)
    recorder = store.start_recording("c1", policy="always", now=now)
    caller, agent = noise(1, RATE * 4), noise(2, RATE * 4)
    push_in_frames(recorder, caller[:RATE], agent[:RATE])
    store.pause_recording("c1", RATE - 400, now=now, by="supervisor:ann")  # 50 ms ago: it may have been said already
    for start in range(RATE, RATE * 4, 160):
        if start == RATE * 3:
            store.go_on_recording("c1", RATE * 3, now=now, by="agent")
        recorder.push("caller", start, caller[start : start + 160].tobytes())
        recorder.push("agent", start, agent[start : start + 160].tobytes())
    store.close_call("c1", disposition="completed", cause="normal", now=now)
    reader = store.open_recording("c1")
    assert reader is not None
    for lane, whole in enumerate((caller, agent)):
        heard = reader.samples()[:, lane]
        assert np.array_equal(heard[: RATE - 400], whole[: RATE - 400])
        assert not heard[RATE - 400 : RATE * 3].any()
        assert np.array_equal(heard[RATE * 3 :], whole[RATE * 3 :])
    told = [event for event in store.reader.get_events("c1") if event["payload"].get("by")]
    assert [(event["kind"], event["payload"]) for event in told] == [
        ("recording_paused", {"sample": RATE - 400, "by": "supervisor:ann"}),
        ("recording_went_on", {"sample": RATE * 3, "by": "agent"}),
    ]
    store.close()


def test_a_disk_that_does_not_answer_costs_two_minutes_of_memory_and_no_more(tmp_path: Path) -> None:
    """users.md P2: what one call may queue is bounded."""
    waiting, segments = [], []
    recorder = CallRecorder(
        tmp_path, sample_rate_hz=RATE, policy="always", segment_s=1.0, on_segment=segments.append, run=waiting.append
    )
    sound = noise(1, RATE)
    for second in range(150):
        recorder.push("caller", second * RATE, sound.tobytes())
    assert len(waiting) == 120 and recorder.num_lost_segments == 150 - 120 - 1
    for write in waiting:  # it answers again
        write()
    waiting.clear()
    recorder.push("caller", 150 * RATE, sound.tobytes())
    recorder.finish()
    assert len(waiting) == 2
    for write in waiting:
        write()
    assert [segment.segment for segment in segments] == [*range(120), 149, 150]
