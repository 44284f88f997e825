"""What happens to journal files when the store opens: every entry reaches SQL, and open calls are found again.

A file is removed once its `call_closed` is in SQL; so the files that are left are exactly the calls nobody closed.
Only one process may write a folder: the lock is the kernel's and ends with the process, however it dies.
"""

from __future__ import annotations

import datetime as dt
import fcntl
import logging
import time
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from storage import tables
from storage.entries import AnyEntry, CallClosed, CallOpened, TurnAppended, WriterBusy
from storage.journal import SUFFIX, keep_refused, unpack
from storage.writer import commit_entries

log = logging.getLogger(__name__)
LOCK_WAIT_S = 5.0  # a parent restarts the agent while the old one may still be dying


@dataclass
class Orphan:
    """An open call of an earlier process."""

    call_id: str
    ani: str = ""
    sample_rate_hz: int = 8_000
    next_seq: int = 0
    next_position: int = 0
    last_at: dt.datetime = dt.datetime.min.replace(tzinfo=dt.UTC)
    turn_ids: list[str] = field(default_factory=list)
    entries: list[AnyEntry] = field(default_factory=list)  # the whole call so far; empty when only SQL knew of it


def take_writer_lock(folder: Path, wait_s: float = LOCK_WAIT_S) -> FileIO:
    """Keeps the returned file open as long as the lock shall hold. This is the shell: it may wait."""
    file = FileIO(str(folder / "writer.lock"), "a")
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.close()
                raise WriterBusy(f"{folder} is written by another process; stop it, or set storage.folder") from None
            time.sleep(0.05)


def read_file(path: Path) -> list[AnyEntry]:
    content = unpack(path.read_bytes())
    if content.num_bad_bytes:
        log.warning("%s: %d bytes after the last whole record are not readable", path.name, content.num_bad_bytes)
    return content.entries


def read_folder(folder: Path) -> list[AnyEntry]:
    return [entry for path in sorted(folder.glob("*" + SUFFIX)) for entry in read_file(path)]


def replay_folder(engine: Engine, folder: Path) -> dict[str, Orphan]:
    """Brings every journal file into SQL, removes the finished ones, returns the open calls by id."""
    orphans: dict[str, Orphan] = {}
    for path in sorted(folder.glob("*" + SUFFIX)):
        entries = read_file(path)
        refused: set[str] = set()
        num_new = commit_entries(engine, entries, refused)
        if num_new:
            log.info("%s: %d of %d entries were not in SQL yet", path.name, num_new, len(entries))
        if any(isinstance(entry, CallClosed) for entry in entries):
            keep_refused(path) if refused else path.unlink()
        elif entries:
            orphans[entries[0].call_id] = _orphan(entries)
        else:
            path.unlink()  # created, nothing acknowledged
    if engine.dialect.name == "sqlite":  # one folder, one database: a row without a file is ours too
        for orphan in _open_rows(engine):
            orphans.setdefault(orphan.call_id, orphan)
    return orphans


def _orphan(entries: list[AnyEntry]) -> Orphan:
    orphan = Orphan(entries[0].call_id, entries=entries)
    for entry in entries:
        orphan.next_seq = max(orphan.next_seq, entry.seq + 1)
        orphan.last_at = max(orphan.last_at, entry.at)
        if isinstance(entry, CallOpened):
            orphan.ani = entry.did if entry.direction == "outbound" else entry.ani  # whom a callback would call
            orphan.sample_rate_hz = entry.sample_rate_hz
        elif isinstance(entry, TurnAppended):
            orphan.next_position = max(orphan.next_position, entry.position + 1)
            orphan.turn_ids.append(entry.turn_id)
    return orphan


def _open_rows(engine: Engine) -> list[Orphan]:
    j, t, c = tables.journal.c, tables.turns.c, tables.calls.c
    with engine.connect() as connection:
        found = []
        for call in connection.execute(sa.select(tables.calls).where(c.state == "open")):
            last: Any = connection.execute(
                sa.select(sa.func.max(j.seq), sa.func.max(j.at)).where(j.call_id == call.call_id)
            ).one()
            turns = connection.execute(sa.select(t.turn_id).where(t.call_id == call.call_id).order_by(t.position))
            turn_ids = [row.turn_id for row in turns]
            found.append(
                Orphan(
                    call.call_id,
                    ani=call.ani,
                    sample_rate_hz=call.sample_rate_hz,
                    next_seq=(last[0] if last[0] is not None else -1) + 1,
                    next_position=len(turn_ids),
                    last_at=last[1] or call.started_at,
                    turn_ids=turn_ids,
                )
            )
        return found
