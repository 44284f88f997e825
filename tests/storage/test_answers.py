"""Who answered, as a histogram over the calls that are kept."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path

from typer.testing import CliRunner

from agent.__main__ import app
from storage.answers import BINS_MS, answer_histogram
from storage.calls import CallStore


def found(store: CallStore, call_id: str, now: dt.datetime, *verdicts: tuple[str, float | None]) -> None:
    store.open_call(call_id, did="+3902", ani="", direction="outbound", now=now)
    for kind, decision_ms in verdicts:
        store.journal_append(call_id, "answered_by", now=now, kind=kind, was="", reasons=["x"], decision_ms=decision_ms)


def test_first_verdicts_are_a_histogram_by_class_and_what_it_was_in_the_end_is_counted_beside_it(
    store: CallStore, now: dt.datetime
) -> None:
    for number, decision_ms in enumerate((900, 1200, 1400, 1600)):
        found(store, f"h{number}", now, ("human", decision_ms))
    found(store, "v1", now, ("human", 1100), ("voicemail", 5200))
    found(store, "v2", now, ("voicemail", 3500))
    found(store, "u1", now, ("undecided", None))
    store.open_call("inbound", did="100", ani="", now=now)
    store.flush()
    human, undecided, voicemail = answer_histogram(store.engine)
    assert (human["kind"], human["num_first"], human["num_final"]) == ("human", 5, 4)
    assert (human["p50_ms"], human["p95_ms"]) == (1200, 1600)
    assert {each["up_to_ms"]: each["n"] for each in human["bins"] if each["n"]} == {1000: 1, 1500: 3, 2000: 1}
    assert (voicemail["num_first"], voicemail["num_final"], voicemail["p50_ms"]) == (1, 2, 3500)
    assert (undecided["num_first"], undecided["p50_ms"]) == (1, None)
    assert [each["up_to_ms"] for each in human["bins"]] == [*BINS_MS, None]


def test_only_calls_since(store: CallStore, now: dt.datetime) -> None:
    found(store, "old", now, ("human", 900))
    found(store, "new", now + dt.timedelta(days=1), ("ivr", 2000))
    store.flush()
    assert [row["kind"] for row in answer_histogram(store.engine, since=now + dt.timedelta(hours=1))] == ["ivr"]


def test_the_command_line_prints_it(store: CallStore, now: dt.datetime, tmp_path: Path) -> None:
    found(store, "h1", now, ("human", 900))
    store.flush()
    settings = tmp_path / "answers.toml"
    settings.write_text(f'[storage]\nfolder = "{tmp_path / "var"}"\n')
    shown = CliRunner().invoke(app, ["db", "answers", "--config", str(settings)])
    assert shown.exit_code == 0 and "p95 ms" in shown.output
    assert shown.output.splitlines()[1].split()[:5] == ["human", "1", "1", "900", "900"]
    as_json = CliRunner().invoke(app, ["db", "answers", "--json", "--config", str(settings)])
    assert json.loads(as_json.output)[0]["num_first"] == 1
