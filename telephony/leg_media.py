"""One leg's media, tick by tick: play-out, echo removal, voice activity and wire metrics on one side, the shared-memory
ring on the other (hops 1, 2 and 13).

Called by the media callback on pjmedia's clock thread, which every call of the process shares: no I/O, no lock, no
wait, no logging in the normal path. A tick has two halves: first our samples are asked for, then the party's are
given; together they are one step of the leg's clock. Knows nothing of pjsip.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

from telephony.answer_detection import AnswerDetector
from telephony.config import TelephonyConfig
from telephony.dtmf import DtmfDetector
from telephony.frames import CallerAudio
from telephony.leg import DtmfReceived, LegCommand, LegError, LegEvent, PlayoutProgress, WireMetric
from telephony.playout import Playout
from telephony.ring import AudioTick, LegRings, RecordKind, pack_audio
from telephony.wire import encode, ring_commands
from telephony.wire_metrics import VoicedEnergyMeter

Read = TypeVar("Read")

_KEPT_FREE_FOR_EVENTS = 1 << 16  # audio is dropped (and counted) before an event would be


class LegMedia:
    """Everything here but `local_commands`, `is_held`, `confirmed` and `attach` belongs to the clock thread."""

    def __init__(self, leg_id: str, config: TelephonyConfig) -> None:
        self._leg_id = leg_id
        self._playout = Playout(leg_id, config)
        self._caller_audio = CallerAudio(config)
        self._meters = {party: VoicedEnergyMeter(leg_id, party, config) for party in ("caller", "agent")}
        self._silence = bytes(2 * config.samples_per_frame)
        self._sent: bytes | None = None  # asked for, its received half not seen yet
        self._outlet: tuple[LegRings, int] | None = None
        self.local_commands: deque[LegCommand] = deque()  # from the worker itself (apology); append is atomic
        self.is_held = False
        self.keys: DtmfDetector | None = None  # set while keys are to be heard as sound
        self.answer: AnswerDetector | None = None  # set while it is not known who answered our call
        self.dropped_frames = 0
        self._leg_id, self._rate_hz = leg_id, config.sample_rate_hz
        self._confirmed_at_s: float | None = None  # set by the main thread, taken by the next tick

    # -------------------------------------------------------------- main thread

    def confirmed(self, at_s: float) -> None:
        """The ACK came, at `at_s` of the monotonic clock: the next tick says where that is on the leg's clock."""
        self._confirmed_at_s = at_s

    def attach(self, rings: LegRings | None, wake_fd: int = -1) -> None:
        """Give the agent's rings, or take them away (one atomic store)."""
        self._outlet = None if rings is None else (rings, wake_fd)

    @property
    def sample(self) -> int:
        """The leg's clock."""
        return self._playout.sample

    def played(self) -> dict[str, int]:
        """Samples played of each item."""
        return _retried(self._playout.played)

    def final_progress(self) -> list[PlayoutProgress]:
        """Where the unfinished items stood; once no more ticks begin."""
        return _retried(self._playout.final_progress)

    @property
    def is_idle(self) -> bool:
        return self._playout.is_idle and not self.local_commands

    # ------------------------------------------------------------- clock thread

    def request(self) -> bytes:
        """First half of a tick: our samples."""
        if self._sent is not None:  # the received half was skipped
            self.receive(b"")
        outlet = self._outlet
        events: list[LegEvent] = self._answered()
        if outlet is not None:
            for _, payload in outlet[0].to_worker.read():
                events += self._apply(ring_commands.decode(payload))
        while self.local_commands:
            events += self._apply(self.local_commands.popleft())
        self._sent, played = self._playout.pull(len(self._silence) // 2, self.is_held)
        self._report([*events, *played, *self._meters["agent"].push(self._sent)])
        return self._sent

    def receive(self, received: bytes) -> None:
        """Second half: the party's samples (anything but a whole frame counts as silence)."""
        sent, self._sent = self._sent, None
        if sent is None:
            return
        if len(received) != len(sent):
            received = self._silence
        cleaned, is_voiced = self._caller_audio.listen(received, sent)
        self._playout.caller_is_voiced(is_voiced)
        self._report(list(self._meters["caller"].push(received)))
        keys = self.keys
        if keys is not None:
            digits = keys.push(received)
            self._report([DtmfReceived(leg_id=self._leg_id, digit=key, sample=self.sample) for key in digits])
        answer = self.answer
        if answer is not None:
            self._report(answer.push(received, is_voiced))
        outlet = self._outlet
        if outlet is None:
            return
        measured = self._caller_audio.take_measured()
        if measured is not None:
            self._report([measured])
        rings, wake_fd = outlet
        start_sample = self._playout.sample - len(sent) // 2
        tick = AudioTick(start_sample, received, sent, cleaned, is_voiced)
        if not rings.to_agent.write(RecordKind.AUDIO, pack_audio(tick), _KEPT_FREE_FOR_EVENTS):
            self.dropped_frames += 1
        os.eventfd_write(wake_fd, 1)

    # ------------------------------------------------------------------ private

    def _answered(self) -> list[LegEvent]:
        confirmed_at_s, self._confirmed_at_s = self._confirmed_at_s, None
        if confirmed_at_s is None:
            return []
        self._caller_audio.answered(self._leg_id)
        waited = round((time.monotonic() - confirmed_at_s) * self._rate_hz)
        return [WireMetric(leg_id=self._leg_id, kind="answered", sample=self.sample - waited)]

    def _apply(self, command: LegCommand) -> list[LegEvent]:
        try:
            return list(self._playout.apply(command))
        except LegError as error:  # the client checks first, so this is a defect of ours; the call goes on
            print(f"leg media: {error}", file=sys.stderr)
            return []

    def _report(self, events: Sequence[LegEvent]) -> None:
        outlet = self._outlet
        if outlet is not None:
            for event in events:
                outlet[0].to_agent.write(RecordKind.EVENT, encode(event))


def _retried(read: Callable[[], Read]) -> Read:
    """Read what the clock thread may be changing: an item added under our eyes makes Python's iteration fail."""
    while True:
        try:
            return read()
        except RuntimeError:
            continue
