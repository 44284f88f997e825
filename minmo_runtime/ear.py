"""The listening side of one call: voice-activity gate, segments waiting to be encoded, and what they said so far.

Caller audio runs through a gate (pre-roll 480 ms, hangover 640 ms, design §4a): each stretch of speech becomes a
`Segment` (segment.py) with a fresh encoder state, as the encoder was trained on utterances; long silence is never
encoded. The encoder itself runs in runner.py; this file only keeps samples and results. Time is the input clock, in
samples. Walk: step 6.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from minmo_runtime import features
from minmo_runtime.api import Caption, PushAudio
from minmo_runtime.bridges import TurnView
from minmo_runtime.config import RuntimeConfig
from minmo_runtime.conversation import AudioVector
from minmo_runtime.loudness import VoicedLevel
from minmo_runtime.rates import input_samples
from minmo_runtime.segment import Moment, Segment
from minmo_runtime.text import normalise_spoken


@dataclass(eq=False)
class Ear:
    """Owned by its stream. `segments` are those not fully encoded, oldest first; `captions` what the encode job
    owes."""

    call_id: str
    config: RuntimeConfig
    chunk_fbank_frames: int = 16  # of one encoder chunk
    hears_audio: bool = False  # whether a trained projector gives the LLM the caller's voice
    clock: int = 0  # input samples received
    last_voiced_sample: int = -1
    segments: deque[Segment] = field(default_factory=deque)
    user_text: list[str] = field(default_factory=list)  # final texts of the open user turn
    overlap_text: list[str] = field(default_factory=list)
    user_audio: list[AudioVector] = field(default_factory=list)  # of the same segments; a wordless one is noise
    overlap_audio: list[AudioVector] = field(default_factory=list)
    is_typed: bool = False  # the open user turn came by keypad or test: its words stand for it
    open_segment: Segment | None = None
    own_level: VoicedLevel = field(default_factory=VoicedLevel)  # of the caller's turns
    overlap_level: VoicedLevel = field(default_factory=VoicedLevel)  # of closed segments that may become one
    num_dropped_samples: int = 0
    num_chunks_encoded: int = 0  # of the call; counted by the encode job
    _num_chunks_closed: int = 0  # of closed segments
    _preroll: deque[NDArray[np.int16]] = field(default_factory=deque)
    _preroll_samples: int = 0
    _heard_until: int = 0  # end of the last segment: its samples are not used twice

    # -------------------------------------------------------------------- audio

    def push(self, request: PushAudio, is_agent_speaking: bool) -> None:
        """Take one packet; a gap on the input clock is silence, what was already received is skipped."""
        pcm = np.frombuffer(request.pcm, dtype="<i2")
        if request.start_sample > self.clock:
            gap = min(request.start_sample - self.clock, input_samples(1000))
            self.clock = request.start_sample - gap
            self._take(np.zeros(gap, np.int16), False, is_agent_speaking)
        elif request.start_sample < self.clock:
            pcm = pcm[self.clock - request.start_sample :]
        if len(pcm):
            self._take(pcm, request.voiced, is_agent_speaking)

    def _take(self, pcm: NDArray[np.int16], voiced: bool, is_agent_speaking: bool) -> None:
        start, self.clock = self.clock, self.clock + len(pcm)
        if voiced:
            self.last_voiced_sample = self.clock
            if self.open_segment is None:
                self._open(start, is_agent_speaking)
        segment = self.open_segment
        if segment is None:
            self._keep_preroll(pcm)
            return
        segment.append(pcm)
        self._drop_surplus(segment)
        if voiced:
            segment.last_voiced_sample = self.clock
            segment.level.hear(pcm)
        elif self.clock - segment.last_voiced_sample >= input_samples(self.config.hangover_ms):
            self.close_segment()

    def _open(self, onset: int, is_agent_speaking: bool) -> None:
        start = max(onset - min(self._preroll_samples, input_samples(self.config.preroll_ms)), self._heard_until)
        segment = Segment(start, onset, onset, is_agent_speaking)
        kept = np.concatenate(self._preroll) if self._preroll else np.zeros(0, np.int16)
        if onset > start:
            segment.append(kept[len(kept) - (onset - start) :])
        self._preroll.clear()
        self._preroll_samples = 0
        self.open_segment = segment
        self.segments.append(segment)

    def close_segment(self) -> None:
        """End the open segment now (hangover over, or the agent takes the floor)."""
        if self.open_segment is not None:
            self.open_segment.is_closed = True
            frames = features.num_frames(self.open_segment.num_samples)
            self._num_chunks_closed += -(-frames // self.chunk_fbank_frames)
            if not self.open_segment.is_discarded:
                own = self.overlap_level if self.open_segment.is_overlap else self.own_level
                own.remember(self.open_segment.level)
            self.open_segment = None
            self._heard_until = self.clock

    def _keep_preroll(self, pcm: NDArray[np.int16]) -> None:
        self._preroll.append(pcm)
        self._preroll_samples += len(pcm)
        while self._preroll_samples - len(self._preroll[0]) >= input_samples(self.config.preroll_ms):
            self._preroll_samples -= len(self._preroll.popleft())

    def _drop_surplus(self, segment: Segment) -> None:
        """Bounded queue: a caller who speaks on while the engine is late loses this segment's oldest audio, and it is
        counted. What closed segments still hold counts too."""
        waiting = sum(len(part) for each in self.segments for part in each.pcm)
        while segment.pcm and waiting > input_samples(1000 * self.config.max_unheard_input_s):
            oldest = segment.pcm.popleft()
            waiting -= len(oldest)
            segment.num_samples -= len(oldest)
            self.num_dropped_samples += len(oldest)

    # ------------------------------------------------------------------ results

    def take_text(self, segment: Segment, text: str) -> Caption | None:
        """The encode job heard `text` so far in `segment` (all of it if `is_final`). Returns the caption to send, if
        any."""
        has_changed, segment.text = text != segment.text, text
        if segment.is_final:
            self.segments.remove(segment)
            if text and not segment.is_discarded:
                (self.overlap_text if segment.is_overlap else self.user_text).append(text)
                (self.overlap_audio if segment.is_overlap else self.user_audio).extend(segment.audio)
        if segment.is_discarded or not text or not (has_changed or segment.is_final):
            return None
        return Caption(
            call_id=self.call_id,
            text=text,
            is_final=segment.is_final,
            confidence=segment.ctc.confidence,
            start_sample=segment.onset_sample,
            end_sample=segment.last_voiced_sample,
            during_reply=segment.is_overlap,
        )

    def heard_so_far(self, overlap: bool) -> str:
        """Text of the open user turn, or of the overlap, including segments still being encoded."""
        done = self.overlap_text if overlap else self.user_text
        running = [s.text for s in self.segments if s.is_overlap == overlap and s.text and not s.is_discarded]
        return " ".join([*done, *running])

    def running_text(self) -> str:
        """Of the user turn, what the segments say that are still being encoded."""
        return " ".join(s.text for s in self.segments if not s.is_overlap and s.text and not s.is_discarded)

    def audio_so_far(self) -> list[AudioVector]:
        """What a reply would answer now, as the LLM reads it: overlap first, then the user turn, including segments
        still being encoded. Empty where words stand for it."""
        if self.is_typed:
            return []
        audio: list[AudioVector] = []
        for is_overlap, done in ((True, self.overlap_audio), (False, self.user_audio)):
            running = [s for s in self.segments if s.is_overlap == is_overlap and s.text and not s.is_discarded]
            audio += [*done, *(vector for segment in running for vector in segment.audio)]
        return audio

    @property
    def is_audio_behind(self) -> bool:
        """Whether words were heard whose voice has not settled yet (an encoder that runs again over whole segments)."""
        if not self.hears_audio or self.is_typed:
            return False
        return not self.audio_so_far() or any(s.settled_voice is not None and not s.is_final for s in self.segments)

    def has_unheard(self) -> bool:
        """Whether speech of the caller's own turn still waits for the encoder."""
        return any(not s.is_overlap and not s.is_discarded for s in self.segments)

    # --------------------------------------------------------------- predictions

    def moment(self, sample: int, is_agent_speaking: bool) -> Moment:
        """What the gate knows now, for a prediction at `sample`."""
        segment = self.open_segment
        silence = self.clock - self.last_voiced_sample if self.last_voiced_sample >= 0 else self.clock
        num_open = features.num_frames(segment.num_samples) // self.chunk_fbank_frames if segment else 0
        return Moment(
            sample=sample,
            is_voiced=silence == 0,
            silence_samples=silence,
            voiced_samples=segment.last_voiced_sample - segment.onset_sample if segment else 0,
            is_agent_speaking=is_agent_speaking,
            has_segment=segment is not None and segment.is_overlap == is_agent_speaking,
            num_chunks=self._num_chunks_closed + num_open,
            loudness_db=segment.level.beside(self.own_level) if segment else None,
        )

    def view(self, moment: Moment, slot_digits: int) -> TurnView:
        """A moment with the words heard by now."""
        return TurnView(
            sample=moment.sample,
            is_voiced=moment.is_voiced,
            silence_samples=moment.silence_samples,
            voiced_samples=moment.voiced_samples,
            text=normalise_spoken(self.heard_so_far(overlap=False)),
            overlap_text=self.heard_so_far(overlap=True),
            is_agent_speaking=moment.is_agent_speaking,
            has_segment=moment.has_segment,
            slot_digits=slot_digits,
            loudness_db=moment.loudness_db,
        )

    # ------------------------------------------------------------- turn changes

    def take_user_turn(self) -> str:
        """Close the user turn: its text, overlap that nobody discarded first (its voice: `take_user_audio`)."""
        text = " ".join([*self.overlap_text, *self.user_text])
        self.overlap_text, self.user_text = [], []
        return text

    def take_user_audio(self) -> list[AudioVector]:
        """The same turn as the LLM reads it; empty where words stand for it."""
        audio = [] if self.is_typed else [*self.overlap_audio, *self.user_audio]
        self.overlap_audio, self.user_audio, self.is_typed = [], [], False
        return audio

    def give_back(self, text: str, audio: list[AudioVector]) -> None:
        """The turn was not over: what was taken of it opens it again."""
        self.user_text.insert(0, text)
        self.user_audio[:0] = audio
        self.is_typed = self.is_typed or bool(text and self.hears_audio and not audio)

    def replace_user_turn(self, text: str) -> None:
        """Keypad digits or a test's line stand for whatever was heard."""
        self.discard(overlap=False)
        self.user_text, self.is_typed = [text], True

    def discard(self, overlap: bool) -> None:
        """Forget what was said in the overlap (or in the user turn), including what is still running."""
        for segment in self.segments:
            if segment.is_overlap == overlap:
                segment.is_discarded = True
        if overlap:
            self.overlap_text, self.overlap_audio, self.overlap_level = [], [], VoicedLevel()
        else:
            self.user_text, self.user_audio, self.is_typed = [], [], False

    def adopt_overlap(self) -> None:
        """The overlap was an interruption: it opens the next user turn, and what is still running belongs to it."""
        self.user_text = [*self.overlap_text, *self.user_text]
        self.user_audio = [*self.overlap_audio, *self.user_audio]
        self.overlap_text, self.overlap_audio = [], []
        self.own_level.remember(self.overlap_level)
        self.overlap_level = VoicedLevel()
        for segment in self.segments:
            segment.is_overlap = False
