"""The benches run end to end on tiny weights and end with one JSON object."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from minmo_runtime.bench import gpu
from minmo_runtime.bench.engine import measure, table
from minmo_runtime.random_checkpoint import write_random_checkpoint
from minmo_runtime.weights import load_checkpoint


@pytest.mark.slow
def test_the_engine_bench_measures_every_part_for_each_number_of_calls(tmp_path: Path) -> None:
    result = json.loads(json.dumps(measure(load_checkpoint(write_random_checkpoint(tmp_path)), (1, 2))))
    parts = {"features", "encoder", "llm", "voice_lm", "flow", "vocoder", "sum"}
    assert set(result["rtf"]["1"]) == set(result["rtf"]["2"]) == parts
    assert result["rtf"]["1"]["sum"] > 0 and result["first_audio_ms"]["2"]["cpu"] > 0
    assert "UNTRAINED" in result["checkpoint"] and "first audio" in table(result)


def test_the_gpu_bench_dry_runs_on_a_cpu() -> None:
    result = gpu.measure(gpu.DRY, torch.device("cpu"), torch.float32, (1, 2))
    assert result["decode"]["2"]["step_ms"] > 0 and result["prefill_48_tokens_ms"] > 0
