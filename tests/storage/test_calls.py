from __future__ import annotations

import datetime as dt
import os
from pathlib import Path

import pytest
import sqlalchemy as sa

from storage import projection, tables
from storage.calls import CallStore
from storage.config import StorageConfig, StorageConfigError
from storage.entries import StorageError, StorageFull, TurnAppended, UnknownCall, WriterBusy
from storage.journal import unpack
from storage.masking import MASK
from storage.replay import take_writer_lock


def spoken_card() -> str:
    return "my card is " + " ".join(["four"] + ["one"] * 15)


def test_whole_call_can_be_read_back(store: CallStore, now: dt.datetime) -> None:
    store.open_call("c1", did="100", ani="+4930123", display_name="Mia", campaign="acme", now=now)
    store.answer_call("c1", now=now, codec="PCMU/8000")
    style = {"language": "en", "reasons": ["campaign's first language"]}
    store.update_call("c1", now=now, bridges=["in"], checkpoint="nano", style=style)
    store.append_turn("c1", "t1", role="caller", heard_text="where is my order", confidence=0.9, now=now)
    store.record_tool_call(
        "c1", "x1", turn_id="t2", name="look_up_order", arguments={"order_number": "45612"}, state="requested", now=now
    )
    store.record_tool_call(
        "c1", "x1", turn_id="t2", name="look_up_order", arguments={}, state="done", result={"day": "monday"}, now=now
    )
    store.append_turn("c1", "t2", role="agent", generated_text="it was shipped on monday", now=now)
    store.update_turn("c1", "t2", heard_text="it was", cut_offset_samples=8_123, was_interrupted=True, now=now)
    store.add_metric("c1", "t2", "voice_to_voice_ms", 640, now=now)
    store.add_metric("c1", "t2", "voice_to_voice_ms", 650, now=now)
    store.request_callback("c1", reason="wants a person", now=now)
    store.add_defect("c1", "watchdog_filler", "silent for 1.5 s", now=now)
    later = now + dt.timedelta(seconds=30)
    store.close_call("c1", disposition="completed", cause="normal", ended_by="caller", end_sample=240_000, now=later)

    call = store.get_call("c1")
    assert (call["state"], call["disposition"], call["codec"], call["answered_at"]) == (
        "closed",
        "completed",
        "PCMU/8000",
        now,
    )
    assert call["ended_at"] == later and call["style"] == style and call["bridges"] == ["in"]
    caller, agent = call["turns"]
    assert (caller["heard_text"], caller["confidence"], caller["position"]) == ("where is my order", 0.9, 0)
    assert (agent["generated_text"], agent["heard_text"]) == ("it was shipped on monday", "it was")
    assert agent["was_interrupted"] and agent["cut_offset_samples"] == 8_123
    assert agent["metrics"] == {"voice_to_voice_ms": 650.0}
    (tool,) = call["tool_calls"]
    assert tool["arguments"] == {"order_number": "45612"}
    assert (tool["state"], tool["result"], tool["finished_at"]) == ("done", {"day": "monday"}, now)
    assert call["callback_requests"][0]["number"] == "+4930123"
    assert call["defects"][0]["kind"] == "watchdog_filler"
    assert call["recording"] is None


def test_journal_holds_every_step_in_order(store: CallStore, now: dt.datetime) -> None:
    store.open_call("c1", did="100", ani="", now=now)
    store.journal_append("c1", "duck", now=now, sample=1_600)
    store.close_call("c1", disposition="completed", cause="normal", now=now)
    store.flush()
    events = store.reader.get_events("c1")
    assert [(event["seq"], event["kind"]) for event in events] == [(0, "call_opened"), (1, "duck"), (2, "call_closed")]
    assert events[1]["payload"] == {"sample": 1_600}


