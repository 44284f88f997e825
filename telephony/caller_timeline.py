"""Caller audio that does not come by itself every 20 ms: to one frame for each tick of the leg's clock.

What a sender says lies at a sample of its own clock (WebRTC: the RTP timestamp, RFC 3550 §5.1; AudioSocket: the number
of samples before it). Puts it there, keeps `target` samples in hand, conceals gaps (the last frame again, fading over
60 ms) and gives back delay it does not need. Knows no clock: time is the number of samples pulled.
"""

from __future__ import annotations

import numpy as np

_CONCEAL_FRAMES = 3  # then silence
_MAX_GAP_MS = 400  # a longer one is a pause of the sender: start anew
_TRIM_AFTER_PULLS = 50  # a second in which more was in hand than wanted
_TRIM_MUCH_AFTER_PULLS, _MUCH_FRAMES = 10, 4  # late words are worse than a tenth of them lost


class CallerTimeline:
    """int16 mono at the leg's rate. `push` as it is decoded, `pull` once a tick."""

    def __init__(self, rate_hz: int, frame_samples: int, target_ms: int) -> None:
        self._frame = frame_samples
        self._target = rate_hz * target_ms // 1000
        self._max_gap = rate_hz * _MAX_GAP_MS // 1000
        self._max_samples = self._target + rate_hz * _MAX_GAP_MS // 1000
        self._waiting = np.zeros(0, np.int16)
        self._end: int | None = None  # where the next frame is expected, in samples of the sender
        self._last = np.zeros(frame_samples, np.int16)
        self._is_filling = True  # not played until `target` is in hand
        self._least, self._pulls = 1 << 30, 0
        self.num_concealed = 0  # samples

    def push(self, start: int, pcm: np.ndarray) -> None:
        """`start`: where it lies on the sender's clock, in samples of the leg's rate."""
        gap = 0 if self._end is None else start - self._end
        if gap < 0:  # overlaps what is there already
            pcm = pcm[-gap:]
            if not len(pcm):
                return
        elif 0 < gap <= self._max_gap:
            self._append(self._conceal(gap))
        self._end = max(start, self._end or start) + len(pcm)
        self._append(pcm)
        if len(self._last) <= len(pcm):
            self._last = pcm[-self._frame :]

    def pull(self) -> bytes:
        """One frame; silence while there is too little in hand."""
        if self._is_filling and len(self._waiting) < self._target:
            return bytes(2 * self._frame)
        self._is_filling = False
        frame, self._waiting = self._waiting[: self._frame], self._waiting[self._frame :]
        if len(frame) < self._frame:
            self._is_filling = True  # ran dry: fill up again, or every packet from now on comes too late
            frame = np.concatenate([frame, np.zeros(self._frame - len(frame), np.int16)])
        self._give_back_delay()
        return frame.astype("<i2").tobytes()

    @property
    def in_hand(self) -> int:
        """Samples that wait."""
        return len(self._waiting)

    def _append(self, pcm: np.ndarray) -> None:
        self._waiting = np.concatenate([self._waiting, pcm])[-self._max_samples :]

    def _conceal(self, num_samples: int) -> np.ndarray:
        self.num_concealed += num_samples
        repeats = np.tile(self._last, -(-num_samples // len(self._last)))[:num_samples].astype(np.float32)
        fade = np.clip(1 - np.arange(num_samples) / (_CONCEAL_FRAMES * self._frame), 0, 1)
        faded: np.ndarray = (repeats * fade).astype(np.int16)
        return faded

    def _give_back_delay(self) -> None:
        """What was in hand at all times of the last second, beyond what filling up leaves behind, nobody needs."""
        self._least = min(self._least, len(self._waiting))
        self._pulls += 1
        spare = self._least - (self._target - self._frame)
        if self._pulls < (_TRIM_MUCH_AFTER_PULLS if spare > _MUCH_FRAMES * self._frame else _TRIM_AFTER_PULLS):
            return
        spare = min(spare, self._frame)
        if spare >= self._frame // 2:
            self._waiting = self._waiting[spare:]
        self._least, self._pulls = 1 << 30, 0
