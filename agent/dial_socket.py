"""How another program of this user asks the agent to place a call: one question and one answer over a Unix socket of
the run folder (mode 0700). The page's server and `minmo dial` ask; whether the person may, and that it is audited, is
decided there. Messages are msgpack behind a 4-byte length.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

MAX_MESSAGE_BYTES = 1 << 14
ANSWER_WITHIN_S = 10.0
_LENGTH = struct.Struct(">I")


class Dial(msgspec.Struct, frozen=True, tag=True):
    """Call `number` by the campaign's trunks, or the SIP address `uri`, for this campaign. The same `request_id` again
    places no second call."""

    campaign: str
    number: str = ""
    uri: str = ""
    request_id: str = ""
    actor: str = ""


class Dialled(msgspec.Struct, frozen=True, tag=True):
    """The call exists; what becomes of it is in its record."""

    call_id: str
    is_new: bool = True


class NotDialled(msgspec.Struct, frozen=True, tag=True):
    """code: unknown_campaign | not_allowed | bad_target | busy | closing | storage_full | no_agent."""

    code: str
    reason: str
    retry_after_s: int = 0


_dials: msgspec.msgpack.Decoder[Dial] = msgspec.msgpack.Decoder(Dial)
_answers: msgspec.msgpack.Decoder[Dialled | NotDialled] = msgspec.msgpack.Decoder(Dialled | NotDialled)
_encoder = msgspec.msgpack.Encoder()


async def serve(path: Path, dial: Callable[[Dial], Awaitable[Dialled | NotDialled]]) -> asyncio.Server:
    """The agent's end."""

    async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, ValueError, msgspec.DecodeError, asyncio.IncompleteReadError, TimeoutError):
            async with asyncio.timeout(ANSWER_WITHIN_S):
                answer = await dial(_dials.decode(await _read(reader)))
            writer.write(_framed(answer))
            await writer.drain()
        writer.close()

    path.unlink(missing_ok=True)
    return await asyncio.start_unix_server(on_connection, str(path))


async def ask(path: Path, wanted: Dial) -> Dialled | NotDialled:
    """The other end; `no_agent` when nobody answers."""
    try:
        async with asyncio.timeout(ANSWER_WITHIN_S):
            reader, writer = await asyncio.open_unix_connection(str(path))
            try:
                writer.write(_framed(wanted))
                return _answers.decode(await _read(reader))
            finally:
                writer.close()
    except (OSError, TimeoutError, ValueError, msgspec.DecodeError, asyncio.IncompleteReadError) as error:
        return NotDialled("no_agent", f"no agent answers: {error or type(error).__name__}")


async def _read(reader: asyncio.StreamReader) -> bytes:
    (size,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    if size > MAX_MESSAGE_BYTES:
        raise ValueError(f"message of {size} bytes, at most {MAX_MESSAGE_BYTES}")
    return await reader.readexactly(size)


def _framed(message: msgspec.Struct) -> bytes:
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body
