"""Two-channel recordings: caller left, agent right, both placed by sample position on the leg's clock.

The recorder is a tap: it is given what crossed the wire and never slows a call. Sound goes to disk in segments of
some seconds (FLAC, bit exact), so neither memory nor a crash can take more than the last one. A whole WAV exists only
while somebody reads it: `RecordingReader` computes any byte range of it from the segments. Knows no SQL.
"""

from __future__ import annotations

import logging
import os
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from storage.config import RECORDING_POLICIES

log = logging.getLogger(__name__)
CALLER, AGENT = 0, 1  # channel index: left, right
CHANNELS = {"caller": CALLER, "agent": AGENT}
BYTES_PER_FRAME = 4  # two int16
WAV_HEADER_BYTES = 44
SEAL_AFTER_S = 1.0  # a segment is written this long after its end: play-out reports come up to 100 ms late
MAX_WAITING_S = 120.0  # of one call's sound, for a disk that does not answer: 4 MB at 8 kHz
MAX_AHEAD_S = 60.0  # a position further ahead than this is a fault, not sound
MAX_START_S = 24 * 3_600.0  # the same for the first position: a recorder may begin in the middle of a call

Pcm = np.ndarray[tuple[int, ...], np.dtype[np.int16]]


@dataclass(frozen=True)
class Segment:
    segment: int
    start_sample: int
    num_samples: int
    sample_rate_hz: int
    file_name: str
    num_bytes: int