def test_no_card_number_reaches_any_file(config: StorageConfig, now: dt.datetime) -> None:
    store = CallStore(config)
    secret = "4111111111111111"
    store.open_call("c1", did="100", ani="200", display_name=secret, now=now)
    store.append_turn(
        "c1", "t1", role="caller", heard_text=f"{spoken_card()} or {secret}", slots={"n": secret}, now=now
    )
    store.append_turn("c1", "t2", role="agent", generated_text=secret, now=now)
    store.update_turn("c1", "t2", heard_text="4111 1111 1111 1112", now=now)
    store.journal_append("c1", "caption", now=now, text=secret, other=[secret])
    store.record_tool_call(
        "c1", "x", turn_id="t2", name="n", arguments={"a": secret}, state="done", result={"b": secret}, now=now
    )
    store.request_callback("c1", reason=secret, number=secret, now=now)
    store.add_defect("c1", "k", secret, now=now)
    for place, digit in enumerate(secret):  # answers and turns in between do not end the row
        if place in (5, 10):
            store.append_turn("c1", f"k{place}", role="caller", source="keypad", heard_text="my order", now=now)
        store.journal_append("c1", "dtmf", now=now + dt.timedelta(seconds=0.4 * place), digit=digit)
    assert store.get_call("c1")["turns"][0]["heard_text"] == f"my card is {MASK} or {MASK}"
    digits = [e["payload"]["digit"] for e in store.reader.get_events("c1") if e["kind"] == "dtmf"]
    assert "".join(digits) == "41111111????????"
    store.close()
    for path in config.folder.rglob("*"):
        if path.is_file():
            raw = path.read_bytes()
            assert secret.encode() not in raw and b"one one one one one" not in raw, path


def test_presented_number_as_long_as_a_card_is_kept_for_the_callback(store: CallStore, now: dt.datetime) -> None:
    store.open_call("c1", did="100", ani="4222222222222", now=now)
    store.request_callback("c1", now=now)
    assert store.get_call("c1")["callback_requests"][0]["number"] == "4222222222222"


def test_killed_agents_calls_are_found_closed_with_cause_at_their_last_entry(
    config: StorageConfig, now: dt.datetime
) -> None:
    dead = CallStore(config)
    dead.open_call("c1", did="100", ani="", now=now)
    dead.append_turn("c1", "t1", role="caller", heard_text="hello", now=now + dt.timedelta(seconds=9))
    dead.close()  # without close_call: as a death leaves it
    store = CallStore(config)
    assert [orphan.call_id for orphan in store.orphans()] == ["c1"]
    assert store.close_orphans() == ["c1"]
    call = store.get_call("c1")
    assert (call["state"], call["disposition"], call["cause"]) == ("closed", "failed", "agent_lost")
    assert call["ended_at"] == now + dt.timedelta(seconds=9)
    assert not list(config.journal_folder.glob("*.journal"))
    store.close()


def test_restarted_agent_goes_on_with_a_call_the_worker_still_holds(config: StorageConfig, now: dt.datetime) -> None:
    dead = CallStore(config)
    dead.open_call("c1", did="100", ani="7", now=now)
    dead.append_turn("c1", "t1", role="caller", heard_text="hello", now=now)
    dead.close()
    store = CallStore(config)
    assert store.close_orphans(keep={"c1"}) == []
    (orphan,) = store.orphans()
    assert [entry.kind for entry in orphan.entries] == ["call_opened", "turn_appended"]
    store.adopt_call("c1")
    with pytest.raises(StorageError):
        store.append_turn("c1", "t1", role="caller", now=now)
    store.append_turn("c1", "t2", role="agent", generated_text="i am back", now=now)
    store.close_call("c1", disposition="completed", cause="normal", now=now)
    assert [turn["position"] for turn in store.get_transcript("c1")] == [0, 1]
    assert [event["seq"] for event in store.reader.get_events("c1")] == [0, 1, 2, 3]
    store.close()


def test_journal_written_while_sql_was_lost_is_replayed(config: StorageConfig, now: dt.datetime) -> None:
    store = CallStore(config)
    store.open_call("c1", did="100", ani="", now=now)
    store.append_turn("c1", "t1", role="caller", heard_text="hello", now=now)
    store.close()
    for path in config.folder.glob("minmo.sqlite3*"):
        path.unlink()
    store = CallStore(config)
    assert store.get_transcript("c1")[0]["heard_text"] == "hello"
    store.close()


