"""What a supervisor does to a running call, in the agent process: hear it, end it, pause its recording; and how the
agent itself is. The page's server asks over a Unix socket of the run folder (mode 0700); whether the person may, and
that it is audited, is decided there.

Hearing is a tap: it reads what crossed the wire in both directions and can neither change nor delay it; a listener who
is slow loses the oldest second, nobody else notices. Messages are msgpack behind a 4-byte length; the page's end is
`listen`, `hang_up`, `keep_recording` and `agent_status`.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Protocol

import msgspec

MAX_MESSAGE_BYTES = 1 << 16
MAX_QUEUED = 50  # ticks of 20 ms
ANSWER_WITHIN_S = 5.0
_LENGTH = struct.Struct(">I")


class Listen(msgspec.Struct, frozen=True, tag=True):
    call_id: str


class HangUp(msgspec.Struct, frozen=True, tag=True):
    call_id: str


class KeepRecording(msgspec.Struct, frozen=True, tag=True):
    """Sound is kept from now on, or not (a card number is about to be spoken)."""

    call_id: str
    is_kept: bool
    by: str


class TellStatus(msgspec.Struct, frozen=True, tag=True):
    """How are you?"""


class AgentStatus(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The agent process at this moment; that it answers shows that its loop turns."""

    num_calls: int = 0
    max_calls: int = 0
    is_closing: bool = False  # takes no new calls
    is_engine_connected: bool = False
    num_workers: int = 0  # media workers for SIP that it is connected to
    worst_lag_ms: float = 0.0  # of its loop, in the last minute
    num_stalls: int = 0  # since it started


class Listening(msgspec.Struct, frozen=True, tag=True):
    sample_rate_hz: int


class Heard(msgspec.Struct, frozen=True, tag=True):
    """One tick of the wire, int16 mono each."""

    start_sample: int
    caller: bytes
    agent: bytes


class Done(msgspec.Struct, frozen=True, tag=True):
    """Carried out; or, after `Listening`, the call is over."""


class NoSuchCall(msgspec.Struct, frozen=True, tag=True):
    """It is not running here."""


Ask = Listen | HangUp | KeepRecording | TellStatus
Told = Listening | Heard | Done | NoSuchCall | AgentStatus

_encoder = msgspec.msgpack.Encoder()
_asks: msgspec.msgpack.Decoder[Ask] = msgspec.msgpack.Decoder(Ask)
_tolds: msgspec.msgpack.Decoder[Told] = msgspec.msgpack.Decoder(Told)


class RunningCall(Protocol):
    """What the monitor needs of a call."""

    @property
    def sample_rate_hz(self) -> int: ...

    def hang_up(self, cause: str) -> None: ...

    def keep_recording(self, is_kept: bool, by: str) -> None: ...


