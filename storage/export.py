"""Calls as files for other programs: CSV for a spreadsheet, one call a row; JSON with turns, tools and metrics.

    for piece in as_csv(reader, CallFilter(campaign="acme")): ...     # also as_json; any number of calls

Reads newest first, a page at a time, so memory does not grow with the number of calls. Texts in CSV that a spreadsheet
would take for a formula get an apostrophe before them (OWASP, CSV injection): a display name is an attacker's text.
"""

from __future__ import annotations

import csv
import datetime as dt
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from storage.search import CallReader

COLUMNS = (
    "call_id", "started_at", "answered_at", "ended_at", "seconds", "direction", "ani", "display_name", "did",
    "campaign", "state", "disposition", "cause", "ended_by", "language", "codec", "checkpoint", "num_turns",
    "voice_to_voice_ms_p50", "transcript",
)  # fmt: skip
_PAGE = 200
_PLAIN_NUMBER = re.compile(r"[+-]?[0-9][0-9 .-]*")


@dataclass(frozen=True, kw_only=True)
class CallFilter:
    """Which calls; empty = all. `since` and `until` are about the start of the call."""

    text: str = ""
    campaign: str = ""
    disposition: str = ""
    is_open: bool | None = None
    since: dt.datetime | None = None
    until: dt.datetime | None = None


def calls(reader: CallReader, wanted: CallFilter) -> Iterator[dict[str, Any]]:
    """Every call in full, newest first."""
    before = wanted.until
    while True:
        page = reader.list_calls(
            limit=_PAGE, before=before, is_open=wanted.is_open, text=wanted.text, campaign=wanted.campaign,
            disposition=wanted.disposition,
        )  # fmt: skip
        for summary in page:
            if wanted.since is not None and summary["started_at"] < wanted.since:
                return
            yield reader.get_call(summary["call_id"])
        if len(page) < _PAGE:
            return
        before = page[-1]["started_at"]


def as_json(reader: CallReader, wanted: CallFilter) -> Iterator[str]:
    """One JSON array."""
    yield "["
    for index, call in enumerate(calls(reader, wanted)):
        call.pop("recording_segments", None)
        yield (",\n" if index else "\n") + json.dumps(call, default=_plain, ensure_ascii=False)
    yield "\n]\n"


def as_csv(reader: CallReader, wanted: CallFilter) -> Iterator[str]:
    """Header and one line a call (RFC 4180)."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(COLUMNS)
    for call in calls(reader, wanted):
        yield _taken(out)
        writer.writerow([_cell(value) for value in _row(call)])
    yield _taken(out)


WRITERS: dict[str, Callable[[CallReader, CallFilter], Iterator[str]]] = {"csv": as_csv, "json": as_json}


def _row(call: dict[str, Any]) -> list[Any]:
    latencies = sorted(m["value"] for m in call["metrics"] if m["name"] == "voice_to_voice_ms")
    ended = call["ended_at"] or call["started_at"]
    lines = [f"{turn['role']}: {turn['heard_text'] or ''}" for turn in call["turns"]]
    computed = {
        "seconds": round((ended - call["started_at"]).total_seconds(), 1),
        "num_turns": len(call["turns"]),
        "voice_to_voice_ms_p50": round(latencies[(len(latencies) - 1) // 2]) if latencies else "",
        "transcript": "\n".join(lines),
    }
    return [computed.get(name, call.get(name)) for name in COLUMNS]


def _cell(value: Any) -> str:
    text = "" if value is None else value.isoformat() if isinstance(value, dt.datetime) else str(value)
    is_formula = text[:1] in ("=", "+", "-", "@", "\t", "\r") and not _PLAIN_NUMBER.fullmatch(text)
    return f"'{text}" if is_formula else text


def _taken(out: io.StringIO) -> str:
    text = out.getvalue()
    out.seek(0)
    out.truncate()
    return text


def _plain(value: Any) -> Any:
    return value.isoformat() if isinstance(value, dt.datetime) else str(value)
