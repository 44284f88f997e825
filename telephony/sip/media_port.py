"""pjsua2's media callback of one leg: 20 ms out of play-out, 20 ms into the shared-memory ring, nothing else (hops 1
and 13).

Runs on pjmedia's clock thread, which every call of the process shares: no I/O, no lock, no wait, no logging in the
normal path. Each tick pjmedia first asks for our samples, then gives us the party's; both together are one tick of the
leg clock. The samples are copied by ctypes because SWIG's own copies cost 10 to 200 times as much; that depends on
libstdc++'s vector layout, which `check_frame_copy` proves at start.
"""

from __future__ import annotations

import ctypes
import os
import sys
import traceback
from collections import deque

import pjsua2 as pj

from telephony.config import TelephonyConfig
from telephony.leg import LegCommand, LegError, LegEvent, PlayoutProgress
from telephony.playout import Playout
from telephony.ring import LegRings, RecordKind, pack_audio
from telephony.wire import encode, ring_commands
from telephony.wire_metrics import VoicedEnergyMeter

_KEPT_FREE_FOR_EVENTS = 1 << 16  # audio is dropped (and counted) before an event would be


class MediaPort(pj.AudioMediaPort):
    """Everything here but `local_commands`, `is_held` and `attach` belongs to the clock thread."""

    def __init__(self, leg_id: str, config: TelephonyConfig) -> None:
        super().__init__()
        self._playout = Playout(leg_id, config)
        self._meters = {party: VoicedEnergyMeter(leg_id, party, config) for party in ("caller", "agent")}
        self._silence = bytes(2 * config.samples_per_frame)
        self._template = pj.ByteVector(len(self._silence), 0)
        self._sent: bytes | None = None  # asked for, its received half not seen yet
        self._outlet: tuple[LegRings, int] | None = None
        self.local_commands: deque[LegCommand] = deque()  # from the worker itself (apology); append is atomic
        self.is_held = False
        self.dropped_frames = 0
        audio_format = pj.MediaFormatAudio()
        audio_format.init(pj.PJMEDIA_FORMAT_PCM, config.sample_rate_hz, 1, config.ptime_ms * 1000, 16)
        self.createPort(f"leg-{leg_id}", audio_format)

    def attach(self, rings: LegRings | None, wake_fd: int = -1) -> None:
        """Give the agent's rings, or take them away (one atomic store)."""
        self._outlet = None if rings is None else (rings, wake_fd)

    @property
    def sample(self) -> int:
        """The leg's clock."""
        return self._playout.sample

    def played(self) -> dict[str, int]:
        """Samples played of each item, asked from the main thread."""
        for _ in range(10):
            try:
                return self._playout.played()
            except RuntimeError:  # the clock thread added an item while we copied
                continue
        return {}

    def final_progress(self) -> list[PlayoutProgress]:
        """Where the unfinished items stood; only once pjsip has stopped asking for samples."""
        return self._playout.final_progress()

    @property
    def is_idle(self) -> bool:
        return self._playout.is_idle and not self.local_commands

    # ------------------------------------------------- clock thread, from pjsip

    def onFrameRequested(self, frame: pj.MediaFrame) -> None:
        pcm = self._silence
        try:
            if self._sent is not None:  # pjmedia skipped our receiving half
                self._finish_tick(self._silence)
            pcm = self._start_tick()
        except Exception:  # noqa: BLE001 - an exception must not unwind into pjmedia's C stack: the call goes on in silence
            traceback.print_exc(file=sys.stderr)
        frame.type = pj.PJMEDIA_FRAME_TYPE_AUDIO
        frame.buf = self._template
        frame.size = len(pcm)
        ctypes.memmove(_vector_start(frame.buf), pcm, len(pcm))

    def onFrameReceived(self, frame: pj.MediaFrame) -> None:
        try:
            if self._sent is not None:
                received = _vector_bytes(frame.buf) if frame.type == pj.PJMEDIA_FRAME_TYPE_AUDIO else b""
                self._finish_tick(received if len(received) == len(self._silence) else self._silence)
        except Exception:  # noqa: BLE001 - as above
            traceback.print_exc(file=sys.stderr)

    # ---------------------------------------------------------------- private

    def _start_tick(self) -> bytes:
        outlet = self._outlet
        events: list[LegEvent] = []
        if outlet is not None:
            for _, payload in outlet[0].to_worker.read():
                events += self._apply(ring_commands.decode(payload))
        while self.local_commands:
            events += self._apply(self.local_commands.popleft())
        self._sent, played = self._playout.pull(len(self._silence) // 2, self.is_held)
        events += played
        events += self._meters["agent"].push(self._sent)
        self._report(events)
        return self._sent

    def _apply(self, command: LegCommand) -> list[LegEvent]:
        try:
            return list(self._playout.apply(command))
        except LegError as error:  # the client checks first, so this is a defect of ours; the call goes on
            print(f"media port: {error}", file=sys.stderr)
            return []

    def _finish_tick(self, received: bytes) -> None:
        sent, self._sent = self._sent, None
        assert sent is not None
        self._report(list(self._meters["caller"].push(received)))
        outlet = self._outlet
        if outlet is None:
            return
        rings, wake_fd = outlet
        start_sample = self._playout.sample - len(sent) // 2
        if not rings.to_agent.write(RecordKind.AUDIO, pack_audio(start_sample, received, sent), _KEPT_FREE_FOR_EVENTS):
            self.dropped_frames += 1
        os.eventfd_write(wake_fd, 1)

    def _report(self, events: list[LegEvent]) -> None:
        outlet = self._outlet
        if outlet is not None:
            for event in events:
                outlet[0].to_agent.write(RecordKind.EVENT, encode(event))


def _vector_start(vector: pj.ByteVector) -> int:
    """Address of a std::vector's first byte: the first word of the object."""
    start = ctypes.c_void_p.from_address(int(vector.this)).value
    assert start is not None
    return start


def _vector_bytes(vector: pj.ByteVector) -> bytes:
    address = int(vector.this)
    start = ctypes.c_void_p.from_address(address).value
    end = ctypes.c_void_p.from_address(address + 8).value
    return ctypes.string_at(start, end - start) if start and end else b""


def check_frame_copy() -> None:
    """Prove the vector layout on this build before any call depends on it."""
    pattern = bytes(range(64)) * 10
    frame = pj.MediaFrame()
    frame.buf = pj.ByteVector(len(pattern), 0)
    ctypes.memmove(_vector_start(frame.buf), pattern, len(pattern))
    if bytes(frame.buf) != pattern or _vector_bytes(frame.buf) != pattern:
        raise RuntimeError("this pjsua2 build lays out std::vector differently; frames cannot be copied")
