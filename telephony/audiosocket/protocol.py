"""AudioSocket's messages: bytes as TCP gives them in, whole messages out. Pure: no socket, no clock.

    kind (1 byte)  payload length (2 bytes, big endian)  payload

The exchange says UUID first, then audio, keys and at last HANGUP; we say audio and HANGUP, it understands no more.
Which message may come when is the connection's business (endpoint.py). Source: docs.asterisk.org, Configuration,
Channel Drivers, AudioSocket; kinds and directions: Asterisk's include/asterisk/res_audiosocket.h.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

_HEADER = struct.Struct(">BH")
_MAX_AUDIO_MS = 200  # of one message; Asterisk sends its channel's frames, 10 to 60 ms
_MAX_UNKNOWN_BYTES = 1_024  # of a kind that a later Asterisk may send: keys came in 2025, other rates too
FRAME_MS = 20  # of ours


class Kind(IntEnum):
    HANGUP = 0x00
    UUID = 0x01
    DTMF = 0x03
    SLIN = 0x10
    SLIN12 = 0x11
    SLIN16 = 0x12
    SLIN24 = 0x13
    SLIN32 = 0x14
    SLIN44 = 0x15
    SLIN48 = 0x16
    SLIN96 = 0x17
    SLIN192 = 0x18
    ERROR = 0xFF
    UNKNOWN = -1  # of a later Asterisk


RATE_HZ_OF = {
    Kind.SLIN: 8_000, Kind.SLIN12: 12_000, Kind.SLIN16: 16_000, Kind.SLIN24: 24_000, Kind.SLIN32: 32_000,
    Kind.SLIN44: 44_100, Kind.SLIN48: 48_000, Kind.SLIN96: 96_000, Kind.SLIN192: 192_000,
}  # fmt: skip
"""Signed linear, 16 bit, little endian, mono. An Asterisk from before October 2025 says SLIN whatever the rate is."""
_KINDS = frozenset(Kind) - {Kind.UNKNOWN}
_FIXED_BYTES = {Kind.HANGUP: (0,), Kind.UUID: (16,), Kind.DTMF: (1,), Kind.ERROR: (0, 1)}


class Malformed(Exception):
    """Not AudioSocket; the text says what, without the sender's bytes."""


@dataclass(frozen=True, slots=True)
class Message:
    kind: Kind
    payload: bytes


class MessageReader:
    """One connection's received direction; keeps less than one message."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def push(self, received: bytes) -> Iterator[Message]:
        """What is whole now. Raises Malformed after the last good message, as soon as a header is wrong; the rest is
        then never read."""
        self._bytes += received
        while len(self._bytes) >= _HEADER.size:
            kind, size = _checked(*_HEADER.unpack_from(self._bytes))
            end = _HEADER.size + size
            if len(self._bytes) < end:
                return
            payload = bytes(self._bytes[_HEADER.size : end])
            del self._bytes[:end]
            yield Message(kind, payload)

    @property
    def is_halfway(self) -> bool:
        """A message has begun and is not whole."""
        return bool(self._bytes)


def encode(kind: Kind, payload: bytes = b"") -> bytes:
    return _HEADER.pack(kind, len(payload)) + payload


def _checked(kind_byte: int, size: int) -> tuple[Kind, int]:
    if kind_byte not in _KINDS:
        if size > _MAX_UNKNOWN_BYTES:
            raise Malformed(f"unknown kind 0x{kind_byte:02x} of {size} bytes")
        return Kind.UNKNOWN, size
    kind = Kind(kind_byte)
    if kind in _FIXED_BYTES:
        if size not in _FIXED_BYTES[kind]:
            raise Malformed(f"{kind.name} of {size} bytes")
    elif size % 2 or not 0 < size <= 2 * RATE_HZ_OF[kind] * _MAX_AUDIO_MS // 1000:
        raise Malformed(f"{kind.name} of {size} bytes")
    return kind, size