class CallRecorder:
    """One call's recorder. `run` executes a function soon and in order (a worker thread, or at once in tests).

    Sound comes on one thread, the notice and the pauses on another: each method holds the lock for its few copies.
    """

    def __init__(
        self,
        folder: Path,
        *,
        sample_rate_hz: int,
        policy: str,
        segment_s: float,
        on_segment: Callable[[Segment], None],
        run: Callable[[Callable[[], None]], None],
    ) -> None:
        if policy not in RECORDING_POLICIES:
            raise ValueError(f"recording policy {policy!r}: must be one of {', '.join(RECORDING_POLICIES)}")
        self._folder = folder
        self._rate = sample_rate_hz
        self._segment_samples = round(segment_s * sample_rate_hz)
        self._on_segment = on_segment
        self._run = run
        self._lock = threading.Lock()
        self._open: dict[int, Pcm] = {}  # segment index -> [samples, 2]
        self._next_to_seal = 0
        self._high_sample = 0  # first sample after the last one seen on either channel
        self._starts_at: int | None = 0 if policy == "always" else None
        self._can_start = policy == "after_notice"
        self._pauses: list[tuple[int, int]] = []  # [first, end) of the samples that are never kept
        self._paused_at: int | None = None
        self.num_late_samples = 0
        self.num_lost_segments = 0  # the disk was too slow for them
        self._num_sealed = 0  # on the thread of the sound
        self._num_written = 0  # on that of the disk

    @property
    def is_recording(self) -> bool:
        return self._starts_at is not None

    def notice_finished(self, sample: int) -> None:
        """The caller has heard the recording notice up to leg sample `sample`: from here on sound is kept."""
        with self._lock:
            if self._can_start and self._starts_at is None:
                self._starts_at = sample
                self._next_to_seal = sample // self._segment_samples

    def pause(self, sample: int) -> None:
        """From leg sample `sample` on nothing is kept (a card number is spoken), until `go_on`; time runs on as
        silence. What of it had come already is blanked, unless its segment is on disk: pause before, not after.
        """
        with self._lock:
            if self._paused_at is None:
                self._paused_at = sample
                for index, frames in self._open.items():
                    frames[max(0, sample - index * self._segment_samples) :] = 0

    def go_on(self, sample: int) -> None:
        """Sound from leg sample `sample` on is kept again."""
        with self._lock:
            if self._paused_at is not None:
                self._pauses.append((self._paused_at, max(sample, self._paused_at)))
                self._paused_at = None

    def _without_pauses(self, position: int, samples: Pcm) -> Pcm:
        """The same samples with silence where the recording is paused."""
        pauses = self._pauses if self._paused_at is None else [*self._pauses, (self._paused_at, 1 << 62)]
        for first, end in pauses:
            if first < position + len(samples) and end > position:
                samples = samples.copy()
                samples[max(0, first - position) : max(0, end - position)] = 0
        return samples

    def push(self, channel: str, start_sample: int, pcm: bytes) -> None:
        """`pcm` int16 mono at the leg's rate, first sample at leg sample `start_sample`.

        Later sound replaces earlier.
        """
        with self._lock:
            self._push(channel, start_sample, pcm)

    def _push(self, channel: str, start_sample: int, pcm: bytes) -> None:
        if self._starts_at is None:
            return
        samples = np.frombuffer(pcm, dtype="<i2")
        skipped = max(0, self._starts_at - start_sample)
        position = start_sample + skipped
        samples = self._without_pauses(position, samples[skipped:])
        is_first = self._high_sample == 0
        highest = MAX_START_S * self._rate if is_first else self._high_sample + MAX_AHEAD_S * self._rate
        if len(samples) == 0 or position > highest:
            self.num_late_samples += len(samples)
            return
        if is_first:  # what lies before is another recorder's, or silence
            self._next_to_seal = max(self._next_to_seal, position // self._segment_samples)
        self._high_sample = max(self._high_sample, position + len(samples))
        while len(samples):
            index, offset = divmod(position, self._segment_samples)
            part = samples[: self._segment_samples - offset]
            if index < self._next_to_seal:
                self.num_late_samples += len(part)
            else:
                if index not in self._open:
                    self._open[index] = np.zeros((self._segment_samples, 2), dtype=np.int16)
                self._open[index][offset : offset + len(part), CHANNELS[channel]] = part
            position, samples = position + len(part), samples[len(part) :]
        settled = self._high_sample - round(SEAL_AFTER_S * self._rate)
        while (self._next_to_seal + 1) * self._segment_samples <= settled:
            self._seal(self._segment_samples)

    def finish(self) -> None:
        """The call is over: writes what is open. Idempotent."""
        with self._lock:
            while self.is_recording and self._next_to_seal * self._segment_samples < self._high_sample:
                left = self._high_sample - self._next_to_seal * self._segment_samples
                self._seal(min(left, self._segment_samples))
            self._starts_at, self._can_start = None, False

    def _seal(self, num_samples: int) -> None:
        index = self._next_to_seal
        self._next_to_seal += 1
        frames = self._open.pop(index, None)
        if frames is None:  # nothing was heard in it: silence needs no file, except to tell how long the call was
            frames = np.zeros((num_samples, 2), dtype=np.int16)
        if (self._num_sealed - self._num_written) * self._segment_samples >= MAX_WAITING_S * self._rate:
            self.num_lost_segments += 1
            log.error("%s: segment %d is lost: the disk does not take what waits", self._folder.name, index)
            return
        whole = frames[:num_samples]
        self._num_sealed += 1
        self._run(lambda: self._write_waiting(index, whole))

    def _write_waiting(self, index: int, frames: Pcm) -> None:
        try:
            self._write(index, frames)
        finally:
            self._num_written += 1

    def _write(self, index: int, frames: Pcm) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._folder / f"{index:06d}.flac"
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            soundfile.write(file, frames, self._rate, format="FLAC", subtype="PCM_16")
            file.flush()
            os.fsync(file.fileno())
        part.rename(path)
        start = index * self._segment_samples
        self._on_segment(Segment(index, start, len(frames), self._rate, path.name, path.stat().st_size))


def wav_header(num_samples: int, sample_rate_hz: int) -> bytes:
    """RIFF/WAVE, PCM, two channels of 16 bits."""
    num_bytes = num_samples * BYTES_PER_FRAME
    riff = struct.pack("<4sI4s", b"RIFF", 36 + num_bytes, b"WAVE")
    form = struct.pack(
        "<4sIHHIIHH", b"fmt ", 16, 1, 2, sample_rate_hz, sample_rate_hz * BYTES_PER_FRAME, BYTES_PER_FRAME, 16
    )
    return riff + form + struct.pack("<4sI", b"data", num_bytes)


class RecordingReader:
    """The whole call as one WAV that exists byte by byte.

    Sample 0 of the WAV is sample 0 of the leg; gaps are silence.
    """

    def __init__(self, folder: Path, segments: Sequence[Segment]) -> None:
        self._folder = folder
        self._segments = sorted(segments, key=lambda s: s.start_sample)
        self.sample_rate_hz = self._segments[0].sample_rate_hz if self._segments else 8_000
        self.num_samples = max((s.start_sample + s.num_samples for s in self._segments), default=0)

    @property
    def num_bytes(self) -> int:
        return WAV_HEADER_BYTES + self.num_samples * BYTES_PER_FRAME

    def read(self, first_byte: int, last_byte: int) -> Iterator[bytes]:
        """Bytes first_byte..last_byte (inclusive) in pieces of at most one segment or 5 s of silence."""
        header = wav_header(self.num_samples, self.sample_rate_hz)
        if first_byte < WAV_HEADER_BYTES:
            yield header[first_byte : last_byte + 1]
        begin = max(0, first_byte - WAV_HEADER_BYTES)
        end = min(last_byte + 1, self.num_bytes) - WAV_HEADER_BYTES
        position = begin
        while position < end:
            piece_start, piece = self._piece(position // BYTES_PER_FRAME)
            offset = position - piece_start * BYTES_PER_FRAME
            chunk = piece[offset : offset + end - position]
            yield chunk
            position += len(chunk)

    def samples(self) -> Pcm:
        """The whole call as [samples, 2]; for short calls and tests."""
        raw = b"".join(self.read(WAV_HEADER_BYTES, self.num_bytes - 1)) if self.num_samples else b""
        return np.frombuffer(raw, dtype="<i2").reshape(-1, 2)

    def peaks(self, num_bins: int) -> list[tuple[float, float]]:
        """Loudest sample of caller and agent per bin, 0..1, one segment in memory at a time; for drawing."""
        loudest = np.zeros((num_bins, 2), dtype=np.float64)
        for segment in self._segments:
            frames = np.frombuffer(self._decode(segment), dtype="<i2").reshape(-1, 2)
            levels = np.abs(frames.astype(np.int32))
            bins = (np.arange(len(levels)) + segment.start_sample) * num_bins // max(1, self.num_samples)
            np.maximum.at(loudest, bins, levels / 32_768)
        return [(round(float(caller), 3), round(float(agent), 3)) for caller, agent in loudest]

    def write_wav(self, path: Path) -> None:
        with path.open("wb") as file:
            for chunk in self.read(0, self.num_bytes - 1):
                file.write(chunk)

    def _piece(self, sample: int) -> tuple[int, bytes]:
        """(start sample, bytes) of the segment or of the silence that holds `sample`."""
        silence_end = min(self.num_samples, sample + 5 * self.sample_rate_hz)
        for segment in self._segments:
            if segment.start_sample <= sample < segment.start_sample + segment.num_samples:
                return segment.start_sample, self._decode(segment)
            if segment.start_sample > sample:
                silence_end = min(silence_end, segment.start_sample)
                break
        return sample, bytes((silence_end - sample) * BYTES_PER_FRAME)

    def _decode(self, segment: Segment) -> bytes:
        whole = bytes(segment.num_samples * BYTES_PER_FRAME)
        try:
            frames, _ = soundfile.read(self._folder / segment.file_name, dtype="int16", always_2d=True)
        except (OSError, soundfile.SoundFileError):
            return whole  # a lost file must not make the rest unreadable; it sounds as silence
        raw: bytes = frames[: segment.num_samples].astype("<i2").tobytes()
        return raw + whole[len(raw) :]
