"""How many calls hold: the verdict on a level, what is named as the limit, what the callers send."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from agent.bench_callers import CYCLE_S, Caller, payloads
from agent.bench_many import Level, levels_of, machine_s, result_of, role_of
from agent.bench_wire import Arrivals
from agent.lab import rtp

FIRST = Level(8, (), 12.0, 20.0, 21.0, 30.0, 1.0, 0.5, {"agent": 20.0, "workers": 40.0, "callers": 4.0}, 0.4)
SECOND = dataclasses.replace(FIRST, calls=16, cpu_percent={"agent": 36.0, "workers": 72.0, "callers": 6.0})


def test_a_level_holds_only_when_everybody_was_answered_in_time_and_in_full() -> None:
    assert FIRST.holds
    assert not dataclasses.replace(FIRST, gap_p99_ms=25.0).holds
    assert not dataclasses.replace(FIRST, delivered=0.97).holds
    assert dataclasses.replace(FIRST, answers_s=(0.7,) * 9 + (None,)).holds
    assert not dataclasses.replace(FIRST, answers_s=(0.7,) * 8 + (None,) * 2).holds
    assert not dataclasses.replace(FIRST, refused=("SIP/2.0 503 Service Unavailable",)).holds


def test_what_gave_way_is_named() -> None:
    late = dataclasses.replace(FIRST, gap_p99_ms=60.0)
    assert "workers 40 %" in dataclasses.replace(late, machine_busy=0.97).limit()
    assert "one core is full: agent" in dataclasses.replace(late, cpu_percent={"agent": 97.0}).limit()
    assert "503" in dataclasses.replace(FIRST, refused=("SIP/2.0 503 Service Unavailable",)).limit()
    assert "p99 60.0 ms" in late.limit()


def test_the_result_is_the_last_level_that_holds_and_the_cost_of_a_call() -> None:
    failed = dataclasses.replace(SECOND, calls=24, gap_p99_ms=70.0)
    result = result_of([FIRST, SECOND, failed])
    assert result["calls_held"] == 16 and "p99 70.0 ms" in result["limited_by"]
    assert result["cpu_percent_per_call"] == {"agent": 2.0, "workers": 4.0, "callers": 0.25}
    mute = dataclasses.replace(SECOND, calls=20, answers_s=(None,) * 9, machine_busy=0.99)
    both = result_of([FIRST, SECOND, mute, failed])
    assert (both["calls_held"], both["calls_with_steady_packets"]) == (16, 20)
    assert "all " in both["limited_by"] and "p99 70.0 ms" in both["packets_limited_by"]
    assert result_of([failed])["calls_held"] == 0
    assert result_of([FIRST])["limited_by"] == "the number asked for"


def test_levels_end_at_the_number_asked_for() -> None:
    assert levels_of(20, 8) == [8, 16, 20]
    assert levels_of(8, 8) == [8]


def test_all_workers_are_one_role() -> None:
    assert {role_of(name) for name in ("worker", "worker-1", "worker-12")} == {"workers"}


def test_a_caller_says_one_sentence_a_cycle_and_is_silent_then() -> None:
    packets, sentence_packets = payloads()
    said = rtp.DECODE[rtp.PCMU][np.frombuffer(b"".join(packets), np.uint8)].astype(float)
    assert not np.abs(said[sentence_packets * 160 :]).max() > 100
    assert len(said) == CYCLE_S * rtp.RATE_HZ
    assert said[:8_000].std() > 500 and np.abs(said[-16_000:]).max() < 100


def test_packets_of_a_span_are_those_between_its_ends() -> None:
    arrivals = Arrivals([(1.0, True), (1.02, False), (1.04, True)])
    assert arrivals.between(1.01, 1.04) == [(1.02, False)]


def test_an_answer_is_the_first_sound_after_a_sentence_that_the_agent_did_not_speak_into() -> None:
    loud = {12.9, 13.0, 16.6, 22.9}
    packets = [(round(10 + tick * 0.1, 1), round(10 + tick * 0.1, 1) in loud) for tick in range(200)]
    caller = Caller(None, "", ("", 0), Arrivals(packets), 0.1, said_s=[11.95, 13.05, 16.0, 19.0, 28.9])  # type: ignore[arg-type]
    waits = caller.answers_s(10.0, 30.0)
    # 13.05: the agent spoke into it; 28.9: its answer is not due yet
    assert waits[:2] == [pytest.approx(0.95), pytest.approx(0.6)] and waits[2:] == [None]


def test_the_machines_busy_time_is_part_of_all_its_time() -> None:
    busy, total = machine_s()
    assert 0 < busy < total
