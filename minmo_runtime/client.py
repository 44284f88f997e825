"""`api.Runtime` over the engine's Unix socket. One connection carries all calls of one agent process.

When the connection breaks, every open stream's `events` raises StreamLost and so does `send`: the agent replays
transcripts on the next engine. It knows nothing of models; it does not reconnect by itself (the agent owns that
decision).
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec

from minmo_runtime.api import (
    CloseStream,
    OpenStream,
    RuntimeEvent,
    RuntimeOverloaded,
    RuntimeRequest,
    StreamFailed,
    StreamLost,
    StreamOpened,
)
from minmo_runtime.event_queues import EventQueues
from minmo_runtime.wire import (
    Check,
    Checked,
    ProtocolError,
    StreamEnded,
    StreamRefused,
    WireRequest,
    decode_event,
    pack,
    read_body,
)

# The writer's buffer may hold this much unsent audio before `send` waits: about 6 s of four calls.
_MAX_UNSENT_BYTES = 1 << 20


class RuntimeClient:
    """Use `await RuntimeClient.connect(path)`, and `await client.close()` at the end."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._queues = EventQueues()
        self._open: set[str] = set()
        self._opening: dict[str, asyncio.Future[None]] = {}
        self._checking: dict[str, asyncio.Future[str]] = {}
        self._is_lost = False
        self._reading = asyncio.create_task(self._read(), name="runtime-client/read")

    @classmethod
    async def connect(cls, socket_path: str | Path) -> RuntimeClient:
        reader, writer = await asyncio.open_unix_connection(str(socket_path))
        writer.transport.set_write_buffer_limits(high=_MAX_UNSENT_BYTES)
        return cls(reader, writer)

    @property
    def is_lost(self) -> bool:
        return self._is_lost

    @property
    def num_held(self) -> int:
        """Calls of which anything is kept here: open ones, and those whose events somebody has still to read."""
        return len(self._open | self._opening.keys() | self._queues.names)

    @property
    def num_open(self) -> int:
        return len(self._open)

    def leave(self, call_id: str) -> None:
        """Nobody will read this call's events, or read on."""
        self._queues.leave(call_id)

    async def send(self, request: RuntimeRequest) -> None:
        call_id = request.call_id
        if self._is_lost:
            raise StreamLost("the engine's connection is gone")
        match request:
            case OpenStream():
                if call_id in self._open or call_id in self._opening:
                    raise ValueError(f"stream {call_id!r} is already open")
                opened = self._opening[call_id] = asyncio.get_running_loop().create_future()
                await self._write(request)
                try:
                    await opened
                except asyncio.CancelledError:
                    if call_id in self._open:  # it was opened this very moment, for nobody
                        self._give_up(call_id)
                    raise
            case CloseStream():
                if call_id in self._open:
                    await self._write(request)
            case _:
                if call_id not in self._open:
                    raise StreamLost(f"no open stream {call_id!r}")
                await self._write(request)

    async def check(self) -> None:
        if self._is_lost:
            raise StreamLost("the engine's connection is gone")
        name = f"check-{uuid.uuid4().hex}"
        checked = self._checking[name] = asyncio.get_running_loop().create_future()
        try:
            await self._write(Check(call_id=name))
            if reason := await checked:
                raise StreamLost(reason)
        finally:
            del self._checking[name]

    def events(self, call_id: str) -> AsyncIterator[RuntimeEvent]:
        return self._queues.events(call_id)

    async def close(self) -> None:
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)
        self._lose("the client was closed")
        self._writer.close()
        await asyncio.gather(self._writer.wait_closed(), return_exceptions=True)

    async def _write(self, request: WireRequest) -> None:
        try:
            self._writer.write(pack(request))
            await self._writer.drain()
        except ConnectionError as error:
            self._lose(str(error))
            raise StreamLost("the engine's connection is gone") from error

    async def _read(self) -> None:
        reason = "the engine closed the connection"
        try:
            while (body := await read_body(self._reader)) is not None:
                self._receive(body)
        except (ConnectionError, ProtocolError, msgspec.ValidationError, msgspec.DecodeError) as error:
            reason = str(error)
        finally:  # however reading ends: a connection that nobody reads must not look alive
            self._lose(reason)

    def _receive(self, body: bytes) -> None:
        event = decode_event(body)
        call_id = event.call_id
        match event:
            case StreamRefused():
                opening = self._opening.pop(call_id, None)
                if opening is not None and not opening.done():
                    opening.set_exception(RuntimeOverloaded(event.reason))
            case Checked():
                checking = self._checking.get(call_id)
                if checking is not None and not checking.done():
                    checking.set_result(event.reason)
            case StreamEnded():
                self._open.discard(call_id)
                self._queues.end(call_id)
            case _:
                if isinstance(event, StreamOpened) and (opening := self._opening.pop(call_id, None)):
                    if opening.done():  # who asked has given up meanwhile: a caller who hung up while it rang
                        self._give_up(call_id)
                        return
                    self._open.add(call_id)
                    self._queues.open(call_id)
                    opening.set_result(None)
                if isinstance(event, StreamFailed):
                    self._open.discard(call_id)
                if not self._queues.put(event):
                    self._open.discard(call_id)
                    self._writer.write(pack(CloseStream(call_id=call_id)))

    def _give_up(self, call_id: str) -> None:
        """Close a stream that nobody reads."""
        self._queues.leave(call_id)
        self._writer.write(pack(CloseStream(call_id=call_id)))

    def _lose(self, reason: str) -> None:
        if self._is_lost:
            return
        self._is_lost = True
        for call_id in self._open:
            self._queues.end(call_id, StreamLost(reason))
        waiting: list[asyncio.Future[Any]] = [*self._opening.values(), *self._checking.values()]
        for future in waiting:
            if not future.done():
                future.set_exception(StreamLost(reason))
        self._open.clear()
        self._opening.clear()
