"""How an offer reaches the worker that will carry the call: one Unix connection per call setup, between the page's
server and a worker.

    Offer --> worker --> agent decides --> Answered (SDP) | Refused (status, why)
    Check --> worker --> Here                                (its event loop, which is its media clock's too, turns)

The answer waits for the agent, exactly as a SIP caller waits for 200 OK. A connection that closes before the answer is
a caller who gave up (CANCEL). Signalling is sticky: every later word of a call goes over its own data channel, so it
reaches the process that holds it. Messages are msgpack behind a 4-byte length (telephony/wire.py). Needs no aiortc.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec

MAX_MESSAGE_BYTES = 1 << 18
_LENGTH = struct.Struct(">I")
_UCRED = struct.Struct("3i")


class Offer(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """A browser's SDP offer (RFC 3264, RFC 8829) with its candidates, and what its token said."""

    sdp: str
    did: str
    ani: str
    display_name: str = ""
    source_address: str = ""


class Answered(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    leg_id: str
    sdp: str


class Refused(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """`status` as in SIP and HTTP. `is_worker_full`: another worker may have room."""

    status: int
    reason: str
    retry_after_s: int = 0
    is_worker_full: bool = False


class Check(msgspec.Struct, frozen=True, tag=True):
    """Are you there?"""


class Here(msgspec.Struct, frozen=True, tag=True):
    """Answer to Check."""


Reply = Answered | Refused
Offered = Callable[[Offer], "asyncio.Future[Reply]"]

_encoder = msgspec.msgpack.Encoder()
_asks: msgspec.msgpack.Decoder[Offer | Check] = msgspec.msgpack.Decoder(Offer | Check)
_replies: msgspec.msgpack.Decoder[Reply | Here] = msgspec.msgpack.Decoder(Reply | Here)


async def serve_offers(path: Path, offered: Offered) -> asyncio.Server:
    """The worker's end. `offered` gives a future; it is cancelled when the caller gives up first."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.unlink(missing_ok=True)

    async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if _peer_user_id(writer) == os.getuid():
                await _serve_one(reader, writer, offered)
        except (OSError, ValueError, msgspec.DecodeError, asyncio.IncompleteReadError):
            pass  # not one of ours, or gone
        finally:
            writer.close()

    return await asyncio.start_unix_server(on_connection, str(path), backlog=64)


async def serve_checks(path: Path) -> asyncio.Server:
    """The same for a worker whose calls come another way: it only says that it is there."""
    return await serve_offers(path, _no_offers)


def _no_offers(_offer: Offer) -> asyncio.Future[Reply]:
    raise ValueError("no offers here")


async def _serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, offered: Offered) -> None:
    ask = _asks.decode(await _read(reader))
    if isinstance(ask, Check):
        writer.write(_framed(Here()))
        await writer.drain()
        return
    reply = offered(ask)
    gone = asyncio.ensure_future(reader.read(1))
    try:
        both: set[asyncio.Future[Any]] = {reply, gone}
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if reply.done() and not reply.cancelled():
            writer.write(_framed(reply.result()))
            await writer.drain()
    finally:
        gone.cancel()
        reply.cancel()


class OfferFailed(Exception):
    """No worker took the offer; the text says why."""


async def send_offer(path: Path, offer: Offer, timeout_s: float) -> Reply:
    """The page's end; OfferFailed when the worker is gone or silent. Cancelling it takes the call back."""
    reply = await _ask(path, offer, timeout_s)
    if isinstance(reply, Here):
        raise OfferFailed("an answer to another question")
    return reply


async def send_check(path: Path, timeout_s: float) -> None:
    """Returns when the worker has answered; OfferFailed."""
    await _ask(path, Check(), timeout_s)


async def _ask(path: Path, ask: Offer | Check, timeout_s: float) -> Reply | Here:
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_unix_connection(str(path))
            try:
                writer.write(_framed(ask))
                return _replies.decode(await _read(reader))
            finally:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
    except (OSError, ValueError, msgspec.DecodeError, asyncio.IncompleteReadError, TimeoutError) as error:
        raise OfferFailed(f"{type(error).__name__}: {error}") from error


class WorkerChoice:
    """Which worker an offer goes to: in turn, the next when one is full or gone."""

    def __init__(self, paths: list[Path], timeout_s: float) -> None:
        self._paths, self._timeout_s = paths, timeout_s
        self._next = 0

    async def offer(self, offer: Offer, send: Callable[[Path, Offer, float], Awaitable[Reply]] = send_offer) -> Reply:
        start, self._next = self._next, self._next + 1
        last = Refused(status=503, reason="calls from browsers are switched off", retry_after_s=60)
        for turn in range(len(self._paths)):
            path = self._paths[(start + turn) % len(self._paths)]
            try:
                reply = await send(path, offer, self._timeout_s)
            except OfferFailed:
                last = Refused(status=503, reason="the process for browser calls does not answer", retry_after_s=5)
                continue
            if not (isinstance(reply, Refused) and reply.is_worker_full):
                return reply
            last = reply
        return last


async def _read(reader: asyncio.StreamReader) -> bytes:
    (size,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    if size > MAX_MESSAGE_BYTES:
        raise ValueError(f"message of {size} bytes, at most {MAX_MESSAGE_BYTES}")
    return await reader.readexactly(size)


def _framed(message: msgspec.Struct) -> bytes:
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


def _peer_user_id(writer: asyncio.StreamWriter) -> int:
    peer = writer.get_extra_info("socket")
    user_id: int = _UCRED.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))[1]
    return user_id
