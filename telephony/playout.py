"""Play-out of one leg: items in, exactly as many samples out as the wire asks for, and the truth about what was played.

Pulled by the wire: the media callback (or the loopback's virtual clock) takes its next samples, so nothing is ever
ahead of the wire but the frame just handed over, and flush, pause, resume and duck act on the exact next sample. The
agent may queue up to `max_unplayed_s` beforehand; a stuck agent therefore delays nothing that it has already said. No
clock, no thread, no socket: time is the number of samples pulled (walk: hops 12 and 13).

Items play one after another in the order they were first named. An item whose last chunk was not given yet holds its
place: later items wait until more arrives. A flushed item is closed: chunks that come late are dropped. Where nothing
is played comfort noise leaves (comfort_noise.py), at its own level however the agent is ducked; to a party on hold,
silence.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field

import numpy as np

from telephony.comfort_noise import ComfortNoise
from telephony.config import TelephonyConfig
from telephony.leg import (
    Duck,
    Flush,
    Flushed,
    LegCommand,
    LegError,
    LegEvent,
    Pause,
    Play,
    PlayoutProgress,
    Resume,
    WireMetric,
)  # fmt: skip

_REMEMBERED_ITEMS = 256  # closed items whose counts can still be asked for
_DUCKED_GAIN = 10 ** (-12 / 20)  # 12 dB down counts as ducked
_REARM_MS = 100  # the caller's silence after which a voice is a new one: gaps inside a sentence do not duck again


@dataclass
class _Item:
    chunks: deque[bytes] = field(default_factory=deque)
    offset: int = 0  # bytes of chunks[0] already played
    unplayed_samples: int = 0
    played_samples: int = 0
    is_complete: bool = False  # its last chunk was given
    may_duck: bool = False

    def take(self, num_samples: int) -> bytes:
        parts, wanted = [], 2 * min(num_samples, self.unplayed_samples)
        taken = wanted
        while wanted:
            chunk = self.chunks[0]
            part = chunk[self.offset : self.offset + wanted]
            parts.append(part)
            wanted -= len(part)
            self.offset += len(part)
            if self.offset == len(chunk):
                self.chunks.popleft()
                self.offset = 0
        self.unplayed_samples -= taken // 2
        self.played_samples += taken // 2
        return b"".join(parts)


class Playout:
    """Changed by one thread only: whoever pulls."""

    def __init__(self, leg_id: str, config: TelephonyConfig) -> None:
        rate = config.sample_rate_hz
        self._leg_id = leg_id
        self._max_unplayed_samples = int(config.max_unplayed_s * rate)
        self._progress_samples = config.progress_ms * rate // 1000
        self._ramp_samples = max(1, config.duck_ramp_ms * rate // 1000)
        self._items: OrderedDict[str, _Item] = OrderedDict()
        self._closed: OrderedDict[str, int] = OrderedDict()  # item_id -> samples played
        self._noise = ComfortNoise(leg_id, config)
        self._gain, self._target_gain, self._gain_step = 1.0, 1.0, 0.0
        self._is_ducked = False
        self._local_duck_db = config.local_duck_db
        self._rearm_samples = _REARM_MS * rate // 1000
        self._is_caller_voiced = False
        self._caller_silent_since = -self._rearm_samples
        self._has_ducked_itself = False  # and the agent has said nothing about it yet
        self.is_paused = False
        self._reported_at = 0  # sample of the last PlayoutProgress
        self.sample = 0  # the leg's clock: samples pulled so far

    # -------------------------------------------------------------- commands

    def apply(self, command: LegCommand) -> list[Flushed]:
        """One play-out command; only `Flush` has an immediate answer."""
        match command:
            case Play(item_id=item_id, pcm=pcm, is_final=is_final, may_duck=may_duck):
                self.play(item_id, pcm, is_final, may_duck)
            case Flush(item_id=item_id):
                return self.flush(item_id)
            case Duck(gain_db=gain_db):
                self.duck(gain_db)
            case Pause():
                self.pause()
            case Resume():
                self.resume()
            case _:
                raise AssertionError(f"{type(command).__name__} is not a play-out command")
        return []

    def check_room(self, item_id: str, num_samples: int) -> None:
        """LegError when `num_samples` more would make over `max_unplayed_s` wait."""
        if self.unplayed_samples + num_samples > self._max_unplayed_samples:
            raise LegError(
                f"Play {item_id!r}: {self.unplayed_samples} samples unplayed, at most {self._max_unplayed_samples}"
            )

    def play(self, item_id: str, pcm: bytes, is_final: bool = False, may_duck: bool = False) -> None:
        """Append int16 mono at the leg's rate. LegError when more than `max_unplayed_s` would wait."""
        if item_id in self._closed:
            return
        num_samples = len(pcm) // 2
        self.check_room(item_id, num_samples)
        item = self._items.setdefault(item_id, _Item(may_duck=may_duck))
        if pcm:
            item.chunks.append(pcm)
            item.unplayed_samples += num_samples
        item.is_complete = item.is_complete or is_final

    def flush(self, item_id: str = "") -> list[Flushed]:
        """Drop what is unplayed; one answer for each item dropped. A named item is answered even when it had ended."""
        if item_id and item_id not in self._items:
            return [Flushed(leg_id=self._leg_id, item_id=item_id, played_samples=self._closed.setdefault(item_id, 0))]
        dropped = [item_id] if item_id else list(self._items)
        return [self._close(name) for name in dropped]

    def duck(self, gain_db: float) -> None:
        self._has_ducked_itself = False
        self._ramp_to(10 ** (min(0.0, gain_db) / 20))

    def pause(self) -> None:
        self.is_paused = True

    def resume(self) -> None:
        self.is_paused = self._has_ducked_itself = False
        self._ramp_to(1.0)

    def caller_is_voiced(self, is_voiced: bool) -> None:
        """Told every tick. An item that may duck does so here at the caller's onset, without asking the agent, whose
        `Duck` or `Resume` follows and rules. If neither comes, it is loud again when that voice ends.
        """
        if is_voiced and not self._is_caller_voiced:
            is_new = self.sample - self._caller_silent_since >= self._rearm_samples
            if is_new and self._local_duck_db < 0 and self._gain == self._target_gain == 1.0 and self._is_audible():
                self.duck(self._local_duck_db)
                self._has_ducked_itself = True
        elif self._is_caller_voiced and not is_voiced:
            self._caller_silent_since = self.sample
            if self._has_ducked_itself:
                self._has_ducked_itself = False
                self._ramp_to(1.0)
        self._is_caller_voiced = is_voiced

    # ------------------------------------------------------------------ wire

    def pull(self, num_samples: int, is_held: bool = False) -> tuple[bytes, list[LegEvent]]:
        """The next `num_samples` for the wire, and what became true by sending them. `is_held`: nobody hears us."""
        parts: list[bytes] = []
        events: list[LegEvent] = []
        missing = 0 if self.is_paused or is_held else num_samples
        while missing and self._items:
            item_id, item = next(iter(self._items.items()))
            part = item.take(missing)
            parts.append(part)
            missing -= len(part) // 2
            if item.is_complete and not item.unplayed_samples:
                events.append(self._progress(item_id, item, is_finished=True))
                self._remember(item_id, item.played_samples)
            elif not part:
                break
        played = sum(map(len, parts)) // 2
        parts.append(bytes(2 * (num_samples - played)))
        pcm = self._with_gain(b"".join(parts), events)
        if played < num_samples and not is_held:
            pcm = pcm[: 2 * played] + self._noise.at(self.sample + played, num_samples - played)
        self.sample += num_samples
        if played and self._items and self.sample - self._reported_at >= self._progress_samples:
            item_id, item = next(iter(self._items.items()))
            if item.played_samples:
                events.append(self._progress(item_id, item, is_finished=False))
        return pcm, events

    @property
    def unplayed_samples(self) -> int:
        return sum(item.unplayed_samples for item in self._items.values())

    def played(self) -> dict[str, int]:
        """Samples played of every item still remembered, for an agent that takes the call over."""
        return dict(self._closed) | {name: item.played_samples for name, item in self._items.items()}

    def final_progress(self) -> list[PlayoutProgress]:
        """Where the unfinished items stood when the leg ended."""
        return [
            self._progress(name, item, is_finished=False) for name, item in self._items.items() if item.played_samples
        ]

    @property
    def is_idle(self) -> bool:
        return not self._items

    # --------------------------------------------------------------- private

    def _is_audible(self) -> bool:
        """Something that may duck is being played."""
        item = next(iter(self._items.values()), None)
        return item is not None and item.may_duck and item.played_samples > 0 and not self.is_paused

    def _progress(self, item_id: str, item: _Item, is_finished: bool) -> PlayoutProgress:
        self._reported_at = self.sample
        return PlayoutProgress(
            leg_id=self._leg_id, item_id=item_id, played_samples=item.played_samples, is_finished=is_finished
        )

    def _close(self, item_id: str) -> Flushed:
        item = self._items[item_id]
        self._remember(item_id, item.played_samples)
        return Flushed(leg_id=self._leg_id, item_id=item_id, played_samples=item.played_samples)

    def _remember(self, item_id: str, played_samples: int) -> None:
        del self._items[item_id]
        self._closed[item_id] = played_samples
        while len(self._closed) > _REMEMBERED_ITEMS:
            self._closed.popitem(last=False)

    def _ramp_to(self, gain: float) -> None:
        self._target_gain = gain
        self._gain_step = (gain - self._gain) / self._ramp_samples

    def _with_gain(self, pcm: bytes, events: list[LegEvent]) -> bytes:
        """Apply the gain ramp; note the sample at which the agent became 12 dB quieter, or loud again."""
        if self._gain == self._target_gain:
            if self._gain == 1.0:
                return pcm
            gains = np.full(len(pcm) // 2, self._gain)
        else:
            low, high = sorted((self._gain, self._target_gain))
            steps = np.arange(1, len(pcm) // 2 + 1)
            gains = np.clip(self._gain + self._gain_step * steps, low, high)
            # the last step of a ramp must land on the target in spite of rounding
            gains = np.where(np.abs(gains - self._target_gain) < abs(self._gain_step) / 2, self._target_gain, gains)
            self._note_ducking(gains, events)
            self._gain = float(gains[-1])
        samples = np.frombuffer(pcm, "<i2") * gains
        return bytes(np.rint(samples).astype("<i2").tobytes())

    def _note_ducking(self, gains: np.ndarray, events: list[LegEvent]) -> None:
        threshold = max(_DUCKED_GAIN, self._target_gain)  # a shallow duck counts when its ramp ends
        if self._target_gain < 1.0 and not self._is_ducked:
            crossed = np.flatnonzero(gains <= threshold + 1e-9)
            kind = "agent_ducked"
        elif self._target_gain == 1.0 and self._is_ducked:
            crossed = np.flatnonzero(gains > _DUCKED_GAIN)
            kind = "agent_unducked"
        else:
            return
        if crossed.size:
            self._is_ducked = kind == "agent_ducked"
            events.append(WireMetric(leg_id=self._leg_id, kind=kind, sample=self.sample + int(crossed[0])))
