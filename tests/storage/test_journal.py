from __future__ import annotations

import datetime as dt
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage.entries import CallOpened, CallUpdated, EventAppended, JournalUnavailable, StorageError
from storage.journal import CallJournal, pack, unpack

NOW = dt.datetime(2026, 11, 22, 16, 0, 0, 123_456, tzinfo=dt.UTC)


def event(seq: int, text: str = "hello") -> EventAppended:
    return EventAppended(call_id="c1", seq=seq, at=NOW, name="test", fields={"text": text})


def test_records_come_back_as_they_were_written() -> None:
    opened = CallOpened(
        call_id="c1", seq=0, at=NOW, did="100", ani="200", display_name="名", direction="inbound", campaign="",
        campaign_version="", source_address="", sample_rate_hz=8_000,
    )  # fmt: skip
    updated = CallUpdated(call_id="c1", seq=1, at=NOW, fields={"answered_at": NOW, "bridges": ["in"]})
    content = unpack(pack(opened) + pack(updated))
    assert content.entries == [opened, updated]
    assert content.num_bad_bytes == 0


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cut=st.integers(min_value=0, max_value=400), texts=st.lists(st.text(max_size=20), max_size=6))
def test_file_cut_at_any_byte_keeps_every_whole_record(cut: int, texts: list[str]) -> None:
    records = [pack(event(seq, text)) for seq, text in enumerate(texts)]
    raw = b"".join(records)[:cut]
    num_whole = 0
    while num_whole < len(records) and sum(map(len, records[: num_whole + 1])) <= len(raw):
        num_whole += 1
    content = unpack(raw)
    assert [entry.seq for entry in content.entries] == list(range(num_whole))
    assert content.num_good_bytes + content.num_bad_bytes == len(raw)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(at=st.integers(min_value=0), flip=st.integers(min_value=1, max_value=255))
def test_changed_byte_is_noticed_and_nothing_behind_it_is_read(at: int, flip: int) -> None:
    records = [pack(event(seq)) for seq in range(4)]
    raw = bytearray(b"".join(records))
    at %= len(raw)
    raw[at] ^= flip
    hit = next(index for index in range(4) if at < sum(map(len, records[: index + 1])))
    assert [entry.seq for entry in unpack(bytes(raw)).entries] == list(range(hit))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(raw=st.binary(max_size=200))
def test_any_bytes_are_read_without_an_error(raw: bytes) -> None:
    unpack(raw)


def test_torn_tail_is_set_aside_and_writing_goes_on(tmp_path: Path) -> None:
    journal = CallJournal.open(tmp_path, "c1", is_synced=True)
    journal.append(event(0), sync=True)
    journal.close()
    path = tmp_path / "c1.journal"
    path.write_bytes(path.read_bytes() + pack(event(1))[:-3])
    journal = CallJournal.open(tmp_path, "c1", is_synced=True)
    journal.append(event(1, "again"), sync=True)
    journal.close()
    assert [entry.fields["text"] for entry in unpack(path.read_bytes()).entries] == ["hello", "again"]
    assert (tmp_path / "c1.damaged").exists()


@pytest.mark.parametrize("call_id", ["../x", "a/b", "", ".hidden", "a" * 65, "a\0b", "a.journal"])
def test_id_that_could_leave_the_folder_is_refused(tmp_path: Path, call_id: str) -> None:
    with pytest.raises(StorageError):
        CallJournal.open(tmp_path, call_id, is_synced=False)


def test_full_disk_is_not_acknowledged_and_leaves_no_torn_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    journal = CallJournal.open(tmp_path, "c1", is_synced=True)
    journal.append(event(0), sync=True)
    real_write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real_write(descriptor, data[:10]))  # disk full inside it
    with pytest.raises(JournalUnavailable):
        journal.append(event(1), sync=True)
    monkeypatch.undo()
    journal.append(event(1), sync=True)
    journal.close()
    content = unpack((tmp_path / "c1.journal").read_bytes())
    assert [entry.seq for entry in content.entries] == [0, 1]
    assert content.num_bad_bytes == 0
