"""Agent side of a media worker: the legs of one worker process, over its Unix socket and shared-memory rings.

    client = await WorkerClient.connect(socket_path)         # retries until the worker listens or `timeout_s` is over
    client.hello                                             # Hello(sip_address, sip_port, max_calls, worker_pid)
    async for leg in client.legs():                          # each inbound call once; ends when the worker is gone
        ...                                                  # also calls that outlived an agent: leg.is_resumed is True
    leg = await client.place_call("sip:100@127.0.0.1:5070")  # outbound; CallRefused unless the host is configured
    await client.close()

`WorkerLeg` and `loopback.LoopbackLeg` implement `telephony.leg.Leg` and share: `leg_id`, `direction` (inbound |
outbound), `sample_rate_hz`, `is_resumed`, `state`, `send(command)`, `events()`, `set_tap(tap)`. `tap(start_sample,
caller_pcm, agent_pcm)` is given both directions, the same samples, as really received and really sent (silence
included): for recorder and monitor. A resumed leg's `played_before` says how many samples of each old item were heard;
the worker's apology may still be playing: `Flush()` ends it. After `Flush`, late `Play` chunks of a flushed item are
dropped: use a new item_id. `Flush(item_id="x")` is always answered.

Runs on the agent's event loop. Nothing here is in the media path: what has been sent with `Play` is played by the
worker however long this loop is stuck.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
import uuid
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from pathlib import Path

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
)  # fmt: skip
from telephony.outgoing import OutgoingAudio
from telephony.ring import LegRings, RecordKind, unpack_audio
from telephony.sip.causes import Cause
from telephony.states import check_legal, is_playout
from telephony.wire import (
    FDS_OF_LEG_OPENED,
    Alive,
    CommandRefused,
    FrameBuffer,
    Hello,
    LegOpened,
    PlaceCall,
    SecurityEvent,
    SendDtmf,
    ToAgent,
    TrunkChanged,
    decode_to_agent,
    encode,
    frame,
    ring_events,
)  # fmt: skip

_ALIVE_EVERY_S = 1.0
_MAX_EVENTS = 3000  # about a minute of frames nobody took; then the oldest audio is dropped
_REMEMBERED_ITEMS = 256


class CallRefused(LegError):
    """The worker did not place the call, with its reason; no packet was sent."""


class WorkerLost(Exception):
    """The media worker is gone or cannot be reached."""


class WorkerLeg:
    """One leg of a worker. Made by `WorkerClient`."""

    def __init__(self, client: WorkerClient, opened: LegOpened, fds: tuple[int, int], config: TelephonyConfig) -> None:
        self.leg_id, self.direction = opened.leg_id, opened.direction
        self.sample_rate_hz, self.is_resumed = opened.sample_rate_hz, opened.is_resumed
        self.played_before = opened.played
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
        """Keys out; methods: see `wire.SendDtmf`."""
        if self.state is not LegState.CONFIRMED:
            raise LegError(f"SendDtmf is not possible in state {self.state}")
        self._client.send(SendDtmf(leg_id=self.leg_id, digits=digits, method=method))

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


class WorkerClient:
    """One connection to one worker."""

    def __init__(self, connection: socket.socket, config: TelephonyConfig) -> None:
        self.config = config
        self.hello: Hello = None  # type: ignore[assignment]  # set before `connect` returns
        self._socket = connection
        self._buffer = FrameBuffer()
        self._fds: deque[int] = deque()
        self._unsent = bytearray()
        self._legs: dict[str, WorkerLeg] = {}
        self._inbound: asyncio.Queue[WorkerLeg | None] = asyncio.Queue()  # bounded by the worker's max_calls
        self._placing: dict[str, asyncio.Future[WorkerLeg]] = {}
        self._greeted: asyncio.Future[Hello] = asyncio.get_running_loop().create_future()
        self.lost = asyncio.Event()
        self.trunks: dict[str, TrunkChanged] = {}  # the last that was heard of each
        self.on_security_event: Callable[[SecurityEvent], None] | None = None
        self._alive_task: asyncio.Task[None] | None = None

    @classmethod
    async def connect(
        cls, socket_path: Path | str, timeout_s: float = 10.0, config: TelephonyConfig | None = None
    ) -> WorkerClient:
        """WorkerLost when no worker greets us in time. A worker that still holds a dead agent's socket is asked
        again."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                return await cls._connect_once(str(socket_path), deadline_s, config or TelephonyConfig())
            except (OSError, WorkerLost, TimeoutError) as error:
                if time.monotonic() > deadline_s:
                    raise WorkerLost(f"no media worker at {socket_path} within {timeout_s} s: {error}") from error
                await asyncio.sleep(0.05)

    @classmethod
    async def _connect_once(cls, socket_path: str, deadline_s: float, config: TelephonyConfig) -> WorkerClient:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(socket_path)
        except OSError:
            connection.close()
            raise
        connection.setblocking(False)
        client = cls(connection, config)
        try:
            await client._start(max(0.1, deadline_s - time.monotonic()))
        except BaseException:  # cancellation too: the socket must not stay registered with the loop
            client._lose()
            raise
        return client

    async def _start(self, timeout_s: float) -> None:
        asyncio.get_running_loop().add_reader(self._socket.fileno(), self.receive)
        self.hello = await asyncio.wait_for(self._greeted, timeout_s)
        self._alive_task = asyncio.create_task(self._say_alive(), name=f"worker-{self.hello.worker_pid}/alive")

    async def _say_alive(self) -> None:
        while True:
            self.send(Alive())
            await asyncio.sleep(_ALIVE_EVERY_S)

    # -------------------------------------------------------------------- calls

    async def legs(self) -> AsyncIterator[WorkerLeg]:
        """Inbound legs (and resumed ones of either direction), until the worker is gone."""
        while True:
            leg = await self._inbound.get()
            if leg is None:
                return
            yield leg

    async def place_call(
        self, uri: str = "", from_user: str = "", display_name: str = "", headers: dict[str, str] | None = None,
        number: str = "", trunks: tuple[str, ...] = (),
    ) -> WorkerLeg:  # fmt: skip
        """Send an INVITE to `uri`, or to `number` by way of `trunks`. The leg comes back at once, in CALLING; what
        becomes of it is in its events."""
        leg_id = uuid.uuid4().hex[:16]
        waiting: asyncio.Future[WorkerLeg] = asyncio.get_running_loop().create_future()
        self._placing[leg_id] = waiting
        self.send(PlaceCall(
            leg_id=leg_id, uri=uri, number=number, trunks=trunks, from_user=from_user, display_name=display_name,
            headers=headers or {},
        ))  # fmt: skip
        try:
            return await waiting
        finally:
            del self._placing[leg_id]

    async def close(self) -> None:
        """Leave. Calls still up are, to the worker, calls whose agent was lost."""
        self._lose()

    # ------------------------------------------------------------------- socket

    def send(self, message: msgspec.Struct) -> None:
        """Queue for the worker; never blocks."""
        if self.lost.is_set():
            return
        self._unsent += frame(message)
        self._flush()

    def _flush(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._unsent:
                del self._unsent[: self._socket.send(self._unsent)]
            loop.remove_writer(self._socket.fileno())
        except BlockingIOError:
            loop.add_writer(self._socket.fileno(), self._flush)
        except OSError:
            self._lose()

    def receive(self) -> None:
        """Take what the socket has."""
        try:
            while not self.lost.is_set():
                received, fds, _, _ = socket.recv_fds(self._socket, 1 << 16, 64)
                self._fds.extend(fds)
                if not received:
                    self._lose()
                    return
                for body in self._buffer.push(received):
                    self._on_message(decode_to_agent(body))
        except BlockingIOError:
            pass
        except OSError:
            self._lose()

    def _on_message(self, message: ToAgent) -> None:
        match message:
            case Hello():
                if not self._greeted.done():
                    self._greeted.set_result(message)
            case LegOpened():
                self._open(message)
            case TrunkChanged(trunk=trunk):
                self.trunks[trunk] = message
            case SecurityEvent():
                if self.on_security_event is not None:
                    self.on_security_event(message)
            case CommandRefused(leg_id=leg_id, command=command, reason=reason):
                waiting = self._placing.get(leg_id)
                if waiting is not None and not waiting.done():
                    waiting.set_exception(CallRefused(f"{command}: {reason}"))
            case _:
                leg = self._legs.get(message.leg_id)
                if leg is not None:
                    leg.on_message(message)
                    if isinstance(message, LegDisconnected):
                        del self._legs[message.leg_id]

    def _open(self, opened: LegOpened) -> None:
        fds = tuple(self._fds.popleft() for _ in range(FDS_OF_LEG_OPENED))
        leg = self._legs[opened.leg_id] = WorkerLeg(self, opened, (fds[0], fds[1]), self.config)
        waiting = self._placing.get(opened.leg_id)
        if waiting is None:
            self._inbound.put_nowait(leg)
        elif not waiting.done():
            waiting.set_result(leg)

    def _lose(self) -> None:
        """The worker is gone, and its calls with it."""
        if self.lost.is_set():
            return
        self.lost.set()
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._socket.fileno())
        loop.remove_writer(self._socket.fileno())
        self._socket.close()
        if self._alive_task is not None:
            self._alive_task.cancel()
        if not self._greeted.done():
            self._greeted.set_exception(WorkerLost("the worker closed the connection"))
            self._greeted.exception()  # retrieved, in case nobody waits any more
        for waiting in self._placing.values():
            if not waiting.done():
                waiting.set_exception(WorkerLost("the worker is gone"))
        for leg in list(self._legs.values()):
            leg.on_message(LegStateChanged(leg_id=leg.leg_id, state=LegState.DISCONNECTED))
            leg.on_message(LegDisconnected(leg_id=leg.leg_id, cause=Cause.WORKER_LOST, by="network"))
        self._legs.clear()
        while self._fds:
            os.close(self._fds.popleft())
        self._inbound.put_nowait(None)
