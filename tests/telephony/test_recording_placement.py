"""Where a browser's voice lies in the recording, in virtual time: placed by RTP timestamp, on the leg's clock.

Ten minutes over a line with 1 % loss and jitter, the browser's clock wrong by what cheap crystals are (RFC 3550 knows
no bound; 100 ppm is common, 200 ppm is bad): whatever was lost, both channels stay side by side.
users.md P15.
"""

from __future__ import annotations

import heapq
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("aiortc")

from storage.recordings import CallRecorder, RecordingReader, Segment  # noqa: E402
from telephony.caller_timeline import CallerTimeline  # noqa: E402

RATE, FRAME, FRAME_S = 16_000, 320, 0.02
MINUTES = 10
CLICK_EVERY = 100  # packets: two seconds
_LOUD = np.full(FRAME, 20_000, np.int16)
_SILENT = np.zeros(FRAME, np.int16)


def recorded(
    folder: Path, ppm: float, loss: float = 0.01, jitter_ms: float = 5.0, minutes: int = MINUTES
) -> np.ndarray:
    """The whole recording; on the agent's channel is a click at the moment the caller really spoke one."""
    rng = np.random.default_rng(7)
    segments: list[Segment] = []
    recorder = CallRecorder(
        folder, sample_rate_hz=RATE, policy="always", segment_s=60.0, on_segment=segments.append, run=lambda w: w()
    )
    timeline = CallerTimeline(RATE, FRAME, 40)
    packets = round(minutes * 60 / FRAME_S)
    on_the_way: list[tuple[float, int]] = []  # (arrival, packet)
    sent_s = np.arange(packets) * FRAME_S / (1 + ppm * 1e-6)
    for number in np.flatnonzero(rng.random(packets) >= loss):
        heapq.heappush(on_the_way, (sent_s[number] + 0.02 + rng.exponential(jitter_ms) / 1000, int(number)))
    agent = np.zeros(packets * FRAME, np.int16)
    for at in np.rint(sent_s[50::CLICK_EVERY] * RATE).astype(int):
        agent[at : at + FRAME] = _LOUD
    newest = -1
    for tick in range(packets):
        while on_the_way and on_the_way[0][0] <= (tick + 1) * FRAME_S:
            _, number = heapq.heappop(on_the_way)
            if number > newest:  # `Promptly` drops what was overtaken
                timeline.push(number * FRAME, _LOUD if number % CLICK_EVERY == 50 else _SILENT)
                newest = number
        recorder.push("caller", tick * FRAME, timeline.pull())
        recorder.push("agent", tick * FRAME, agent[tick * FRAME : (tick + 1) * FRAME].tobytes())
    recorder.finish()
    return RecordingReader(folder, segments).samples()


def onsets(lane: np.ndarray) -> np.ndarray:
    loud = np.abs(lane.astype(np.int32)) > 10_000
    starts: np.ndarray = np.flatnonzero(np.diff(loud.astype(np.int8), prepend=0) == 1)
    return starts


def delays_s(recording: np.ndarray) -> np.ndarray:
    """From when each click was spoken to where it lies; lost ones are left out."""
    heard, spoken = (onsets(recording[:, lane]) / RATE for lane in (0, 1))
    nearest = np.array([heard[np.argmin(np.abs(heard - at))] for at in spoken]) - spoken
    found: np.ndarray = nearest[np.abs(nearest) < 0.5]
    return found


@pytest.mark.parametrize("ppm", [200.0, pytest.param(-200.0, marks=pytest.mark.slow)])
def test_ten_minutes_of_loss_and_clock_drift_leave_the_callers_voice_where_it_was_spoken(
    tmp_path: Path, ppm: float
) -> None:
    delays = delays_s(recorded(tmp_path, ppm))
    assert len(delays) >= 0.97 * MINUTES * 30  # a click was lost now and then, no more
    # 20 ms of line and 40 ms in hand, and up to a frame each for jitter, tick and drift; 200 ppm alone would be 120 ms
    assert 0.02 <= delays.min() and delays.max() <= 0.14, (delays.min(), delays.max())
    first, last = np.median(delays[:30]), np.median(delays[-30:])
    assert abs(last - first) <= 0.03, (first, last)


def test_losses_never_move_what_follows_by_more_than_what_is_kept_in_hand(tmp_path: Path) -> None:
    without, with_loss = (delays_s(recorded(tmp_path / str(loss), 0.0, loss, 0.0, 1)) for loss in (0.0, 0.05))
    assert np.ptp(without) <= 0.001
    assert np.max(np.abs(with_loss - np.median(without))) <= 0.041
