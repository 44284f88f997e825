"""The engine's socket protocol: 4-byte big-endian length, then one msgpack message of api.py (or one of those below).

Shared by server.py and client.py; knows the messages and nothing else. No pickle: msgspec refuses what is not in the
union.
"""

from __future__ import annotations

import asyncio

import msgspec

from minmo_runtime.api import Message, RuntimeEvent, RuntimeRequest

# The longest legal message is a transcript replay or 30 s of 24 kHz audio; anything longer is a broken peer.
MAX_MESSAGE_BYTES = 4 * 1024 * 1024
_LENGTH_BYTES = 4


class ProtocolError(ValueError):
    """The peer does not speak this protocol."""


class StreamRefused(Message, frozen=True):
    """Answer to OpenStream without room: the client raises RuntimeOverloaded(reason)."""

    reason: str


class StreamEnded(Message, frozen=True):
    """No event of this call follows."""


class Check(Message, frozen=True):
    """Does the runtime work? `call_id` names the question, no call."""


class Checked(Message, frozen=True):
    """Answer to Check: it does, or why not."""

    reason: str = ""


WireRequest = RuntimeRequest | Check
WireEvent = RuntimeEvent | StreamRefused | StreamEnded | Checked

_encoder = msgspec.msgpack.Encoder()
_request_decoder: msgspec.msgpack.Decoder[WireRequest] = msgspec.msgpack.Decoder(WireRequest)
_event_decoder: msgspec.msgpack.Decoder[WireEvent] = msgspec.msgpack.Decoder(WireEvent)


def pack(message: Message) -> bytes:
    body = _encoder.encode(message)
    return len(body).to_bytes(_LENGTH_BYTES, "big") + body


async def read_body(reader: asyncio.StreamReader) -> bytes | None:
    """The next message's bytes; None when the peer has closed between messages, ConnectionError when inside one.

    ProtocolError for a length that no message has.
    """
    try:
        head = await reader.readexactly(_LENGTH_BYTES)
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise ConnectionError("peer closed inside a message") from error
        return None
    length = int.from_bytes(head, "big")
    if length > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"message of {length} bytes, at most {MAX_MESSAGE_BYTES} are allowed")
    try:
        return await reader.readexactly(length)
    except asyncio.IncompleteReadError as error:
        raise ConnectionError("peer closed inside a message") from error


def decode_request(body: bytes) -> WireRequest:
    return _request_decoder.decode(body)


def decode_event(body: bytes) -> WireEvent:
    return _event_decoder.decode(body)
