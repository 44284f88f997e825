"""Which job runs next, for all calls at once. Pure: looks at streams, changes nothing, no clock of its own.

Order of urgency (design, issue 4): a call whose audio is about to run out, then listening, then the first chunk of a
reply, then the rest. Within one call the job furthest downstream goes first, so text is made as the voice needs it,
and little is thrown away on an interruption. Rows of other calls that are ready for the same kind of job join the
batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum

from minmo_runtime.config import RuntimeConfig
from minmo_runtime.reply import ReplyPhase
from minmo_runtime.stream import Stream


class JobKind(Enum):
    """In the order of the walk."""

    ENCODE = "encode"
    BRANCH = "branch"
    PREDICT = "predict"
    PREFILL = "prefill"
    DECODE = "decode"
    VOICE = "voice"
    FLOW = "flow"
    VOCODE = "vocode"
    REPLAY = "replay"
    FINISH = "finish"
    ALIGN = "align"


class Urgency(IntEnum):
    RUNNING_OUT = 0
    LISTENING = 1
    FIRST_CHUNK = 2
    REST = 3
    DRAFT = 4  # may be thrown away: nobody waits for it


@dataclass(frozen=True)
class Job:
    kind: JobKind
    streams: tuple[Stream, ...]


# Among calls that all wait for their first chunk: one that is nearly there goes first; else text before voice, so that
# calls which decided at about the same time meet in the same batches (4 at once: 582 → 254 ms to the last first audio).
_FIRST_CHUNK_RANK = {JobKind.VOCODE: 0, JobKind.FLOW: 0, JobKind.PREFILL: 1, JobKind.DECODE: 2, JobKind.VOICE: 3}


# Text only: the voice begins when the agent takes the floor.
_DRAFT_JOBS = {ReplyPhase.PREFILL: JobKind.PREFILL, ReplyPhase.DECODING: JobKind.DECODE}


def _rank(urgency: Urgency, kind: JobKind) -> int:
    return _FIRST_CHUNK_RANK.get(kind, 0) if urgency is Urgency.FIRST_CHUNK else 0


class Scheduler:
    """The real one: urgency and batches."""

    def __init__(self, config: RuntimeConfig, chunk_fbank_frames: int) -> None:
        self.config = config
        self.chunk_fbank_frames = chunk_fbank_frames

    def pick(self, streams: Iterable[Stream], now: float) -> Job | None:
        """The next job, or None if nothing can be done."""
        ready = [item for stream in streams for item in self.ready(stream, now)]
        if not ready:
            return None
        ready.sort(key=lambda item: (item[0], _rank(item[0], item[1]), item[2].buffered_s(now)))
        _, kind, first = ready[0]
        rows = [stream for _, other, stream in ready if other is kind and _can_share(kind, first, stream)]
        return Job(kind, tuple(rows[: self._most_rows(kind)]))

    def _most_rows(self, kind: JobKind) -> int | None:
        """A chunk of the flow fills a CPU core by itself: there, rows only make each other wait."""
        return self.config.sound_rows if kind in (JobKind.FLOW, JobKind.VOCODE) else None

    def ready(self, stream: Stream, now: float) -> list[tuple[Urgency, JobKind, Stream]]:
        """What this call could do now: listening and speaking go side by side."""
        found: list[tuple[Urgency, JobKind, Stream]] = []
        if stream.can_predict:  # before the next chunk: a prediction sees what was there at its moment
            found.append((Urgency.LISTENING, JobKind.PREDICT, stream))
        elif stream.listening.owes_reading:
            found.append((Urgency.LISTENING, JobKind.BRANCH, stream))
        elif self._can_encode(stream) and not (stream.listening.feeds_predictor and stream.owes_reading):
            found.append((Urgency.LISTENING, JobKind.ENCODE, stream))
        if stream.truncations:
            found.append((Urgency.FIRST_CHUNK, JobKind.ALIGN, stream))
        elif (kind := self._speaking_job(stream, now)) is not None:
            found.append((self._urgency(stream, now), kind, stream))
        return found

    def _urgency(self, stream: Stream, now: float) -> Urgency:
        reply = stream.head
        if reply is None:
            return Urgency.LISTENING if stream.listening.feeds_predictor else Urgency.REST
        if reply.is_draft:
            return Urgency.DRAFT
        if not reply.is_sounding:
            return Urgency.FIRST_CHUNK
        return Urgency.RUNNING_OUT if stream.buffered_s(now) < self.config.urgent_audio_s else Urgency.REST

    def _can_encode(self, stream: Stream) -> bool:
        if not stream.ear.segments:
            return False
        segment = stream.ear.segments[0]
        return segment.is_closed or segment.num_frames_waiting() >= self.chunk_fbank_frames

    def _speaking_job(self, stream: Stream, now: float) -> JobKind | None:
        """The job furthest downstream that has its input."""
        reply = stream.head
        if reply is None:
            return None if stream.conversation.is_current() or stream.replies else JobKind.PREFILL
        if reply.is_draft:
            return _DRAFT_JOBS.get(reply.phase)
        if reply.phase is ReplyPhase.REPLAY:
            return JobKind.REPLAY if stream.has_room_ahead(now) else None
        if reply.mels or (reply.is_mel_complete and not reply.is_vocoded):
            return JobKind.VOCODE
        if reply.can_flow:
            return JobKind.FLOW
        has_room = stream.has_room_ahead(now)
        if reply.voice is not None and not reply.is_voice_done and not reply.is_voice_waiting:
            return JobKind.VOICE if has_room else None
        if reply.phase is ReplyPhase.PREFILL:
            return JobKind.PREFILL
        if reply.phase is ReplyPhase.DECODING:
            return JobKind.DECODE if has_room else None
        if reply.phase is ReplyPhase.SPEAKING and (reply.is_vocoded or reply.voice is None):
            return JobKind.FINISH
        return None


def _can_share(kind: JobKind, first: Stream, other: Stream) -> bool:
    """Encoding a chunk and an Euler step are different passes of the flow; any two Euler steps are one. A draft's
    prefill makes nobody wait who is to be heard; one more row of a decode step costs next to nothing."""
    if kind is JobKind.PREFILL:
        return _is_draft(first) or not _is_draft(other)
    if kind is not JobKind.FLOW:
        return True
    return first.replies[0].is_in_chunk == other.replies[0].is_in_chunk


def _is_draft(stream: Stream) -> bool:
    return stream.head is not None and stream.head.is_draft


class PlainScheduler(Scheduler):
    """The obvious loop: the first call that can do anything does it alone. Same results, tested against each other."""

    def pick(self, streams: Iterable[Stream], now: float) -> Job | None:
        for stream in streams:
            ready: Sequence[tuple[Urgency, JobKind, Stream]] = self.ready(stream, now)
            if ready:
                return Job(ready[0][1], (stream,))
        return None
