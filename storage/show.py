"""What `minmo db` prints, as JSON-able dicts: create, seed, list, show, audit. The command line only formats them.

show.export(config, "csv", CallFilter(...), actor=…, now=…)
show.create(config)            show.seed(config)            show.list_calls(config, limit=20)
show.show_call(config, id)     show.last_call_id(config)    show.verify(config)      show.security(config)
show.answers(config)           show.as_json(value)
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from storage.answers import answer_histogram
from storage.audit import append_audit, verify_audit
from storage.config import StorageConfig
from storage.export import WRITERS, CallFilter
from storage.orders import list_orders, seed_demo_shop
from storage.recordings import RecordingReader
from storage.search import CallReader
from storage.security import list_security_events
from storage.tables import metadata


@contextmanager
def _reading(config: StorageConfig) -> Iterator[CallReader]:
    reader = CallReader.open(config)
    try:
        yield reader
    finally:
        reader.close()


def create(config: StorageConfig) -> dict[str, Any]:
    """Creates what is missing; the password in a database URL is not shown."""
    with _reading(config) as reader:
        return {
            "database": reader.engine.url.render_as_string(hide_password=True),
            "tables": sorted(metadata.tables),
        }


def seed(config: StorageConfig) -> dict[str, Any]:
    with _reading(config) as reader:
        num_new = seed_demo_shop(reader.engine)
        with reader.engine.connect() as connection:
            return {"new_orders": num_new, "orders": len(list_orders(connection))}


def list_calls(config: StorageConfig, *, limit: int = 20, text: str = "", campaign: str = "") -> list[dict[str, Any]]:
    with _reading(config) as reader:
        return [_plain(call) for call in reader.list_calls(limit=limit, text=text, campaign=campaign)]


def last_call_id(config: StorageConfig) -> str:
    """Of the newest call, "" when there is none: `minmo db show` without an id."""
    with _reading(config) as reader:
        calls = reader.list_calls(limit=1)
        return str(calls[0]["call_id"]) if calls else ""


def show_call(config: StorageConfig, call_id: str, *, has_events: bool = False) -> dict[str, Any]:
    """Everything about one call; raises UnknownCall."""
    with _reading(config) as reader:
        call = reader.get_call(call_id)
        if has_events:
            call["events"] = reader.get_events(call_id)
        shown: dict[str, Any] = _plain(call)
        return shown


def open_recording(config: StorageConfig, call_id: str) -> RecordingReader | None:
    """For `minmo db show --wav OUT.wav` and the demo's check of the agent's channel."""
    with _reading(config) as reader:
        return reader.open_recording(call_id)


def export(config: StorageConfig, kind: str, wanted: CallFilter, *, actor: str, now: dt.datetime) -> Iterator[str]:
    """Pieces of text in the format `kind`; who took them away is in the audit before the first one."""
    with _reading(config) as reader:
        append_audit(reader.engine, actor, "export", now=now, format=kind, campaign=wanted.campaign, text=wanted.text)
        yield from WRITERS[kind](reader, wanted)


def verify(config: StorageConfig) -> dict[str, Any]:
    with _reading(config) as reader:
        verdict = verify_audit(reader.engine)
        return {"rows": verdict.num_rows, "last_hash": verdict.last_hash, "broken_at_id": verdict.broken_at_id}


def security(config: StorageConfig, *, limit: int = 100, kind: str = "") -> list[dict[str, Any]]:
    """What strangers and broken peers tried, latest first."""
    with _reading(config) as reader:
        return [_plain(event) for event in list_security_events(reader.engine, limit=limit, kind=kind)]


def answers(config: StorageConfig, *, since: dt.datetime | None = None) -> list[dict[str, Any]]:
    """Who answered the calls that were placed, and how long it took to find out."""
    with _reading(config) as reader:
        return answer_histogram(reader.engine, since=since)


def as_json(value: Any) -> str:
    return json.dumps(_plain(value), ensure_ascii=False, indent=2)


def _plain(value: Any) -> Any:
    if isinstance(value, dt.datetime):
        return value.isoformat()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
