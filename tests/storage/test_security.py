"""Security events as rows: one for each kind and source an hour, bounded, and none of them a call."""

from __future__ import annotations

import datetime as dt

import pytest

from storage import security
from storage.calls import CallStore
from storage.security import list_security_events, note_security_event


def test_the_same_attempt_is_one_row_that_counts(store: CallStore, now: dt.datetime) -> None:
    for minute in range(5):
        at = now + dt.timedelta(minutes=minute)
        store.note_security("unlisted_source", "192.0.2.7", now=at, count=10, detail="OPTIONS sip:100@x")
    store.note_security("flood", "192.0.2.7", now=now)
    scan, flood = list_security_events(store.engine)
    assert (scan["count"], scan["first_at"], scan["last_at"]) == (50, now, now + dt.timedelta(minutes=4))
    assert (flood["kind"], flood["count"]) == ("flood", 1)
    assert not store.list_calls()


def test_who_comes_back_after_an_hour_gets_a_row_of_its_own(store: CallStore, now: dt.datetime) -> None:
    for hours in (0, 2):
        store.note_security("malformed", "192.0.2.7", now=now + dt.timedelta(hours=hours))
    assert [row["count"] for row in list_security_events(store.engine, kind="malformed")] == [1, 1]
    since = now + dt.timedelta(hours=1)
    assert len(list_security_events(store.engine, since=since)) == 1


def test_oldest_rows_go_first(store: CallStore, now: dt.datetime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(security, "MAX_ROWS", 5)
    for number in range(12):
        note_security_event(store.engine, "unlisted_source", f"192.0.2.{number}", now=now)
    assert {row["source_address"] for row in list_security_events(store.engine)} == {
        f"192.0.2.{number}" for number in range(7, 12)
    }


def test_card_numbers_and_long_claims_are_not_kept_as_they_came(store: CallStore, now: dt.datetime) -> None:
    store.note_security("malformed", "192.0.2.7", now=now, detail="4111111111111111 " + "a" * 1000)
    (row,) = list_security_events(store.engine)
    assert "4111111111111111" not in row["detail"] and len(row["detail"]) <= security.MAX_DETAIL_CHARS
