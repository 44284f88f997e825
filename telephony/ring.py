"""Shared-memory rings between a media worker and the agent: one byte ring per direction, one writer, one reader each.

A ring carries whole records (a kind and a payload). Neither side ever waits for the other: a full ring refuses the
record and says so, an empty one returns nothing. The media callback therefore never blocks on a stuck agent (walk:
hops 1 and 13). The memory is an anonymous memfd handed over the Unix socket, so nothing is left behind when a process
is killed.

Positions are 64-bit counters that only grow; each is written by one side only, as one aligned store. On x86-64 (the one
supported architecture) stores are seen in program order, so payload before position is enough and no lock is needed.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from dataclasses import dataclass
from enum import IntEnum

_MAGIC = 0x4D4D52494E473031  # "MMRING01"
_HEADER_BYTES = 192
_OFFSET_MAGIC, _OFFSET_CAPACITY, _OFFSET_WRITTEN, _OFFSET_READ = 0, 8, 64, 128  # own cache lines
_RECORD = struct.Struct("<II")  # kind, payload bytes
_AUDIO = struct.Struct("<QII")  # start_sample, samples, flags
_IS_VOICED, _HAS_CLEANED = 1, 2  # flags; without _HAS_CLEANED the received samples had no echo to take out


class RecordKind(IntEnum):
    AUDIO = 1  # worker -> agent: one tick, as `AudioTick`
    EVENT = 2  # worker -> agent: msgpack of a LegEvent
    COMMAND = 3  # agent -> worker: msgpack of a LegCommand about play-out


class ByteRing:
    """One direction. The same class reads or writes; each process uses one role."""

    def __init__(self, memory: mmap.mmap, offset: int, capacity_bytes: int, is_new: bool) -> None:
        self._memory = memory
        self._start = offset + _HEADER_BYTES
        self.capacity_bytes = capacity_bytes
        self._magic = self._cell(offset + _OFFSET_MAGIC)
        self._capacity = self._cell(offset + _OFFSET_CAPACITY)
        self._written = self._cell(offset + _OFFSET_WRITTEN)
        self._read = self._cell(offset + _OFFSET_READ)
        if is_new:
            self._magic.value, self._capacity.value = _MAGIC, capacity_bytes
        if self._magic.value != _MAGIC or self._capacity.value != capacity_bytes:
            raise ValueError(
                f"not a ring of {capacity_bytes} bytes (magic {self._magic.value:#x}, {self._capacity.value} bytes)"
            )

    def _cell(self, offset: int) -> ctypes.c_uint64:
        return ctypes.c_uint64.from_buffer(self._memory, offset)

    @property
    def free_bytes(self) -> int:
        return self.capacity_bytes - (self._written.value - self._read.value)

    def write(self, kind: RecordKind, payload: bytes, keep_free_bytes: int = 0) -> bool:
        """Append one record; False (and no change) when fewer than `keep_free_bytes` would stay free."""
        record = _RECORD.pack(kind, len(payload)) + payload
        if self.free_bytes - len(record) < keep_free_bytes:
            return False
        position = self._written.value
        at = position % self.capacity_bytes
        first = min(len(record), self.capacity_bytes - at)
        self._memory[self._start + at : self._start + at + first] = record[:first]
        if first < len(record):
            self._memory[self._start : self._start + len(record) - first] = record[first:]
        self._written.value = position + len(record)
        return True

    def read(self) -> list[tuple[RecordKind, bytes]]:
        """All whole records written so far, oldest first."""
        position, end = self._read.value, self._written.value
        records = []
        while position < end:
            kind, size = _RECORD.unpack(self._copy(position, _RECORD.size))
            records.append((RecordKind(kind), self._copy(position + _RECORD.size, size)))
            position += _RECORD.size + size
        self._read.value = position
        return records

    def _copy(self, position: int, size: int) -> bytes:
        at = position % self.capacity_bytes
        first = min(size, self.capacity_bytes - at)
        start = self._start + at
        head = self._memory[start : start + first]
        return head if first == size else head + self._memory[self._start : self._start + size - first]

    def release(self) -> None:
        """Let go of the memory, so that the map can be closed."""
        del self._magic, self._capacity, self._written, self._read


class LegRings:
    """Both rings of one leg: `to_agent` (caller audio, play-out events) and `to_worker` (play-out commands)."""

    def __init__(self, fd: int, to_agent_bytes: int, to_worker_bytes: int, is_new: bool) -> None:
        self.fd = fd
        self.to_agent_bytes, self.to_worker_bytes = to_agent_bytes, to_worker_bytes
        size = 2 * _HEADER_BYTES + to_agent_bytes + to_worker_bytes
        if is_new:
            os.ftruncate(fd, size)
        elif os.fstat(fd).st_size != size:
            raise ValueError(f"ring memory has {os.fstat(fd).st_size} bytes, expected {size}")
        self._memory = mmap.mmap(fd, size)
        self.to_agent = ByteRing(self._memory, 0, to_agent_bytes, is_new)
        self.to_worker = ByteRing(self._memory, _HEADER_BYTES + to_agent_bytes, to_worker_bytes, is_new)

    @classmethod
    def create(cls, sample_rate_hz: int, seconds: float) -> LegRings:
        """Rings for `seconds` of audio each (received, sent and cleaned samples travel to the agent), plus room for
        events.
        """
        audio_bytes = _round_up(int(sample_rate_hz * seconds) * 2)
        fd = os.memfd_create("minmo-leg", os.MFD_CLOEXEC)
        return cls(fd, 3 * audio_bytes + 2**17, audio_bytes + 2**17, is_new=True)

    def close(self) -> None:
        self.to_agent.release()
        self.to_worker.release()
        self._memory.close()
        os.close(self.fd)


@dataclass(frozen=True)
class AudioTick:
    """One tick of the wire: equally many samples (int16) received, sent, and received without our echo."""

    start_sample: int
    received: bytes
    sent: bytes
    cleaned: bytes
    is_voiced: bool


def pack_audio(tick: AudioTick) -> bytes:
    assert len(tick.received) == len(tick.sent) == len(tick.cleaned), tick
    has_cleaned = tick.cleaned != tick.received
    flags = tick.is_voiced * _IS_VOICED | has_cleaned * _HAS_CLEANED
    head = _AUDIO.pack(tick.start_sample, len(tick.received) // 2, flags)
    return head + tick.received + tick.sent + (tick.cleaned if has_cleaned else b"")


def unpack_audio(payload: bytes) -> AudioTick:
    start_sample, num_samples, flags = _AUDIO.unpack_from(payload)
    size = 2 * num_samples
    received, sent, cleaned = (payload[_AUDIO.size + part * size :][:size] for part in range(3))
    has_cleaned = bool(flags & _HAS_CLEANED)
    return AudioTick(start_sample, received, sent, cleaned if has_cleaned else received, bool(flags & _IS_VOICED))


def _round_up(size: int) -> int:
    return -(-size // 4096) * 4096
