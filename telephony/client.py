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
import os
import socket
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec

from telephony.config import TelephonyConfig
from telephony.leg import LegDisconnected, LegError, LegState, LegStateChanged
from telephony.sip.causes import Cause
from telephony.wire import (
    FDS_OF_LEG_OPENED,
    Alive,
    CommandRefused,
    FrameBuffer,
    Hello,
    LegOpened,
    PlaceCall,
    SecurityEvent,
    ToAgent,
    TrunkChanged,
    decode_to_agent,
    frame,
)  # fmt: skip
from telephony.worker_leg import WorkerLeg as WorkerLeg

_ALIVE_EVERY_S = 1.0
_MAX_UNSENT_BYTES = 1 << 22  # a worker that leaves more unread is treated as lost, as it treats an agent


class CallRefused(LegError):
    """The worker did not place the call, with its reason; no packet was sent."""


class WorkerLost(Exception):
    """The media worker is gone or cannot be reached."""


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

    @property
    def num_free(self) -> int:
        """Calls this worker still takes, as far as we know: parties that were joined and left are its own."""
        return 0 if self.lost.is_set() else self.hello.max_calls - len(self._legs)

    def has_leg(self, leg_id: str) -> bool:
        return leg_id in self._legs

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
        number: str = "", trunks: tuple[str, ...] = (), leg_id: str = "", detects_answer: bool = False,
    ) -> WorkerLeg:  # fmt: skip
        """Send an INVITE to `uri`, or to `number` by way of `trunks`. The leg comes back at once, in CALLING; what
        becomes of it is in its events. The worker counts it from now on; CallRefused when it is full."""
        leg_id = leg_id or uuid.uuid4().hex[:16]
        waiting: asyncio.Future[WorkerLeg] = asyncio.get_running_loop().create_future()
        self._placing[leg_id] = waiting
        self.send(PlaceCall(
            leg_id=leg_id, uri=uri, number=number, trunks=trunks, from_user=from_user, display_name=display_name,
            headers=headers or {}, detects_answer=detects_answer,
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
        if len(self._unsent) > _MAX_UNSENT_BYTES:
            self._lose()

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