class Monitor:
    """One per agent process, on its event loop. `calls`: those that run now, by call id."""

    def __init__(self, calls: Mapping[str, RunningCall]) -> None:
        self._calls = calls
        self.tell_status: Callable[[], AgentStatus] = AgentStatus  # set by whoever knows (agent/agent_process.py)
        self._listeners: dict[str, set[asyncio.Queue[Heard | None]]] = {}

    def tap(self, call_id: str) -> Callable[[int, bytes, bytes], None]:
        """To be given both directions of every tick of this call."""

        def push(start_sample: int, caller_pcm: bytes, agent_pcm: bytes) -> None:
            for queue in self._listeners.get(call_id, ()):
                _put(queue, Heard(start_sample, caller_pcm, agent_pcm))

        return push

    def call_ended(self, call_id: str) -> None:
        """Its listeners are told."""
        for queue in self._listeners.pop(call_id, ()):
            _put(queue, None)

    async def serve(self, path: Path) -> asyncio.Server:
        path.unlink(missing_ok=True)
        return await asyncio.start_unix_server(self._on_connection, str(path))

    async def _on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, ValueError, msgspec.DecodeError, asyncio.IncompleteReadError):
            async with asyncio.timeout(ANSWER_WITHIN_S):
                ask = _asks.decode(await _read(reader))
            if isinstance(ask, TellStatus):
                writer.write(_framed(self.tell_status()))
            else:
                await self._serve(ask, reader, writer)
            await writer.drain()
        writer.close()

    async def _serve(
        self, ask: Listen | HangUp | KeepRecording, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        call = self._calls.get(ask.call_id)
        if call is None:
            writer.write(_framed(NoSuchCall()))
        elif isinstance(ask, HangUp):
            call.hang_up("supervisor")
            writer.write(_framed(Done()))
        elif isinstance(ask, KeepRecording):
            call.keep_recording(ask.is_kept, ask.by)
            writer.write(_framed(Done()))
        else:
            await self._let_listen(ask.call_id, call, reader, writer)

    async def _let_listen(
        self, call_id: str, call: RunningCall, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        queue: asyncio.Queue[Heard | None] = asyncio.Queue()
        listeners = self._listeners.setdefault(call_id, set())
        listeners.add(queue)
        gone = asyncio.ensure_future(reader.read(1))
        try:
            writer.write(_framed(Listening(call.sample_rate_hz)))
            while not gone.done():
                heard = await queue.get()
                writer.write(_framed(heard or Done()))
                await writer.drain()
                if heard is None:
                    return
        finally:
            gone.cancel()
            listeners.discard(queue)


# ------------------------------------------------------------------- the page's end


class NotRunning(Exception):
    """There is no such call now, or no agent to ask."""


async def hang_up(path: Path, call_id: str) -> None:
    """Returns when the agent has begun to end the call; raises NotRunning."""
    await _do(path, HangUp(call_id))


async def keep_recording(path: Path, call_id: str, is_kept: bool, by: str) -> None:
    """Returns when the agent has taken it on; raises NotRunning. `by` stands in the call's journal."""
    await _do(path, KeepRecording(call_id, is_kept, by))


async def agent_status(path: Path) -> AgentStatus:
    """Raises NotRunning; does not return while the agent's loop stands still: the caller bounds it."""
    async with _connection(path, TellStatus()) as reader:
        told = _tolds.decode(await _read(reader))
    if not isinstance(told, AgentStatus):
        raise NotRunning("the agent answered something else")
    return told


async def _do(path: Path, ask: HangUp | KeepRecording) -> None:
    async with _connection(path, ask) as reader:
        if not isinstance(_tolds.decode(await _read(reader)), Done):
            raise NotRunning(ask.call_id)


async def listen(path: Path, call_id: str) -> tuple[int, AsyncIterator[bytes]]:
    """(rate, pieces of interleaved int16: caller left, agent right) until the call is over; raises NotRunning.

    Closing the iterator ends it.
    """
    stack = contextlib.AsyncExitStack()
    reader = await stack.enter_async_context(_connection(path, Listen(call_id)))
    try:
        first = _tolds.decode(await _read(reader))
        if not isinstance(first, Listening):
            raise NotRunning(call_id)
    except BaseException:
        await stack.aclose()
        raise
    return first.sample_rate_hz, _pieces(reader, stack)


async def _pieces(reader: asyncio.StreamReader, stack: contextlib.AsyncExitStack) -> AsyncIterator[bytes]:
    async with stack:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while isinstance(heard := _tolds.decode(await _read(reader)), Heard):
                yield interleaved(heard.caller, heard.agent)


def interleaved(left: bytes, right: bytes) -> bytes:
    """Two mono int16 streams as one of two channels: `left` and `right` have the same length."""
    both = bytearray(2 * len(left))
    for byte in range(2):
        both[byte::4] = left[byte::2]
        both[2 + byte :: 4] = right[byte::2]
    return bytes(both)


@contextlib.asynccontextmanager
async def _connection(path: Path, ask: Ask) -> AsyncIterator[asyncio.StreamReader]:
    try:
        async with asyncio.timeout(ANSWER_WITHIN_S):
            reader, writer = await asyncio.open_unix_connection(str(path))
    except (OSError, TimeoutError) as error:
        raise NotRunning(f"no agent: {error}") from error
    try:
        writer.write(_framed(ask))
        yield reader
    except (OSError, asyncio.IncompleteReadError, msgspec.DecodeError) as error:
        raise NotRunning(f"the agent does not answer: {error}") from error
    finally:
        writer.close()


def _put(queue: asyncio.Queue[Heard | None], heard: Heard | None) -> None:
    if queue.qsize() >= MAX_QUEUED:
        queue.get_nowait()
    queue.put_nowait(heard)


async def _read(reader: asyncio.StreamReader) -> bytes:
    (size,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    if size > MAX_MESSAGE_BYTES:
        raise ValueError(f"message of {size} bytes, at most {MAX_MESSAGE_BYTES}")
    return await reader.readexactly(size)


def _framed(message: msgspec.Struct) -> bytes:
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body
