"""CONTRACT: what can happen to a call's record, one frozen struct per kind.

An entry is written to the call's journal file before it is acknowledged, then projected into the tables, exactly once:
(call_id, seq) is its identity. Text in an entry is already masked. Knows neither files nor SQL. This file imports
nothing of ours.
"""

from __future__ import annotations

import datetime as dt
import re
from typing import Any

import msgspec

SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


class StorageError(Exception):
    """Parent of everything the store raises."""


class UnknownCall(StorageError):
    """No call with this id."""


class JournalUnavailable(StorageError):
    """The journal could not be written: the entry is not acknowledged (disk full, or read-only)."""


class StorageFull(StorageError):
    """Less than the reserve is free: a new call is refused; running ones go on."""


class WriterBusy(StorageError):
    """Another process holds the writer's lock of this folder."""


def check_id(value: str) -> str:
    """Ids become file names: letters, digits, - and _ only, at most 64."""
    if not SAFE_ID.fullmatch(value):
        raise StorageError(f"id {value[:80]!r}: letters, digits, '-' and '_' only, at most 64 characters")
    return value


def _snake(name: str) -> str:
    return re.sub(r"(?<=.)([A-Z])", r"_\1", name).lower()


class Entry(msgspec.Struct, frozen=True, kw_only=True, tag_field="entry", tag=_snake):
    call_id: str
    seq: int  # dense from 0 within the call
    at: dt.datetime  # timezone-aware, the shell's clock

    @property
    def kind(self) -> str:
        """The word shown in the journal table."""
        return str(self.__struct_config__.tag)

    def payload(self) -> dict[str, Any]:
        """The entry's own fields as JSON-able builtins."""
        fields: dict[str, Any] = msgspec.to_builtins(self)
        for key in ("entry", "call_id", "seq", "at"):
            fields.pop(key)
        return fields


class CallOpened(Entry, frozen=True):
    did: str
    ani: str
    display_name: str
    direction: str
    campaign: str
    campaign_version: str
    source_address: str
    sample_rate_hz: int


class CallUpdated(Entry, frozen=True):
    """`fields` are columns of the calls table that are allowed to change (projection.UPDATABLE)."""

    fields: dict[str, Any]


class CallClosed(Entry, frozen=True):
    disposition: str
    cause: str
    ended_by: str
    end_sample: int | None = None


class TurnAppended(Entry, frozen=True):
    turn_id: str
    position: int
    role: str  # caller | agent | system
    fields: dict[str, Any]


class TurnUpdated(Entry, frozen=True):
    turn_id: str
    fields: dict[str, Any]


class MetricAdded(Entry, frozen=True):
    turn_id: str  # "" = of the whole call
    name: str
    value: float
    source: str


class ToolCallRecorded(Entry, frozen=True):
    """Two phases: first `requested`, later done | failed | refused | cancelled under the same tool_call_id."""

    turn_id: str
    tool_call_id: str
    name: str
    arguments: dict[str, str]
    state: str
    result: dict[str, Any] | None = None


class CallbackRequested(Entry, frozen=True):
    number: str
    reason: str


class DefectAdded(Entry, frozen=True):
    kind_of_defect: str
    detail: str
    turn_id: str = ""


class HandoffRecorded(Entry, frozen=True):
    """A person is called to take this call over: first `calling`, with the summary; later how it ended, same id."""

    handoff_id: str
    target: str
    state: str  # calling | answered | accepted | failed | abandoned
    reason: str = ""
    summary: str = ""


class DeliveryChanged(Entry, frozen=True):
    order_number: str
    day: str


class RecordingSegmentAdded(Entry, frozen=True):
    segment: int
    start_sample: int
    num_samples: int
    sample_rate_hz: int
    file_name: str  # inside recordings/<call_id>/
    num_bytes: int


class EventAppended(Entry, frozen=True):
    """Anything else worth keeping: floor changes, duck, keys, errors. Goes into the journal table only."""

    name: str
    fields: dict[str, Any]

    @property
    def kind(self) -> str:
        return self.name

    def payload(self) -> dict[str, Any]:
        plain: dict[str, Any] = msgspec.to_builtins(self.fields)
        return plain


AnyEntry = (
    CallOpened
    | CallUpdated
    | CallClosed
    | TurnAppended
    | TurnUpdated
    | MetricAdded
    | ToolCallRecorded
    | CallbackRequested
    | DefectAdded
    | HandoffRecorded
    | DeliveryChanged
    | RecordingSegmentAdded
    | EventAppended
)
