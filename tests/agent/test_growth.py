"""Whether something grows: the robust slope, the verdict, and the readings from /proc they are made of."""

from __future__ import annotations

import mmap
import os
import random
import socket

import pytest

from agent.bench_short_calls import WEIGHTS, kinds
from agent.bench_soak import faults_of, parse
from agent.growth import MEMORY, Budget, Growth, Reading, growth_of, held_by, slope
from agent.holdings import Ledger, result_of, table_of


def readings(quantity: str, values: list[float], every: int = 50) -> list[Reading]:
    return [(every * (index + 1), {quantity: value}) for index, value in enumerate(values)]


def found(quantity: str, values: list[float], budget: Budget | None = None) -> Growth:
    (growth,) = growth_of(readings(quantity, values), budget or Budget())
    return growth


def test_slope_of_a_line_is_exact_and_needs_two_places() -> None:
    assert slope([(0, 5.0), (10, 25.0), (30, 65.0)]) == 2.0
    for points in ([], [(1, 2.0)], [(1, 2.0), (1, 9.0)]):
        with pytest.raises(ValueError, match="two places"):
            slope(points)


def test_slope_is_not_tilted_by_a_quarter_of_odd_readings() -> None:
    dice = random.Random(3)
    points = [(float(at), 2.0 * at + dice.uniform(-5, 5)) for at in range(0, 1000, 50)]
    spoiled = [(at, value + 1e6 if index % 4 == 1 else value) for index, (at, value) in enumerate(points)]
    assert slope(spoiled) == pytest.approx(2.0, rel=0.2)


def test_memory_that_grows_with_every_call_is_a_leak_and_memory_that_levels_off_is_none() -> None:
    leaking = found(MEMORY, [50e6 + 3_000 * 50 * step for step in range(20)])
    level = found(MEMORY, [50e6 + 10e6 * (1 - 0.5**step) for step in range(20)])
    assert leaking.is_leak and leaking.per_call_late == 3_000
    assert not level.is_leak and level.per_call > level.per_call_late


def test_an_arena_taken_once_is_no_leak() -> None:
    values = [50e6] * 15 + [51e6] * 5
    assert not found(MEMORY, values).is_leak


def test_one_descriptor_in_a_hundred_calls_is_a_leak_and_one_that_comes_and_goes_is_none() -> None:
    assert found("fds", [10 + step // 2 for step in range(20)]).is_leak
    assert not found("fds", [10 + step % 2 for step in range(20)]).is_leak
    assert not found("fds", [12] * 20).is_leak


def test_the_budget_decides_and_the_warm_up_is_left_out() -> None:
    values = [50e6 + 3_000 * 50 * step for step in range(20)]
    assert not found(MEMORY, values, Budget(bytes_per_call=4_000)).is_leak
    jump = [0.0, 0.0, 0.0, 0.0, *values[4:]]
    assert found(MEMORY, jump).first == jump[4]


def test_resident_size_is_told_and_not_judged() -> None:
    assert not found("rss", [1e9 * step for step in range(20)]).is_leak


def test_too_few_readings_are_refused() -> None:
    with pytest.raises(ValueError, match="5 readings, at least 6"):
        growth_of(readings("fds", [1.0] * 5), Budget())


def test_held_by_counts_what_this_process_takes() -> None:
    before = held_by(os.getpid())
    taken = [socket.socket() for _ in range(5)]
    block = mmap.mmap(-1, 20 << 20)  # never from what the heap had left
    for _ in range(320):
        block.write(os.urandom(1 << 16))
    after = held_by(os.getpid())
    for each in taken:
        each.close()
    block.close()
    assert after["fds"] - before["fds"] == 5
    assert after[MEMORY] - before[MEMORY] > 0.8 * (20 << 20)
    assert before["threads"] >= 1 and before["rings"] == 0


def test_a_leak_names_its_role_and_what_became_more() -> None:
    ledger = Ledger()
    for step in range(10):
        ledger.note("agent", 10 * (step + 1), {"objects": 1_000 + 400 * step}, {"Queue": 5 + 10 * step, "dict": 7})
        ledger.note("engine", 10 * (step + 1), {"objects": 500})
    result = result_of(ledger, Budget(), 0.2)
    assert result["leaks"] == ["agent: objects"] and result["grown_types"] == {"agent": {"Queue": 40}}
    assert "GROWS" in table_of(result) and "Queue +40" in table_of(result)
    told = {"restarts": {"worker": 2}, "as_expected": 0.5, "outcomes": {"listen: 500": 5}}
    faults = faults_of(result | told)
    assert faults[0] == "agent: objects grows with the calls"
    assert "worker died 2 times" in faults[1] and "50 %" in faults[2] and "listen: 500" in faults[2]


def test_calls_of_every_kind_are_drawn_and_the_same_for_the_same_seed() -> None:
    first, again, other = ([next(drawn) for _ in range(300)] for drawn in (kinds(1), kinds(1), kinds(2)))
    assert first == again != other and set(first) == set(WEIGHTS)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--calls", "20", "--every", "10"], "--calls 20 with --every 10: must give at least 6 readings"),
        (["--at-once", "0"], "--at-once 0: must be from 1 to 64"),
        (["--seconds-per-call", "99"], "--seconds-per-call 99: must be from 0.2 to 30"),
        (["--warm-up", "0.9"], "--warm-up 0.9: must be from 0 to 0.5"),
        (["--budget-kib", "0"], "--budget-kib 0: must be more than 0"),
        (["--engine", "--streams", "3"], "--streams 3 with --every 1: must give at least 6 readings"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(words)
    assert said in capsys.readouterr().err