def test_replaying_twice_changes_nothing(config: StorageConfig, now: dt.datetime) -> None:
    for _ in range(3):
        store = CallStore(config)
        if not store.orphans():
            store.open_call("c1", did="100", ani="", now=now)
            store.append_turn("c1", "t1", role="caller", heard_text="hello", now=now)
        store.close()
    store = CallStore(config)
    with store.engine.connect() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(tables.journal)).scalar() == 2
        assert connection.execute(sa.select(sa.func.count()).select_from(tables.turns)).scalar() == 1
    store.close()


def test_database_that_is_away_delays_nothing_and_loses_nothing(
    store: CallStore, now: dt.datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    from storage import projection, writer

    monkeypatch.setattr(writer, "RETRY_S", 0.01)
    real_apply = projection.apply

    def away(*_args: object) -> bool:
        raise sa.exc.OperationalError("insert", {}, Exception("disk full"))

    monkeypatch.setattr(projection, "apply", away)
    store.open_call("c1", did="100", ani="", now=now)
    for index in range(50):
        store.append_turn("c1", f"t{index}", role="caller", heard_text=str(index), now=now)
    assert store.num_behind > 0
    while not store.last_error:
        pass
    monkeypatch.setattr(projection, "apply", real_apply)
    assert [turn["heard_text"] for turn in store.get_transcript("c1")] == [str(index) for index in range(50)]
    assert store.num_behind == 0 and store.last_error == ""


def test_queue_that_overflows_is_read_back_from_the_files(
    store: CallStore, now: dt.datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    from storage import writer

    monkeypatch.setattr(writer, "MAX_QUEUED", 5)
    store.open_call("c1", did="100", ani="", now=now)
    for index in range(200):
        store.journal_append("c1", "x", now=now, index=index)
    store.flush()
    store.journal_append("c1", "last", now=now)
    store.flush()
    assert len(store.reader.get_events("c1")) == 202


def test_entry_the_tables_refuse_does_not_hold_up_the_others(store: CallStore, now: dt.datetime) -> None:
    store.open_call("c1", did="100", ani="", now=now)
    store.update_call("c1", now=now, answered_at="not a time")
    store.append_turn("c1", "t1", role="caller", heard_text="hello", now=now)
    assert [turn["heard_text"] for turn in store.get_transcript("c1")] == ["hello"]


def test_second_writer_of_a_folder_is_refused(store: CallStore, config: StorageConfig) -> None:
    with pytest.raises(WriterBusy, match=r"storage\.folder"):
        take_writer_lock(config.journal_folder, wait_s=0.0)


def test_call_is_refused_below_the_disk_reserve(tmp_path: Path, now: dt.datetime) -> None:
    store = CallStore(StorageConfig(folder=tmp_path, journal_reserve_mib=1_000_000, is_synced=False))
    with pytest.raises(StorageFull, match="journal_reserve_mib"):
        store.open_call("c1", did="100", ani="", now=now)
    store.close()


def test_misuse_is_named(store: CallStore, now: dt.datetime) -> None:
    with pytest.raises(UnknownCall):
        store.append_turn("nobody", "t1", role="caller", now=now)
    with pytest.raises(UnknownCall):
        store.get_call("nobody")
    with pytest.raises(StorageError):
        store.open_call("../etc", did="1", ani="", now=now)
    store.open_call("c1", did="100", ani="", now=now)
    with pytest.raises(StorageError, match="open already"):
        store.open_call("c1", did="100", ani="", now=now)
    with pytest.raises(StorageError, match="colour"):
        store.update_call("c1", now=now, colour="red")
    with pytest.raises(StorageError, match="naive"):
        store.update_call("c1", now=now.replace(tzinfo=None), codec="x")
    store.close_call("c1", disposition="completed", cause="normal", now=now)
    store.close_call("c1", disposition="failed", cause="twice", now=now)
    assert store.get_call("c1")["disposition"] == "completed"


def test_without_a_thread_everything_is_in_sql_when_a_method_returns(config: StorageConfig, now: dt.datetime) -> None:
    store = CallStore(config, is_background=False)
    store.open_call("c1", did="100", ani="", now=now)
    store.append_turn("c1", "t1", role="caller", heard_text="hello", now=now)
    assert store.reader.get_transcript("c1")[0]["heard_text"] == "hello"
    store.close_call("c1", disposition="completed", cause="normal", now=now)
    assert store.reader.get_call("c1")["state"] == "closed"
    store.close()


def test_files_are_for_their_owner_only(store: CallStore, config: StorageConfig, now: dt.datetime) -> None:
    store.open_call("c1", did="100", ani="", now=now)
    assert config.folder.stat().st_mode & 0o077 == 0
    for path in (config.folder / "minmo.sqlite3", config.journal_folder / "c1.journal"):
        assert os.stat(path).st_mode & 0o077 == 0, path


@pytest.mark.parametrize(
    ("key", "value"), [("recording_policy", "sometimes"), ("group_commit_ms", 500), ("recording_segment_s", 0.0)]
)
def test_wrong_setting_is_refused_with_its_name(key: str, value: object) -> None:
    with pytest.raises(StorageConfigError, match=f"storage.{key}"):
        StorageConfig(**{key: value})  # type: ignore[arg-type]


def test_an_entry_that_the_tables_refuse_keeps_its_journal_file(
    config: StorageConfig, now: dt.datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise sa.exc.DataError("insert", {}, ValueError("no such value"))

    monkeypatch.setitem(projection._PROJECTIONS, TurnAppended, refuse)
    store = CallStore(config)
    store.open_call("c1", did="100", ani="200", now=now)
    store.append_turn("c1", "t1", role="caller", heard_text="where is my order", now=now)
    store.close_call("c1", disposition="completed", cause="normal", ended_by="caller", now=now)
    store.close()
    kept = config.journal_folder / "c1.refused"
    assert "where is my order" in str(unpack(kept.read_bytes()).entries)
    assert not (config.journal_folder / "c1.journal").exists()


def test_what_postgresql_would_refuse_is_made_to_fit(config: StorageConfig, now: dt.datetime) -> None:
    store = CallStore(config)
    store.open_call("c1", did="100", ani="200", display_name="A\0nna", now=now)
    store.append_turn("c1", "t1", role="agent", generated_text="one\0 moment", now=now)
    store.record_tool_call("c1", "x", turn_id="t1", name="n" * 200, arguments={"a\0": "b\0"}, state="failed", now=now)
    call = store.get_call("c1")
    assert call["display_name"] == "Anna" and call["turns"][0]["generated_text"] == "one moment"
    assert call["tool_calls"][0]["name"] == "n" * 64 and call["tool_calls"][0]["arguments"] == {"a": "b"}
    store.close()


def test_calls_that_wait_for_the_database_hold_no_descriptor(
    store: CallStore, now: dt.datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """users.md P2: a database that is away for hours must not use up the process's descriptors."""
    from storage import writer

    monkeypatch.setattr(writer, "RETRY_S", 0.01)
    real_apply = projection.apply

    def away(*_args: object) -> bool:
        raise sa.exc.OperationalError("insert", {}, Exception("server away"))

    monkeypatch.setattr(projection, "apply", away)
    before = len(os.listdir("/proc/self/fd"))
    for index in range(30):
        store.open_call(f"c{index}", did="100", ani="", now=now)
        store.close_call(f"c{index}", disposition="completed", cause="normal", now=now)
    while not store.last_error:
        pass
    assert len(os.listdir("/proc/self/fd")) < before + 10
    monkeypatch.setattr(projection, "apply", real_apply)
    assert store.flush() and not list(store._config.journal_folder.glob("c*.journal"))
    assert store.get_call("c29")["state"] == "closed"
