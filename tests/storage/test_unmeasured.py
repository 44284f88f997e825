"""Answers that should have a latency and have none."""

from __future__ import annotations

import datetime as dt

import pytest

from storage.calls import CallStore
from storage.unmeasured import UnmeasuredCount, unmeasured


def caller(turn_id: str, end: int, text: str = "hello", source: str = "voice") -> dict[str, object]:
    return {"turn_id": turn_id, "role": "caller", "source": source, "heard_text": text, "start_sample": end - 800,
            "end_sample": end}  # fmt: skip


def agent(turn_id: str, start: int, text: str = "well") -> dict[str, object]:
    return {"turn_id": turn_id, "role": "agent", "source": "voice", "heard_text": text, "start_sample": start,
            "end_sample": start + 800}  # fmt: skip


def test_P14_an_answer_without_a_latency_is_found_whatever_lies_between() -> None:
    call = [
        agent("a1", 0), caller("c1", 1_000), agent("f1", 2_000), agent("a2", 3_000, ""), agent("a3", 4_000),
        agent("a4", 5_000), caller("c2", 8_000), caller("c3", 9_000), agent("a5", 9_000),
    ]  # fmt: skip
    assert unmeasured(call, []) == ["a3", "a5"]
    assert unmeasured(call, ["a3"]) == ["a5"]
    assert unmeasured(call, ["a3", "a5"]) == []


@pytest.mark.parametrize(
    "before",
    [caller("c1", 1_000, source="keypad"), caller("c1", 1_000, text=""), caller("c1", 5_000)],
    ids=["keys", "nothing heard", "spoken at once"],
)
def test_what_answers_no_speech_owes_no_latency(before: dict[str, object]) -> None:
    assert unmeasured([agent("a1", 0), before, agent("a2", 4_000)], []) == []


def test_calls_and_turns_are_counted_by_when_the_call_ended(store: CallStore, now: dt.datetime) -> None:
    for index, measured in enumerate((True, False, False)):
        call_id, at = f"c{index}", now + dt.timedelta(hours=index)
        store.open_call(call_id, did="100", ani="200", now=at)
        store.append_turn(call_id, "t1", role="caller", heard_text="hi", end_sample=800, now=at)
        store.append_turn(call_id, "t2", role="agent", heard_text="yes", start_sample=1_600, now=at)
        if measured:
            store.add_metric(call_id, "t2", "voice_to_voice_ms", 100.0, now=at)
        store.close_call(call_id, disposition="completed", cause="normal", now=at)
    store.open_call("c3", did="100", ani="200", now=now)  # still running: its answer may get one yet
    store.append_turn("c3", "t1", role="caller", heard_text="hi", end_sample=800, now=now)
    store.append_turn("c3", "t2", role="agent", heard_text="yes", start_sample=1_600, now=now)
    store.flush()
    count = UnmeasuredCount(store.reader)
    for _ in range(2):
        assert count.since(now) == (2, 2)
        assert count.since(now + dt.timedelta(minutes=90)) == (1, 1)
    assert (count.of_call("c0"), count.of_call("c1")) == (0, 1)
