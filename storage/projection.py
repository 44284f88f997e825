"""Journal entries become table rows, each exactly once.

The journal row is inserted first; when it is already there the entry was applied before and nothing else happens.
Both in one transaction: a retry, a replay after a crash, or two replays at once change nothing. Knows no files and no
threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from storage import tables
from storage.database import fitting, insert_new
from storage.entries import (
    AnyEntry,
    CallbackRequested,
    CallClosed,
    CallOpened,
    CallUpdated,
    DefectAdded,
    DeliveryChanged,
    EventAppended,
    HandoffRecorded,
    MetricAdded,
    RecordingSegmentAdded,
    ToolCallRecorded,
    TurnAppended,
    TurnUpdated,
)

UPDATABLE_CALL = frozenset(
    "answered_at codec checkpoint bridges style language campaign campaign_version recording_policy "
    "notice_end_sample".split()
)
UPDATABLE_TURN = frozenset(
    "generated_text heard_text cut_offset_samples start_sample end_sample confidence was_interrupted source intent "
    "slots".split()
)


def apply(connection: Connection, entry: AnyEntry) -> bool:
    """Projects one entry; false when it had been applied before. The caller owns the transaction."""
    if isinstance(entry, CallOpened):  # the row everything else refers to
        _open_call(connection, entry)
    row = {"call_id": entry.call_id, "seq": entry.seq, "at": entry.at, "kind": entry.kind, "payload": entry.payload()}
    if not insert_new(connection, tables.journal, row):
        return False
    _PROJECTIONS[type(entry)](connection, entry)
    return True


def _nothing_more(_connection: Connection, _entry: Any) -> None:
    """The journal row is all there is."""


def _open_call(connection: Connection, entry: CallOpened) -> None:
    fields = entry.payload()
    insert_new(connection, tables.calls, {"call_id": entry.call_id, "started_at": entry.at, "state": "open", **fields})


def _update_call(connection: Connection, entry: CallUpdated) -> None:
    _set(connection, tables.calls, {"call_id": entry.call_id}, entry.fields)


def _close_call(connection: Connection, entry: CallClosed) -> None:
    fields = {"ended_at": entry.at, "state": "closed", "disposition": entry.disposition, "cause": entry.cause}
    fields |= {"ended_by": entry.ended_by, "end_sample": entry.end_sample}
    connection.execute(
        sa.update(tables.calls)
        .where(tables.calls.c.call_id == entry.call_id, tables.calls.c.state == "open")
        .values(fields)
    )


def _append_turn(connection: Connection, entry: TurnAppended) -> None:
    row = {
        "call_id": entry.call_id,
        "turn_id": entry.turn_id,
        "position": entry.position,
        "role": entry.role,
        "at": entry.at,
    }
    insert_new(connection, tables.turns, row | entry.fields)


def _update_turn(connection: Connection, entry: TurnUpdated) -> None:
    _set(connection, tables.turns, {"call_id": entry.call_id, "turn_id": entry.turn_id}, entry.fields)


def _add_metric(connection: Connection, entry: MetricAdded) -> None:
    key = {"call_id": entry.call_id, "turn_id": entry.turn_id, "name": entry.name}
    fields = {"value": entry.value, "source": entry.source, "at": entry.at}
    if not insert_new(connection, tables.turn_metrics, key | fields):
        _set(connection, tables.turn_metrics, key, fields)


def _record_tool_call(connection: Connection, entry: ToolCallRecorded) -> None:
    key = {"call_id": entry.call_id, "tool_call_id": entry.tool_call_id}
    finished_at = None if entry.state == "requested" else entry.at
    fields = {"state": entry.state, "result": entry.result, "finished_at": finished_at}
    first = {"turn_id": entry.turn_id, "name": entry.name, "arguments": entry.arguments, "requested_at": entry.at}
    if not insert_new(connection, tables.tool_calls, key | first | fields):
        _set(connection, tables.tool_calls, key, fields)


def _request_callback(connection: Connection, entry: CallbackRequested) -> None:
    row = {"call_id": entry.call_id, "seq": entry.seq, "number": entry.number, "reason": entry.reason, "at": entry.at}
    insert_new(connection, tables.callback_requests, row)


def _add_defect(connection: Connection, entry: DefectAdded) -> None:
    row = {"call_id": entry.call_id, "seq": entry.seq, "kind": entry.kind_of_defect, "detail": entry.detail}
    insert_new(connection, tables.defects, row | {"turn_id": entry.turn_id, "at": entry.at})


def _record_handoff(connection: Connection, entry: HandoffRecorded) -> None:
    key = {"call_id": entry.call_id, "handoff_id": entry.handoff_id}
    ended_at = None if entry.state in ("calling", "answered") else entry.at
    fields = {"state": entry.state, "reason": entry.reason, "ended_at": ended_at}
    first = {"target": entry.target, "summary": entry.summary, "begun_at": entry.at}
    if not insert_new(connection, tables.handoffs, key | first | fields):
        _set(connection, tables.handoffs, key, fields)


def _change_delivery(connection: Connection, entry: DeliveryChanged) -> None:
    fields = {"day": entry.day, "changed_by_call_id": entry.call_id}
    _set(connection, tables.orders, {"order_number": entry.order_number}, fields)


def _add_segment(connection: Connection, entry: RecordingSegmentAdded) -> None:
    insert_new(connection, tables.recordings, {"call_id": entry.call_id, **entry.payload()})


def _set(connection: Connection, table: sa.Table, key: dict[str, Any], fields: dict[str, Any]) -> None:
    conditions = [table.c[name] == value for name, value in key.items()]
    connection.execute(sa.update(table).where(*conditions).values(fitting(table, fields)))


_PROJECTIONS: dict[type, Callable[[Connection, Any], None]] = {
    CallOpened: _nothing_more,
    CallUpdated: _update_call,
    CallClosed: _close_call,
    TurnAppended: _append_turn,
    TurnUpdated: _update_turn,
    MetricAdded: _add_metric,
    ToolCallRecorded: _record_tool_call,
    CallbackRequested: _request_callback,
    DefectAdded: _add_defect,
    HandoffRecorded: _record_handoff,
    DeliveryChanged: _change_delivery,
    RecordingSegmentAdded: _add_segment,
    EventAppended: _nothing_more,
}
