"""The tables, once, for SQLite and PostgreSQL alike.

Calls and what belongs to them are projections of the journal (see projection.py); `journal` itself is append-only.
Times are timezone-aware UTC; positions inside a call are samples of the leg's clock.
"""

from __future__ import annotations

import datetime as dt
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Dialect

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)


class UtcDateTime(sa.TypeDecorator[dt.datetime]):
    """TIMESTAMPTZ on PostgreSQL; naive UTC on SQLite, which knows no zones. Naive values are refused."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: dt.datetime | None, dialect: Dialect) -> dt.datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"naive time {value!r}: storage takes timezone-aware times only")
        utc = value.astimezone(dt.UTC)
        return utc.replace(tzinfo=None) if dialect.name == "sqlite" else utc

    def process_result_value(self, value: dt.datetime | None, dialect: Dialect) -> dt.datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=dt.UTC) if value.tzinfo is None else value.astimezone(dt.UTC)


# SQLite numbers rows by itself only for a column declared exactly INTEGER.
_BigKey = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_Samples = sa.BigInteger


def _of_call(primary_key: bool = False) -> sa.Column[str]:
    return sa.Column(
        "call_id",
        sa.String(64),
        sa.ForeignKey("calls.call_id", ondelete="CASCADE"),
        primary_key=primary_key,
        nullable=False,
        index=not primary_key,
    )


def _text(name: str, default: str = "", length: int | None = None) -> sa.Column[str]:
    kind = sa.String(length) if length else sa.Text()
    return sa.Column(name, kind, nullable=False, server_default=sa.text(f"'{default}'"))


calls = sa.Table(
    "calls",
    metadata,
    sa.Column("call_id", sa.String(64), primary_key=True),
    _text("did"),
    _text("ani"),
    _text("display_name"),
    _text("direction", "inbound", 16),
    _text("source_address"),
    _text("campaign"),
    _text("campaign_version", length=64),
    sa.Column("started_at", UtcDateTime, nullable=False, index=True),
    sa.Column("answered_at", UtcDateTime),
    sa.Column("ended_at", UtcDateTime, index=True),
    _text("state", "open", 16),  # open | closed
    _text("disposition", length=32),
    _text("cause"),
    _text("ended_by", length=16),
    sa.Column("end_sample", _Samples),
    sa.Column("sample_rate_hz", sa.Integer, nullable=False, server_default=sa.text("8000")),
    _text("codec", length=32),
    _text("checkpoint"),
    sa.Column("bridges", sa.JSON),  # ["in", ...]
    sa.Column("style", sa.JSON),  # the policy's decision, reasons included
    _text("language", length=16),
    _text("recording_policy", "off", 16),
    sa.Column("notice_end_sample", _Samples),
    sa.Index("ix_calls_campaign_started_at", "campaign", "started_at"),
)

turns = sa.Table(
    "turns",
    metadata,
    _of_call(primary_key=True),
    sa.Column("turn_id", sa.String(64), primary_key=True),
    sa.Column("position", sa.Integer, nullable=False),
    sa.Column("role", sa.String(16), nullable=False),  # caller | agent | system
    sa.Column("generated_text", sa.Text),  # agent: all that was made
    sa.Column("heard_text", sa.Text),  # agent: what the caller heard; caller: what we heard
    sa.Column("cut_offset_samples", _Samples),  # samples of this turn that were played when it was cut
    sa.Column("start_sample", _Samples),
    sa.Column("end_sample", _Samples),
    sa.Column("confidence", sa.Float),
    sa.Column("was_interrupted", sa.Boolean, nullable=False, server_default=sa.false()),
    _text("source", "voice", 16),  # voice | keypad | prompt
    _text("intent", length=64),
    sa.Column("slots", sa.JSON),
    sa.Column("at", UtcDateTime, nullable=False),
    sa.UniqueConstraint("call_id", "position"),
)

journal = sa.Table(
    "journal",
    metadata,
    sa.Column("id", _BigKey, primary_key=True, autoincrement=True),
    _of_call(),
    sa.Column("seq", sa.Integer, nullable=False),
    sa.Column("at", UtcDateTime, nullable=False),
    sa.Column("kind", sa.String(64), nullable=False),
    sa.Column("payload", sa.JSON, nullable=False),
    sa.UniqueConstraint("call_id", "seq"),
    sqlite_autoincrement=True,  # ids never come back, so a tail by id misses nothing
)

turn_metrics = sa.Table(
    "turn_metrics",
    metadata,
    _of_call(primary_key=True),
    sa.Column("turn_id", sa.String(64), primary_key=True),  # "" = of the whole call
    sa.Column("name", sa.String(64), primary_key=True),  # voice_to_voice_ms, first_word_ms, duck_ms, stop_ms, ...
    sa.Column("value", sa.Float, nullable=False),
    _text("source", "wire", 16),
    sa.Column("at", UtcDateTime, nullable=False),
    sa.Index("ix_turn_metrics_name_at", "name", "at"),
)

tool_calls = sa.Table(
    "tool_calls",
    metadata,
    _of_call(primary_key=True),
    sa.Column("tool_call_id", sa.String(64), primary_key=True),
    sa.Column("turn_id", sa.String(64), nullable=False),
    sa.Column("name", sa.String(64), nullable=False),
    sa.Column("arguments", sa.JSON, nullable=False),
    sa.Column("state", sa.String(16), nullable=False),  # requested | done | failed | refused | cancelled
    sa.Column("result", sa.JSON),
    sa.Column("requested_at", UtcDateTime, nullable=False),
    sa.Column("finished_at", UtcDateTime),
)

callback_requests = sa.Table(
    "callback_requests",
    metadata,
    _of_call(primary_key=True),
    sa.Column("seq", sa.Integer, primary_key=True),
    _text("number"),
    _text("reason"),
    sa.Column("at", UtcDateTime, nullable=False),
    sa.Column("done_at", UtcDateTime),
)

defects = sa.Table(
    "defects",
    metadata,
    _of_call(primary_key=True),
    sa.Column("seq", sa.Integer, primary_key=True),
    sa.Column("kind", sa.String(64), nullable=False, index=True),
    _text("detail"),
    _text("turn_id", length=64),
    sa.Column("at", UtcDateTime, nullable=False),
)

recordings = sa.Table(
    "recordings",
    metadata,
    _of_call(primary_key=True),
    sa.Column("segment", sa.Integer, primary_key=True),
    sa.Column("start_sample", _Samples, nullable=False),
    sa.Column("num_samples", sa.Integer, nullable=False),
    sa.Column("sample_rate_hz", sa.Integer, nullable=False),
    sa.Column("file_name", sa.String(64), nullable=False),
    sa.Column("num_bytes", sa.Integer, nullable=False),
)

orders = sa.Table(
    "orders",
    metadata,
    sa.Column("order_number", sa.String(16), primary_key=True),
    sa.Column("status", sa.String(32), nullable=False),  # orders.STATUSES
    sa.Column("day", sa.String(16), nullable=False),  # weekday the caller is told
    sa.Column("changed_by_call_id", sa.String(64)),
)

opening_hours = sa.Table(
    "opening_hours",
    metadata,
    sa.Column("campaign", sa.String(64), primary_key=True),  # "" = every campaign without its own
    sa.Column("weekday", sa.Integer, primary_key=True),  # 0 = monday (ISO 8601 less one)
    sa.Column("opens", sa.String(5)),  # "09:00", empty on a closed day
    sa.Column("closes", sa.String(5)),
)

campaign_versions = sa.Table(
    "campaign_versions",
    metadata,
    sa.Column("campaign", sa.String(64), primary_key=True),
    sa.Column("version", sa.String(64), primary_key=True),  # SHA-256 of the content
    sa.Column("content", sa.Text, nullable=False),
    sa.Column("first_used_at", UtcDateTime, nullable=False),
)

security_events = sa.Table(
    "security_events",
    metadata,
    sa.Column("id", _BigKey, primary_key=True, autoincrement=True),
    sa.Column("kind", sa.String(32), nullable=False),  # kinds of telephony/wire.SecurityEvent
    _text("source_address", length=128),
    sa.Column("first_at", UtcDateTime, nullable=False),
    sa.Column("last_at", UtcDateTime, nullable=False, index=True),
    sa.Column("count", sa.BigInteger, nullable=False),
    _text("detail"),
    sa.Index("ix_security_events_kind_source", "kind", "source_address"),
    sqlite_autoincrement=True,
)

spent_call_tokens = sa.Table(
    "spent_call_tokens",
    metadata,
    sa.Column("nonce_sha256", sa.String(64), primary_key=True),
    sa.Column("expires_at", UtcDateTime, nullable=False, index=True),
)

handoffs = sa.Table(
    "handoffs",
    metadata,
    _of_call(primary_key=True),
    sa.Column("handoff_id", sa.String(64), primary_key=True),
    _text("target"),
    sa.Column("state", sa.String(16), nullable=False),  # calling | answered | accepted | failed | abandoned
    _text("reason"),
    _text("summary"),  # what the person was told: from the transcript and the tools' results, nothing else
    sa.Column("begun_at", UtcDateTime, nullable=False),
    sa.Column("ended_at", UtcDateTime),
)

audit = sa.Table(
    "audit",
    metadata,
    sa.Column("id", _BigKey, primary_key=True, autoincrement=True),
    sa.Column("at", UtcDateTime, nullable=False),
    sa.Column("actor", sa.String(64), nullable=False),
    sa.Column("action", sa.String(64), nullable=False),
    sa.Column("object_id", sa.String(64), nullable=False),
    sa.Column("detail", sa.JSON, nullable=False),
    sa.Column("previous_hash", sa.String(64), nullable=False, unique=True),  # unique: the chain cannot fork
    sa.Column("hash", sa.String(64), nullable=False, unique=True),
    sqlite_autoincrement=True,
)


def row_as_dict(row: sa.Row[Any]) -> dict[str, Any]:
    return dict(row._mapping)
