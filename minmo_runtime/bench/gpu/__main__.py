"""`python -m minmo_runtime.bench.gpu [--profile minmo-8b] [--calls 1,8,...] [--out FILE]`: everything that the 8B path
is judged by (design §7), in one table; `--dry-run` does the same on a CPU, tiny.

1. LLM and voice LM decode step over the time to read the weights at the copy bandwidth measured in this run, with one
   CUDA graph per shape and without, and the LLM again with weights in 8-bit floats; 2. one Euler step of the flow and
   one piece of the vocoder for many calls, with graphs and without; 3. real-time factor of each module; 4. first audio
   p50 and p95 and the calls held.
Random weights: only compute is claimed. The parts stop when the time given by `--minutes` is used up. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from minmo_runtime.bench import calls
from minmo_runtime.bench.gpu import decode, sound
from minmo_runtime.bench.modules import real_time_factors
from minmo_runtime.bench.random_weights import random_checkpoint_of, random_module
from minmo_runtime.model.backbone import Backbone
from minmo_runtime.model.linear_forms import Fp8Linear, has_scaled_mm
from minmo_runtime.profiles import profile_folder, read_profile
from minmo_runtime.random_checkpoint import TINY

DEFAULT_PROFILE = "minmo-8b-paper"
DRY_RUN: dict[str, Any] = {"name": "dry-run", **TINY}
_DECODE_BATCHES = (1, 8, 64)


def measure(
    contents: dict[str, Any], device: torch.device, dtype: str, num_calls: list[int], seconds: float, minutes: float
) -> dict[str, Any]:
    begin = time.perf_counter()
    checkpoint = random_checkpoint_of(contents, device, getattr(torch, dtype))
    is_gpu = device.type == "cuda"
    result: dict[str, Any] = {
        "profile": contents["name"],
        "bridges": list(checkpoint.bridges),
        "device": torch.cuda.get_device_name(device) if is_gpu else "cpu",
        "torch": torch.__version__,
        "dtype": dtype,
    }
    batches = _DECODE_BATCHES if is_gpu else (1, 2)
    result["llm"] = decode.measure(checkpoint.modules.llm, device, batches)
    result["voice_lm"] = decode.measure(checkpoint.modules.voice_lm.trunk, device, batches)
    result["sound"] = sound.measure(checkpoint.modules.flow, checkpoint.modules.vocoder, device, batches)
    result["llm_fp8"] = _fp8(contents, device, dtype, batches)
    rtf = {}
    for rows in sorted({1, num_calls[len(num_calls) // 2]}):
        rtf[str(rows)] = {
            part: round(value, 5)
            for part, value in real_time_factors(checkpoint, rows, device=device.type, dtype=dtype).items()
        }
    result["rtf"] = rtf
    made: list[calls.Result] = []
    for number in num_calls:
        if time.perf_counter() - begin + seconds > 60 * minutes:
            result["left_out_calls"] = [n for n in num_calls if n >= number]
            break
        made += calls.measure_calls(checkpoint, [number], device.type, dtype, seconds, seconds / 4)
    result["calls"] = [one.row() for one in made]
    result["calls_table"] = calls.table(made)
    if is_gpu:
        result["gpu_memory_gb"] = round(torch.cuda.max_memory_allocated(device) / 1e9, 1)
    result["wall_s"] = round(time.perf_counter() - begin, 1)
    return result


def _fp8(contents: dict[str, Any], device: torch.device, dtype: str, batches: tuple[int, ...]) -> dict[str, Any]:
    """A second LLM: its plain weights are let go as they are rounded."""
    llm = random_module("llm", contents["llm"], device, getattr(torch, dtype))
    assert isinstance(llm, Backbone)
    return {
        "is_native": has_scaled_mm(llm.model.layers[0].mlp.down_proj.weight),
        **decode.measure(llm, device, batches, Fp8Linear),
    }


def table(result: dict[str, Any]) -> str:
    lines = [f"{result['profile']}, bridges={result['bridges']}, {result['device']}, {result['dtype']}, random weights"]
    for part in ("llm", "llm_fp8", "voice_lm"):
        found = result[part]
        lines.append(
            f"{part}: weights read in {found['weights_read_ms']} ms at the copy bandwidth {found['copy_gb_s']} GB/s"
        )
        for rows, row in found["decode"].items():
            lines.append(
                f"  {rows:>4} row(s): step {row['step_ms']} ms = {row['over_floor']} x floor; "
                f"without a graph {row['eager_ms']} ms"
            )
    if not result["llm_fp8"]["is_native"]:
        lines.append("  (this device does not multiply 8-bit floats: llm_fp8 is the same numbers as floats)")
    for rows, row in result["sound"].items():
        lines.append(f"  {rows:>4} row(s), one pass: " + ", ".join(f"{name} {value}" for name, value in row.items()))
    lines.append("real-time factor (device s per s of audio, all rows together)")
    for rows, parts in result["rtf"].items():
        lines.append(f"  {rows:>4} call(s): " + ", ".join(f"{name} {value}" for name, value in parts.items()))
    lines.append(result["calls_table"])
    if "gpu_memory_gb" in result:
        lines.append(f"GPU memory at most {result['gpu_memory_gb']} GB")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The 8B path on a GPU, in one table")
    parser.add_argument("--profile", default=DEFAULT_PROFILE)
    parser.add_argument("--calls", default="1,8,32,64,128,256", help="numbers of calls, with commas")
    parser.add_argument("--seconds", type=float, default=40.0, help="real time for each number of calls")
    parser.add_argument("--minutes", type=float, default=9.0, help="no new part is begun after that")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    arguments = parser.parse_args(argv)
    if arguments.dry_run:
        torch.set_num_threads(1)
        result = measure(DRY_RUN, torch.device("cpu"), "float32", [1, 2], 10.0, 9.0)
    elif torch.cuda.is_available():
        contents = read_profile(profile_folder(arguments.profile))
        numbers = [int(number) for number in arguments.calls.split(",")]
        device = torch.device("cuda")
        result = measure(contents, device, "bfloat16", numbers, arguments.seconds, arguments.minutes)
    else:
        parser.error("no CUDA device; --dry-run measures tiny sizes on the CPU")
    print(table(result))
    line = json.dumps(result)
    if arguments.out:
        arguments.out.write_text(line + "\n", encoding="utf-8")
    print(line)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
