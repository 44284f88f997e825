"""The journal on disk: one append-only file per call, written before anything is acknowledged.

Record = length (u32 little endian) · CRC-32 of the body (u32) · body (msgpack of an Entry). write(2) makes it survive
the death of any process, fsync the loss of power. After a crash the tail may be torn: reading stops at the first
record that is short or whose check sum is wrong, and the file is cut there, so that later records are readable again.
Knows no SQL. Source: reliability.md §5.1 rules 2-4.
"""

from __future__ import annotations

import os
import struct
import threading
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from storage.entries import AnyEntry, Entry, JournalUnavailable, check_id

_HEADER = struct.Struct("<II")
MAX_BODY_BYTES = 1 << 20  # far above any entry; a longer length field is damage
SUFFIX = ".journal"
REFUSED_SUFFIX = ".refused"

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyEntry] = msgspec.msgpack.Decoder(AnyEntry)


def pack(entry: Entry) -> bytes:
    body = _encoder.encode(entry)
    return _HEADER.pack(len(body), zlib.crc32(body)) + body


@dataclass(frozen=True)
class JournalContent:
    entries: list[AnyEntry]
    num_good_bytes: int
    num_bad_bytes: int  # torn or damaged tail


def unpack(raw: bytes) -> JournalContent:
    """All whole records from the start of `raw`."""
    entries: list[AnyEntry] = []
    position = 0
    while position + _HEADER.size <= len(raw):
        length, checksum = _HEADER.unpack_from(raw, position)
        start, end = position + _HEADER.size, position + _HEADER.size + length
        body = raw[start:end]
        if length > MAX_BODY_BYTES or len(body) < length or zlib.crc32(body) != checksum:
            break
        try:
            entries.append(_decoder.decode(body))
        except msgspec.MsgspecError:  # a newer version's entry: not ours to lose, the file is kept by the caller
            break
        position = end
    return JournalContent(entries, position, len(raw) - position)


def sync_folder(folder: Path) -> None:
    """A new name is safe only when its folder is synced too."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass
class CallJournal:
    """The open file of one call. One owner appends; `sync` may be called from another thread."""

    path: Path
    is_synced: bool
    _descriptor: int = -1
    _length: int = 0
    is_dirty: bool = field(default=False)
    _lock: threading.Lock = field(default_factory=threading.Lock)  # a descriptor must not be closed under a sync

    @classmethod
    def open(cls, folder: Path, call_id: str, *, is_synced: bool) -> CallJournal:
        """Creates the file, or goes on after its last whole record."""
        path = folder / (check_id(call_id) + SUFFIX)
        journal = cls(path=path, is_synced=is_synced)
        try:
            journal._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            raw = path.read_bytes()
            journal._length = unpack(raw).num_good_bytes
            if journal._length < len(raw):
                path.with_suffix(".damaged").write_bytes(raw[journal._length :])
                os.ftruncate(journal._descriptor, journal._length)
            if is_synced:
                sync_folder(folder)
        except OSError as error:
            raise JournalUnavailable(f"{path.name}: {error}") from error
        return journal

    def append(self, entry: Entry, *, sync: bool) -> None:
        """Returns when the record is with the kernel, and with `sync` when it is on the disk.

        Raises, and leaves no torn record.
        """
        record = pack(entry)
        try:
            if os.write(self._descriptor, record) != len(record):
                raise OSError("short write")
            self._length += len(record)
            self.is_dirty = True
        except OSError as error:
            os.ftruncate(self._descriptor, self._length)
            raise JournalUnavailable(f"{self.path.name}: {error}") from error
        if sync:
            self._sync()

    def sync_if_dirty(self) -> None:
        """For group commit: what was written since the last sync reaches the disk."""
        if self.is_dirty:
            self._sync()

    def _sync(self) -> None:
        self.is_dirty = False  # before the sync: what is written meanwhile makes it dirty again
        with self._lock:
            if not self.is_synced or self._descriptor < 0:
                return
            try:
                os.fdatasync(self._descriptor)
            except OSError as error:
                self.is_dirty = True
                raise JournalUnavailable(f"{self.path.name}: {error}") from error

    def close(self, *, remove: bool = False, is_refused: bool = False) -> None:
        """`remove`: everything is in the database; the file has done its work. `is_refused`: the tables did not take
        every entry; the file stays, under a name that no start reads again. Neither: nothing more is written, and the
        file waits for the database without holding a descriptor. Idempotent.
        """
        with self._lock:
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1
        if remove:
            self.path.unlink(missing_ok=True)
        elif is_refused:
            keep_refused(self.path)


def keep_refused(path: Path) -> None:
    """For a person to look at: what the tables refused is nowhere else."""
    path.rename(path.with_suffix(REFUSED_SUFFIX))
