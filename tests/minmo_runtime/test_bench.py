"""The benches run end to end on tiny weights and end with one JSON object."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minmo_runtime.bench import engine, modules, parents
from minmo_runtime.bench.calls import Bench, Result, engine_config
from minmo_runtime.bench.calls import table as calls_table
from minmo_runtime.bench.engine import measure, table
from minmo_runtime.bench.gpu import __main__ as gpu
from minmo_runtime.random_checkpoint import TINY, write_random_checkpoint
from minmo_runtime.weights import load_checkpoint

HIFT = {
    "kind": "hift",
    "base_channels": 32,
    "f0_cond_channels": 16,
    "resblock_kernel_sizes": [3],
    "resblock_dilation_sizes": [1],
}
SENSEVOICE = {
    **TINY["encoder"],
    "front_end": "lfr",
    "lfr_m": 7,
    "lfr_n": 6,
    "fsmn_padding": "symmetric",
    "chunk_frames": 0,
    "left_context_frames": 0,
    "num_queries": 16,
    "tp_blocks": 1,
}


@pytest.mark.slow
def test_the_engine_bench_measures_every_part_for_each_number_of_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "REPEATS", 1)
    monkeypatch.setattr(modules, "REPEATS", 1)
    result = json.loads(json.dumps(measure(load_checkpoint(write_random_checkpoint(tmp_path)), (1, 2))))
    parts = {"features", "encoder", "llm", "voice_lm", "flow", "vocoder", "sum"}
    assert set(result["rtf"]["1"]) == set(result["rtf"]["2"]) == parts
    assert result["rtf"]["1"]["sum"] > 0 and result["first_audio_ms"]["2"]["cpu"] > 0
    assert "UNTRAINED" in result["checkpoint"] and "first audio" in table(result)


def test_the_gpu_bench_dry_runs_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    result = gpu.measure(gpu.DRY_RUN, torch.device("cpu"), "float32", [2], 0.6, 60.0)
    assert result["llm"]["decode"]["2"]["step_ms"] > 0 and result["voice_lm"]["copy_gb_s"] > 0
    assert result["llm_fp8"]["decode"]["2"]["step_ms"] > 0 and not result["llm_fp8"]["is_native"]
    assert result["llm_fp8"]["weights_read_ms"] > 0 and "llm_fp8" in gpu.table(result)
    assert set(result["sound"]["2"]) == {"euler_ms", "euler_eager_ms", "vocoder_ms", "vocoder_eager_ms"}
    assert result["rtf"]["2"]["flow"] > 0 and result["calls"][0]["calls"] == 2
    assert json.loads(json.dumps(result)) and "real-time factor" in gpu.table(result)


class Jumps:
    """A clock that moves by itself: ten milliseconds at each look."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.01
        return self.now


def test_calls_go_round_and_their_first_audio_is_timed(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(write_random_checkpoint(tmp_path))
    config = replace(engine_config(checkpoint, 2, "cpu", "float32"), max_voice_tokens=50)
    result = Bench(checkpoint, config, clock=Jumps()).run(seconds=9.0, warm_s=0.0)
    assert result.num_replies >= 2 and not result.num_failed
    assert len(result.first_audio_ms) >= 2 and min(result.first_audio_ms) > 10
    assert result.bytes_per_call > 0


def test_a_device_holds_as_many_calls_as_stay_within_the_limit() -> None:
    good = Result(8, first_audio_ms=[100.0] * 99 + [290.0], num_replies=100)
    late = Result(16, first_audio_ms=[100.0] * 90 + [400.0] * 10, num_replies=100)
    broken = Result(32, first_audio_ms=[100.0] * 100, num_replies=100, num_gaps=2)
    assert [result.is_held for result in (good, late, broken)] == [True, False, False]
    assert "held at p95 first audio <= 300 ms, 45% speaking: 8 calls" in calls_table([good, late, broken])


def test_the_parents_are_timed_beside_the_reference() -> None:
    tables = {**TINY, "vocoder": HIFT, "encoder": SENSEVOICE}
    rows = parents.measure(tables, [torch.float32], repeats=1)
    assert [row.reference_ms for row in rows] == ["131-170", "131-170", "2000", "5700", "more", "662", "240"]
    assert all(row.ours_ms > 0 and row.limit for row in rows)
    assert parents.table_of(rows).count(
        "multiplications"
    ) == 5 and "not faster than the reference: " in parents.table_of(rows)


def test_the_ratio_is_that_of_the_reference_s_best_figure() -> None:
    rows = [parents.Row("step", "131-170", 262.0, 0.0, "weights"), parents.Row("flow", "more", 900.0, 0.0, "sums")]
    assert [row.ratio for row in rows] == [2.0, None]
    assert parents.table_of(rows).splitlines()[-1] == "not faster than the reference: step"


def test_jobs_take_turns() -> None:
    order: list[str] = []
    found = parents.in_turns({name: lambda name=name: order.append(name) for name in "ab"}, repeats=2)
    assert order == ["a", "b"] * 3 and set(found) == {"a", "b"}


def test_what_a_prompt_in_reach_is_worth_is_told() -> None:
    error = parents.prompt_error(TINY["flow"], num_prompt=30, num_tokens=90, window_s=0.6)
    assert 0 < error["pinned_mean"] and 0 < error["not_pinned_mean"] < 2 * error["mel_std"]


def test_the_window_of_the_flow_is_exact_inside_and_its_error_beyond_is_told() -> None:
    error = parents.window_error(TINY["flow"], num_tokens=90, window_s=0.6)
    assert error["window_s"] == 0.6 and error["inside_max"] < 1e-4 < error["beyond_mean"] < 2 * error["mel_std"]
