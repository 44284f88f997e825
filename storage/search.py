"""Reading: lists of calls, one call with all that belongs to it, text search, and the tail of the journal.

Needs no writer's lock, so the web process and the command line read beside a running agent. Answers are plain dicts
with timezone-aware times; the recording's place on disk is in none of them.
"""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from storage import tables
from storage.config import StorageConfig
from storage.database import create_tables, open_database
from storage.entries import UnknownCall, check_id
from storage.recordings import RecordingReader, Segment
from storage.tables import row_as_dict

MAX_ROWS = 500
LINE_EVENT = "line"  # a call's line, in its journal: see CallStore.note_line


class CallReader:
    """All reading goes through here. Thread-safe; each method is one short transaction."""

    def __init__(self, engine: Engine, recording_folder: Path) -> None:
        self.engine = engine
        self._recording_folder = recording_folder

    @classmethod
    def open(cls, config: StorageConfig) -> CallReader:
        engine = open_database(config)
        create_tables(engine)
        return cls(engine, config.recording_folder)

    def close(self) -> None:
        self.engine.dispose()

    def list_calls(
        self,
        *,
        limit: int = 50,
        before: dt.datetime | None = None,
        campaign: str = "",
        disposition: str = "",
        text: str = "",
        is_open: bool | None = None,
    ) -> list[dict[str, Any]]:
        """Newest first, each with num_turns.

        `text` finds calls in whose turns or numbers it occurs; `before` pages on.
        """
        c = tables.calls.c
        num_turns = sa.select(sa.func.count()).where(tables.turns.c.call_id == c.call_id).scalar_subquery()
        query = sa.select(tables.calls, num_turns.label("num_turns")).order_by(c.started_at.desc(), c.call_id)
        if before is not None:
            query = query.where(c.started_at < before)
        if campaign:
            query = query.where(c.campaign == campaign)
        if disposition:
            query = query.where(c.disposition == disposition)
        if is_open is not None:
            query = query.where(c.state == ("open" if is_open else "closed"))
        if text:
            query = query.where(_contains(text))
        return self._rows(query.limit(max(1, min(limit, MAX_ROWS))))

    def get_call(self, call_id: str) -> dict[str, Any]:
        """The call with `line` (None: placed by us, or older than that), `turns`, `metrics`, `tool_calls`,
        `callback_requests`, `defects`, `handoffs` and `recording` (or None)."""
        rows = self._rows(sa.select(tables.calls).where(tables.calls.c.call_id == call_id))
        if not rows:
            raise UnknownCall(call_id)
        call = rows[0]
        call["line"] = self._line_of(call_id)
        call["turns"] = self.get_transcript(call_id)
        call["metrics"] = self._of_call(tables.turn_metrics, call_id, "at")
        call["tool_calls"] = self._of_call(tables.tool_calls, call_id, "requested_at")
        call["callback_requests"] = self._of_call(tables.callback_requests, call_id, "seq")
        call["defects"] = self._of_call(tables.defects, call_id, "seq")
        call["handoffs"] = self._of_call(tables.handoffs, call_id, "begun_at")
        reader = self.open_recording(call_id)
        call["recording"] = None
        if reader is not None:
            call["recording"] = {"num_samples": reader.num_samples, "sample_rate_hz": reader.sample_rate_hz}
        return call

    def get_transcript(self, call_id: str) -> list[dict[str, Any]]:
        """Turns in order, each with its metrics by name."""
        turns = self._of_call(tables.turns, call_id, "position")
        metrics: dict[str, dict[str, float]] = {}
        for metric in self._of_call(tables.turn_metrics, call_id, "at"):
            metrics.setdefault(metric["turn_id"], {})[metric["name"]] = metric["value"]
        for turn in turns:
            turn["metrics"] = metrics.get(turn["turn_id"], {})
        return turns

    def _line_of(self, call_id: str) -> dict[str, Any] | None:
        j = tables.journal.c
        wanted = sa.and_(j.call_id == call_id, j.kind == LINE_EVENT)
        rows = self._rows(sa.select(tables.journal).where(wanted).order_by(j.seq).limit(1))
        return dict(rows[0]["payload"]) if rows else None

    def get_events(self, call_id: str, *, after_seq: int = -1, limit: int = 2_000) -> list[dict[str, Any]]:
        """The journal of one call, in order."""
        j = tables.journal.c
        query = sa.select(tables.journal).where(j.call_id == call_id, j.seq > after_seq).order_by(j.seq)
        return self._rows(query.limit(limit))

    def get_recording_pauses(self, call_id: str) -> list[tuple[str, int]]:
        """("recording_paused" | "recording_went_on", leg sample) in order."""
        j = tables.journal.c
        wanted = sa.and_(j.call_id == call_id, j.kind.in_(("recording_paused", "recording_went_on")))
        rows = self._rows(sa.select(tables.journal).where(wanted).order_by(j.seq))
        return [(row["kind"], int(row["payload"]["sample"])) for row in rows]

    def tail_journal(self, *, after_id: int, call_id: str = "", limit: int = 500) -> list[dict[str, Any]]:
        """Journal rows with an id above `after_id`, of one call or of all: what the live page polls."""
        query = sa.select(tables.journal).where(tables.journal.c.id > after_id).order_by(tables.journal.c.id)
        if call_id:
            query = query.where(tables.journal.c.call_id == call_id)
        return self._rows(query.limit(limit))

    def tail_figures(self, *, after_id: int, limit: int) -> list[dict[str, Any]]:
        """Journal rows with an id above `after_id` that are figures or ends of calls, with the call's campaign."""
        j, c = tables.journal.c, tables.calls.c
        query = (
            sa.select(tables.journal, c.campaign)
            .join(tables.calls, j.call_id == c.call_id)
            .where(j.id > after_id, j.kind.in_(("metric_added", "call_closed")))
            .order_by(j.id)
        )
        return self._rows(query.limit(limit))

    def num_open_by_campaign(self) -> dict[str, int]:
        c = tables.calls.c
        query = sa.select(c.campaign, sa.func.count().label("n")).where(c.state == "open").group_by(c.campaign)
        return {row["campaign"]: int(row["n"]) for row in self._rows(query)}

    def num_open_calls(self) -> int:
        query = sa.select(sa.func.count().label("n")).select_from(tables.calls).where(tables.calls.c.state == "open")
        return int(self._rows(query)[0]["n"])

    def last_journal_id(self) -> int:
        rows = self._rows(sa.select(sa.func.coalesce(sa.func.max(tables.journal.c.id), 0).label("id")))
        return int(rows[0]["id"])

    def get_metric_values(self, name: str, *, call_id: str = "", since: dt.datetime | None = None) -> list[float]:
        """Every value of one metric, for percentiles."""
        m = tables.turn_metrics.c
        query = sa.select(m.value).where(m.name == name).order_by(m.at)
        if call_id:
            query = query.where(m.call_id == call_id)
        if since is not None:
            query = query.where(m.at >= since)
        return [float(row["value"]) for row in self._rows(query)]

    def open_recording(self, call_id: str) -> RecordingReader | None:
        """By id only; None when nothing was recorded."""
        rows = self._of_call(tables.recordings, call_id, "segment")
        if not rows:
            return None
        segments = [Segment(**{key: row[key] for key in Segment.__dataclass_fields__}) for row in rows]
        return RecordingReader(self._recording_folder / check_id(call_id), segments)

    def _of_call(self, table: sa.Table, call_id: str, order: str) -> list[dict[str, Any]]:
        return self._rows(sa.select(table).where(table.c.call_id == call_id).order_by(table.c[order]))

    def _rows(self, query: sa.Select[Any]) -> list[dict[str, Any]]:
        with self.engine.connect() as connection:
            return [row_as_dict(row) for row in connection.execute(query)]


def _contains(text: str) -> sa.ColumnElement[bool]:
    """True for calls that mention `text`; % and _ are ordinary characters here."""
    escaped = text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
    pattern = f"%{escaped}%"
    turn, call = tables.turns.c, tables.calls.c
    in_turns = sa.exists().where(
        turn.call_id == call.call_id,
        sa.or_(turn.heard_text.ilike(pattern, escape="\\"), turn.generated_text.ilike(pattern, escape="\\")),
    )
    columns = (call.call_id, call.did, call.ani, call.display_name)
    return sa.or_(in_turns, *(column.ilike(pattern, escape="\\") for column in columns))
