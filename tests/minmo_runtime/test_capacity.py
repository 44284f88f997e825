"""How many calls a device holds: the arithmetic, the self-test on real modules, what is kept, and the refusal."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from minmo_runtime.api import JobOverran, OpenStream, PushText, RuntimeOverloaded, Say, StartReply
from minmo_runtime.capacity import (
    MAX_BUSY_SHARE,
    Capacity,
    Costs,
    capacity_of,
    default_file,
    identity,
    keep,
    kept,
    measure,
)
from minmo_runtime.config import RuntimeConfig
from minmo_runtime.engine import Engine
from minmo_runtime.long_jobs import LOG_EVERY_S, LongJobs
from minmo_runtime.random_checkpoint import write_random_checkpoint
from minmo_runtime.weights import Checkpoint, load_checkpoint

CONFIG = RuntimeConfig(max_streams=3, max_voice_tokens=60, sound_rows=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def checkpoint(folder: Path) -> Checkpoint:
    return load_checkpoint(folder)


class Ticks:
    """A timer that counts how often it was read: `step_s` passes each time."""

    def __init__(self, step_s: float) -> None:
        self._readings: Iterator[int] = count()
        self.step_s = step_s

    def __call__(self) -> float:
        return next(self._readings) * self.step_s


def test_shared_passes_make_the_next_call_cheaper_and_the_busy_share_decides() -> None:
    costs = Costs(rows=4, listening=(0.02, 0.05), speaking=(0.10, 0.25))
    assert costs.busy_share(1) == pytest.approx(0.5 * 0.02 + 0.45 * 0.10)
    # 0.01 for being at it and 0.01 for each; 0.05 and 0.05 for each.
    assert costs.busy_share(10) == pytest.approx((0.01 + 0.01 * 5) + (0.05 + 0.05 * 4.5))
    held = costs.calls_held(1000)
    assert costs.busy_share(held) <= MAX_BUSY_SHARE < costs.busy_share(held + 1)
    assert costs.calls_held(5) == 5


def test_a_slow_device_holds_no_call_yet_lets_one_in(checkpoint: Checkpoint, tmp_path: Path) -> None:
    assert Costs(rows=1, listening=(1.5, 1.5), speaking=(2.0, 2.0)).calls_held(4) == 0
    found = capacity_of(Engine(checkpoint, CONFIG), tmp_path / "kept.json", Ticks(60.0))
    assert found.num_calls == 1 and found.costs is not None and found.costs.calls_held(4) == 0


def test_the_self_test_measures_both_sides_and_leaves_the_engine_as_it_was(checkpoint: Checkpoint) -> None:
    watch = Ticks(0.001)
    engine = Engine(checkpoint, CONFIG, timer=watch)
    costs = measure(engine, Ticks(0.1))
    assert costs.rows == 3 and costs.listening == pytest.approx((0.1, 0.1))  # 0.1 s of work for a second of audio
    assert all(spoken > 0.02 for spoken in costs.speaking)
    assert not engine.streams and engine.runner.pool.num_free == 3
    assert not engine.say_cache and not engine.job_times and not engine.long_jobs.num_jobs and engine.timer is watch


def test_every_part_of_the_model_is_in_the_self_test(checkpoint: Checkpoint) -> None:
    engine = Engine(checkpoint, CONFIG, timer=Ticks(0.001))
    seen: set[str] = set()
    real = engine._run

    def run(job, now):  # type: ignore[no-untyped-def]
        seen.add(job.kind.value)
        return real(job, now)

    engine._run = run  # type: ignore[method-assign]
    measure(engine, Ticks(0.1))
    assert {"encode", "prefill", "decode", "voice", "flow", "vocode"} <= seen


def test_it_is_measured_once_for_a_device_and_weights(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "kept.json"
    first = capacity_of(Engine(checkpoint, CONFIG), path, Ticks(0.5))
    again = capacity_of(Engine(checkpoint, CONFIG), path, Ticks(90.0))
    assert (first.source, again.source) == ("measured", "kept")
    assert first.costs == again.costs and first.num_calls == again.num_calls
    other = dataclasses.replace(CONFIG, num_threads=2)
    assert capacity_of(Engine(checkpoint, other), path, Ticks(0.5)).source == "measured"
    assert len(json.loads(path.read_text())) == 2


def test_other_weights_are_another_figure(folder: Path, tmp_path: Path) -> None:
    other = write_random_checkpoint(tmp_path / "other", seed=5)
    assert identity(folder, CONFIG) == identity(folder, CONFIG) != identity(other, CONFIG)
    assert identity(folder, CONFIG) == identity(folder, dataclasses.replace(CONFIG, max_streams=1))


@pytest.mark.parametrize("text", ["", "nonsense", "[]", '{"key": {"rows": "x"}}', '{"key": {"listening": [1]}}'])
def test_a_file_that_says_something_else_is_measured_again_and_repaired(tmp_path: Path, text: str) -> None:
    path = tmp_path / "kept.json"
    path.write_text(text)
    assert kept(path, "key") is None
    costs = Costs(2, (0.1, 0.2), (0.3, 0.4))
    keep(path, "key", costs)
    assert kept(path, "key") == costs


def test_a_folder_that_cannot_be_written_is_no_reason_not_to_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    keep(tmp_path / "file" / "kept.json", "key", Costs(1, (0.1, 0.1), (0.1, 0.1)))
    assert "is not kept" in capsys.readouterr().err


def test_the_figure_is_kept_where_caches_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_file() == Path("/somewhere/minmo/capacity.json")


def test_what_config_states_is_believed_and_not_measured(checkpoint: Checkpoint, tmp_path: Path) -> None:
    engine = Engine(checkpoint, dataclasses.replace(CONFIG, capacity_calls=2))
    found = capacity_of(engine, tmp_path / "kept.json")
    assert (found.num_calls, found.source) == (2, "config") and not (tmp_path / "kept.json").exists()
    assert "runtime.capacity_calls" in str(found)


def test_beyond_what_the_device_holds_a_call_is_refused_with_the_reason(checkpoint: Checkpoint) -> None:
    engine = Engine(checkpoint, CONFIG)
    engine.capacity = Capacity(1, "measured", Costs(3, (0.2, 0.5), (0.6, 1.7)))
    engine.receive(OpenStream(call_id="a", system_prompt="test"), 0.0)
    with pytest.raises(RuntimeOverloaded, match=r"1 calls are open; this device holds 1 calls in real time \(measured"):
        engine.receive(OpenStream(call_id="b", system_prompt="test"), 0.0)


# ---------------------------------------------------------------------- long jobs


def test_a_long_job_is_named_with_its_part_and_counted_for_its_calls(
    checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = Engine(checkpoint, dataclasses.replace(CONFIG, max_job_ms=50.0), timer=Ticks(0.06))
    engine.receive(OpenStream(call_id="a", system_prompt="test"), 0.0)
    engine.receive(OpenStream(call_id="quiet", system_prompt="test"), 0.0)
    while engine.has_work(0.0):
        engine.step(0.0)
    engine.long_jobs.clear()
    capsys.readouterr()
    engine.receive(PushText(call_id="a", text="hello"), 0.0)
    engine.receive(StartReply(call_id="a", turn_id="r"), 0.0)
    events = engine.step(0.0)
    assert [e for e in events if isinstance(e, JobOverran)] == [
        JobOverran(call_id="a", part="prefill", milliseconds=60.0)
    ]
    assert "prefill of 1 calls took 60 ms, longer than max_job_ms 50" in capsys.readouterr().err


def test_a_job_within_its_bound_says_nothing(checkpoint: Checkpoint) -> None:
    engine = Engine(checkpoint, dataclasses.replace(CONFIG, max_job_ms=70.0), timer=Ticks(0.06))
    engine.receive(OpenStream(call_id="a", system_prompt="test"), 0.0)
    engine.receive(Say(call_id="a", turn_id="s", text="hello"), 0.0)
    events = []
    while engine.has_work(0.0):
        events += engine.step(0.0)
    assert events and not [e for e in events if isinstance(e, JobOverran)] and not engine.long_jobs.num_jobs


def test_an_engine_that_is_always_late_says_so_once_in_a_while(capsys: pytest.CaptureFixture[str]) -> None:
    jobs = LongJobs(25.0)
    noted = [jobs.note("flow", 2, 0.1, now) for now in (0.0, 1.0, LOG_EVERY_S - 0.1, LOG_EVERY_S)]
    assert all(noted) and jobs.num_jobs == 4
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "4 so far" in lines[1]
