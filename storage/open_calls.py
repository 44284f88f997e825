"""The calls that are open now, and how an entry becomes acknowledged: numbered, in its journal file, handed to SQL.

The mechanics under storage/calls.py, which says what can be kept. Under one lock; `writer` is None in tests in virtual
time: then an entry is in SQL before `_append` returns. What was said or keyed is masked before it gets here.
"""

from __future__ import annotations

import datetime as dt
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy.engine import Engine

from storage import entries as e
from storage.entries import StorageError, UnknownCall
from storage.journal import CallJournal
from storage.masking import mask_value
from storage.recordings import CallRecorder
from storage.writer import Writer, commit_entries

# Event fields that hold what was said or keyed: masked without asking for a valid check digit.
_HEARD_KEYS = frozenset({"text", "heard_text", "generated_text", "digits", "caption"})
KEY_ROW_PAUSE = dt.timedelta(seconds=4)  # longer ends a row; what is said or answered between keys does not
MAX_KEYS_STORED = 8  # more keys in a row than any order number: a card; the rest of the row is not kept


@dataclass
class OpenCall:
    """What is needed to go on writing a call. Changed under the lock of OpenCalls."""

    journal: CallJournal
    next_seq: int
    next_position: int
    ani: str = ""
    num_keys_in_a_row: int = 0
    last_key_at: dt.datetime | None = None
    refused: set[str] = field(default_factory=set)  # its own id, once the tables refused an entry
    recorder: CallRecorder | None = None
    sample_rate_hz: int = 8_000
    last_at: dt.datetime | None = None
    turn_ids: set[str] = field(default_factory=set)


class OpenCalls:
    """Owned and filled by `CallStore`, which extends it."""

    engine: Engine
    _writer: Writer | None

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: dict[str, OpenCall] = {}

    @property
    def num_open(self) -> int:
        return len(self._calls)

    def flush(self) -> bool:
        """Waits until everything acknowledged is in SQL.

        False when the database does not answer (the journal has it).
        """
        return self._writer.flush() if self._writer else True

    @property
    def num_behind(self) -> int:
        """Acknowledged entries not yet in SQL: 0 most of the time, growing while the database is away."""
        return self._writer.num_behind if self._writer else 0

    @property
    def last_error(self) -> str:
        return self._writer.last_error if self._writer else ""

    def _open(self, call_id: str) -> OpenCall:
        call = self._calls.get(call_id)
        if call is None:
            raise UnknownCall(f"{call_id}: not open")
        return call

    def _append(
        self, kind: Callable[..., Any], call_id: str, now: dt.datetime, *, sync: bool = False, **fields: Any
    ) -> None:
        """Gives the entry its number, writes it to the journal file, hands it to SQL.

        Here an entry becomes acknowledged.
        """
        if now.tzinfo is None:
            raise StorageError(f"naive time {now!r}: the store takes timezone-aware times only")
        with self._lock:
            call = self._open(call_id)
            entry: e.AnyEntry = kind(call_id=call_id, seq=call.next_seq, at=now, **_storable(fields))
            call.journal.append(entry, sync=sync)
            call.next_seq += 1
            call.last_at = now
            if isinstance(entry, e.CallClosed):
                del self._calls[call_id]
                call.journal.close()  # its last entry is on the disk; the database may be away for hours
            if self._writer is not None:
                self._writer.put(entry, call.journal)
                return
        commit_entries(self.engine, [entry], call.refused)
        if isinstance(entry, e.CallClosed):
            call.journal.close(remove=not call.refused, is_refused=bool(call.refused))

    def _masked_event(self, call_id: str, now: dt.datetime, fields: dict[str, Any]) -> dict[str, Any]:
        masked = {key: mask_value(value, is_heard=key in _HEARD_KEYS) for key, value in fields.items()}
        if "digit" in fields:
            with self._lock:
                call = self._open(call_id)
                is_same_row = call.last_key_at is not None and now - call.last_key_at < KEY_ROW_PAUSE
                call.num_keys_in_a_row = call.num_keys_in_a_row + 1 if is_same_row else 1
                call.last_key_at = now
                if call.num_keys_in_a_row > MAX_KEYS_STORED:
                    masked["digit"] = "?"
        return masked


def _storable(value: Any) -> Any:
    """Without NUL, which PostgreSQL keeps in no text (a model may write any byte)."""
    if isinstance(value, str):
        return value.replace("\0", "")
    if isinstance(value, dict):
        return {_storable(key): _storable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_storable(item) for item in value)
    return value
