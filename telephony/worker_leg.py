"""One leg of a media worker, at the agent's end: commands into the ring and the socket, events and audio out of them.

Made by `telephony.client.WorkerClient`, which holds the connection. Implements `telephony.leg.Leg`; bounded: audio that
nobody takes is dropped oldest first, and `Play` beyond what a leg keeps is refused here, before it is sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from typing import Protocol

import msgspec

from telephony.config import TelephonyConfig
from telephony.frames import Tap, audio_frame
from telephony.leg import (
    AudioFrame,
    Flush,
    Flushed,
    Hangup,
    LegCommand,
    LegDisconnected,
    LegError,
    LegEvent,
    LegState,
    LegStateChanged,
    Play,
    PlayoutProgress,
    SendDtmf,
)  # fmt: skip
from telephony.outgoing import OutgoingAudio
from telephony.ring import LegRings, RecordKind, unpack_audio
from telephony.sip.causes import Cause
from telephony.states import check_legal, is_playout
from telephony.wire import JoinLegs, LegOpened, encode, ring_events

_MAX_EVENTS = 3000  # about a minute of frames nobody took; then the oldest audio is dropped
_REMEMBERED_ITEMS = 256


class Connection(Protocol):
    """The worker's end of the wire, as a leg needs it."""

    def send(self, message: msgspec.Struct) -> None: ...

    def receive(self) -> None: ...


class WorkerLeg:
    """One leg of a worker. Made by `WorkerClient`."""

    def __init__(self, client: Connection, opened: LegOpened, fds: tuple[int, int], config: TelephonyConfig) -> None:
        self.leg_id, self.direction = opened.leg_id, opened.direction
        self.sample_rate_hz, self.is_resumed = opened.sample_rate_hz, opened.is_resumed
        self.played_before = opened.played
        self.can_transfer = opened.can_transfer
        self.state = opened.state
        self.dropped_frames = 0
        self._client = client
        self._rings: LegRings | None = LegRings(fds[0], opened.to_agent_bytes, opened.to_worker_bytes, is_new=False)
        self._wake_fd = fds[1]
        self._max_unplayed = int(config.max_unplayed_s * self.sample_rate_hz)
        self._outgoing = OutgoingAudio(self.sample_rate_hz)
        self._tap: Tap | None = None
        self._unplayed: dict[str, int] = {}  # item -> samples given and, as far as we have heard, not played
        self._played: dict[str, int] = {}
        self._closed: OrderedDict[str, None] = OrderedDict()
        self._events: deque[LegEvent] = deque()
        self._has_events = asyncio.Event()
        asyncio.get_running_loop().add_reader(self._wake_fd, self._on_wake)

    # ------------------------------------------------------------ Leg contract

    async def send(self, command: LegCommand) -> None:
        check_legal(command, self.state)
        if self._rings is None:
            return  # Hangup of a leg that is gone
        if not is_playout(command):
            self._client.send(command)
            return
        if isinstance(command, Play):
            if command.item_id in self._closed:
                return
            command = self._account_for(self._outgoing.at_leg_rate(command))
        elif isinstance(command, Flush):
            self._outgoing.forget(command.item_id)
            for item_id in [command.item_id] if command.item_id else list(self._unplayed):
                self._close_item(item_id)
        if not self._rings.to_worker.write(RecordKind.COMMAND, encode(command)):
            raise LegError(f"{type(command).__name__} is not possible: the media worker takes nothing from the ring")

    async def events(self) -> AsyncIterator[LegEvent]:
        while True:
            while self._events:
                event = self._events.popleft()
                yield event
                if isinstance(event, LegDisconnected):
                    return
            self._has_events.clear()
            await self._has_events.wait()

    def set_tap(self, tap: Tap | None) -> None:
        self._tap = tap

    def hang_up(self, cause: str = Cause.NORMAL) -> None:
        """`send(Hangup)` for a timer's callback."""
        if self.state is not LegState.DISCONNECTED:
            self._client.send(Hangup(leg_id=self.leg_id, cause=cause))

    async def send_dtmf(self, digits: str, method: str = "auto") -> None:
        """Keys out; methods: see `leg.SendDtmf`."""
        await self.send(SendDtmf(leg_id=self.leg_id, digits=digits, method=method))

    def join(self, other: WorkerLeg) -> None:
        """Connect this party with that of another leg of the same worker; see `wire.JoinLegs`."""
        self._client.send(JoinLegs(leg_id=self.leg_id, other_leg_id=other.leg_id))

    # ------------------------------------------------------------- from worker

    def on_message(self, event: LegEvent) -> None:
        """A signalling event from the socket."""
        if isinstance(event, LegStateChanged):
            self.state = event.state
        if isinstance(event, LegDisconnected | PlayoutProgress):
            self._drain()  # what the ring still holds came first
        if isinstance(event, LegDisconnected):
            self.release()
        self._push(event)

    def release(self) -> None:
        """Let go of rings and descriptors; the worker keeps its own."""
        if self._rings is not None:
            self.state = LegState.DISCONNECTED
            asyncio.get_running_loop().remove_reader(self._wake_fd)
            self._rings.close()
            self._rings = None
            os.close(self._wake_fd)

    def _on_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)
        if self.state is not LegState.CONFIRMED:
            self._client.receive()  # CONFIRMED was sent before this audio; take it first
        self._drain()

    def _drain(self) -> None:
        if self._rings is None:
            return
        for kind, payload in self._rings.to_agent.read():
            if kind is RecordKind.AUDIO:
                tick = unpack_audio(payload)
                if self._tap is not None:
                    self._tap(tick.start_sample, tick.received, tick.sent)
                frame = audio_frame(self.leg_id, self.sample_rate_hz, tick.start_sample, tick.cleaned, tick.is_voiced)
                self._push(frame)
            else:
                event = ring_events.decode(payload)
                self._note_played(event)
                self._push(event)

    def _note_played(self, event: LegEvent) -> None:
        if isinstance(event, PlayoutProgress) and event.item_id in self._unplayed:
            self._unplayed[event.item_id] -= event.played_samples - self._played.get(event.item_id, 0)
            self._played[event.item_id] = event.played_samples
            if event.is_finished:
                self._close_item(event.item_id)
        elif isinstance(event, Flushed):
            self._close_item(event.item_id)

    def _account_for(self, command: Play) -> Play:
        """Refuse what would make more than `max_unplayed_s` wait. Progress is reported late, so we err on the safe
        side."""
        num_samples = len(command.pcm) // 2
        waiting = sum(self._unplayed.values())
        if waiting + num_samples > self._max_unplayed:
            raise LegError(f"Play {command.item_id!r}: {waiting} samples unplayed, at most {self._max_unplayed}")
        self._unplayed[command.item_id] = self._unplayed.get(command.item_id, 0) + num_samples
        return command

    def _close_item(self, item_id: str) -> None:
        self._unplayed.pop(item_id, None)
        self._played.pop(item_id, None)
        self._closed[item_id] = None
        while len(self._closed) > _REMEMBERED_ITEMS:
            self._closed.popitem(last=False)

    def _push(self, event: LegEvent) -> None:
        if len(self._events) >= _MAX_EVENTS:
            oldest = next((i for i, kept in enumerate(self._events) if isinstance(kept, AudioFrame)), None)
            if oldest is not None:
                del self._events[oldest]
                self.dropped_frames += 1
        self._events.append(event)
        self._has_events.set()
