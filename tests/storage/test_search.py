from __future__ import annotations

import datetime as dt

import pytest
import sqlalchemy as sa

from storage import show
from storage.audit import append_audit, verify_audit
from storage.calls import CallStore
from storage.campaigns import get_campaign_version, keep_campaign_version
from storage.config import StorageConfig
from storage.entries import UnknownCall
from storage.tables import audit


@pytest.fixture
def filled(store: CallStore, now: dt.datetime) -> CallStore:
    for index in range(5):
        call_id, at = f"c{index}", now + dt.timedelta(minutes=index)
        campaign = "acme" if index % 2 else "harbor"
        store.open_call(call_id, did="100", ani=f"20{index}", display_name="50%_off", campaign=campaign, now=at)
        store.append_turn(call_id, "t1", role="caller", heard_text=f"Where is order number {index}", now=at)
        store.add_metric(call_id, "t1", "voice_to_voice_ms", 100 * index, now=at)
        if index < 4:
            store.close_call(call_id, disposition="completed", cause="normal", now=at)
    store.flush()
    return store


def ids(calls: list[dict[str, object]]) -> list[object]:
    return [call["call_id"] for call in calls]


def test_newest_first_and_paging_by_time(filled: CallStore, now: dt.datetime) -> None:
    assert ids(filled.list_calls(limit=2)) == ["c4", "c3"]
    assert ids(filled.list_calls(limit=2, before=now + dt.timedelta(minutes=3))) == ["c2", "c1"]
    assert filled.list_calls()[0]["num_turns"] == 1


def test_filters_and_text_search(filled: CallStore) -> None:
    assert ids(filled.list_calls(campaign="acme")) == ["c3", "c1"]
    assert ids(filled.list_calls(is_open=True)) == ["c4"]
    assert ids(filled.list_calls(disposition="completed", limit=1)) == ["c3"]
    assert ids(filled.list_calls(text="where is ORDER number 2")) == ["c2"]
    assert ids(filled.list_calls(text="203")) == ["c3"]


def test_wildcards_are_ordinary_characters(filled: CallStore) -> None:
    assert len(filled.list_calls(text="50%_o")) == 5
    assert filled.list_calls(text="%order_") == []
    assert filled.list_calls(text="'; drop table calls; --") == []
    assert len(filled.list_calls()) == 5


def test_tail_gives_every_row_once(filled: CallStore, now: dt.datetime) -> None:
    last = filled.reader.last_journal_id()
    filled.journal_append("c4", "duck", now=now)
    filled.flush()
    rows = filled.reader.tail_journal(after_id=last)
    assert [(row["call_id"], row["kind"]) for row in rows] == [("c4", "duck")]
    assert filled.reader.tail_journal(after_id=rows[-1]["id"]) == []
    assert filled.reader.tail_journal(after_id=last, call_id="c1") == []


def test_metric_values_for_percentiles(filled: CallStore, now: dt.datetime) -> None:
    assert filled.reader.get_metric_values("voice_to_voice_ms") == [0, 100, 200, 300, 400]
    assert filled.reader.get_metric_values("voice_to_voice_ms", since=now + dt.timedelta(minutes=3)) == [300, 400]


def test_command_line_answers_are_json(filled: CallStore, config: StorageConfig) -> None:
    assert show.last_call_id(config) == "c4"
    shown = show.show_call(config, "c4", has_events=True)
    assert shown["started_at"].startswith("2026-11-22T16:04:00") and len(shown["events"]) == 3
    assert '"call_id": "c4"' in show.as_json(shown)
    assert [call["call_id"] for call in show.list_calls(config, limit=1)] == ["c4"]
    assert "calls" in show.create(config)["tables"]
    assert show.seed(config)["new_orders"] == 400
    with pytest.raises(UnknownCall):
        show.show_call(config, "nobody")


def test_password_of_the_database_is_not_shown() -> None:
    url = sa.make_url("postgresql+psycopg://minmo:secret@localhost/minmo")
    assert "secret" not in url.render_as_string(hide_password=True)


def test_audit_chain_notices_every_change(filled: CallStore, now: dt.datetime) -> None:
    for index in range(6):
        append_audit(filled.engine, "supervisor", "listen", now=now, object_id=f"c{index}", source="127.0.0.1")
    assert (verify_audit(filled.engine).num_rows, verify_audit(filled.engine).broken_at_id) == (6, None)
    for change in (
        sa.update(audit).where(audit.c.id == 3).values(object_id="c9"),
        sa.delete(audit).where(audit.c.id == 2),
    ):
        with filled.engine.connect() as connection:
            connection.execute(change)
            connection.commit()
        assert verify_audit(filled.engine).broken_at_id == 3


def test_campaign_content_is_kept_once_per_version(filled: CallStore, now: dt.datetime) -> None:
    first = keep_campaign_version(filled.engine, "acme", "a = 1", now=now)
    assert keep_campaign_version(filled.engine, "acme", "a = 1", now=now) == first
    second = keep_campaign_version(filled.engine, "acme", "a = 2", now=now)
    assert get_campaign_version(filled.engine, "acme", first) == "a = 1"
    assert get_campaign_version(filled.engine, "acme", second) == "a = 2"
    assert get_campaign_version(filled.engine, "acme", "x") is None
