"""`python -m minmo_runtime.bench.engine --checkpoint DIR`: what the engine costs, per module and as a whole.

Real-time factor = compute time / audio time (lower is better), per module and in sum, for 1, 2 and 4 calls that
listen and speak all the time; first audio after the decision to speak; the longest job. Medians of 5, CPU time of the
engine's thread with wall time beside it, the machine and its load named; then calls in real time (calls.py). The last
line is JSON. Without a checkpoint: random weights at nano's sizes, which cost the same and say nothing (no quality is
claimed). `--profile NAME --random-weights` takes a profile's sizes: on a GPU the whole table of bench/gpu, on a CPU the
same as above for a small one, and a large one's modules alone (parents.py).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from minmo_runtime.api import (
    AudioDelta,
    CloseStream,
    OpenStream,
    PushText,
    Say,
    StartReply,
    ToolCallRequested,
    ToolResult,
)
from minmo_runtime.bench.calls import measure_calls
from minmo_runtime.bench.calls import table as calls_table
from minmo_runtime.bench.gpu.__main__ import main as gpu_main
from minmo_runtime.bench.modules import prefill_ms, real_time_factors
from minmo_runtime.bench.parents import main as parents_main
from minmo_runtime.bench.random_weights import random_checkpoint_of
from minmo_runtime.config import RuntimeConfig
from minmo_runtime.engine import Engine
from minmo_runtime.profiles import profile_folder, read_profile
from minmo_runtime.random_checkpoint import NANO, write_random_checkpoint
from minmo_runtime.weights import Checkpoint, load_checkpoint

REPEATS = 5
CALLS = (1, 2, 4)
_LARGEST_ON_CPU = 512 * 8  # LLM width times layers; Qwen2.5-0.5B has 896 * 24
SENTENCE = "your order was shipped. it will arrive on wednesday. can i help you with anything else?"
QUESTION = "where is my order 45612"
SYSTEM = "you are mia at the garden shop. speak in a friendly voice at a normal pace. order numbers have 5 digits."


def first_audio_ms(checkpoint: Checkpoint, num_calls: int) -> dict[str, float]:
    """From StartReply (context already in the cache) to the first AudioDelta, `num_calls` deciding at the same moment.

    The random or trained model may open with a tool call; a Say of fixed text takes the same path from the first text
    token on, so it is what is timed, behind the prefill of the question.
    """
    walls, cpus = [], []
    for repeat in range(REPEATS + 1):
        engine = Engine(checkpoint, RuntimeConfig(max_streams=num_calls))
        ids = [f"c{i}" for i in range(num_calls)]
        for call_id in ids:
            engine.receive(OpenStream(call_id=call_id, system_prompt=SYSTEM, seed=repeat), 0.0)
        while engine.has_work(0.0):
            engine.step(0.0)
        waiting = set(ids)
        wall, cpu = time.perf_counter(), time.thread_time()
        for call_id in ids:
            engine.receive(PushText(call_id=call_id, text=QUESTION), 0.0)
            engine.streams[call_id].conversation.add("user", QUESTION)
            engine.streams[call_id].conversation.retarget("assistant")
            engine.streams[call_id].needs_hidden = True
            engine.receive(Say(call_id=call_id, turn_id="t", text=f"{SENTENCE} {repeat}"), 0.0)
        while waiting and engine.has_work(0.0):
            waiting -= {event.call_id for event in engine.step(0.0) if isinstance(event, AudioDelta)}
        walls.append(1000 * (time.perf_counter() - wall))
        cpus.append(1000 * (time.thread_time() - cpu))
    return {"cpu": round(statistics.median(cpus[1:]), 1), "wall": round(statistics.median(walls[1:]), 1)}


def speaking(checkpoint: Checkpoint, num_calls: int) -> dict[str, Any]:
    """`num_calls` answer at once, through the whole engine: compute per second of speech, longest job, by kind."""
    # The bounds keep random weights, which never find an end, from speaking for minutes.
    config = RuntimeConfig(max_streams=num_calls, max_ahead_s=60.0, max_voice_tokens=200, max_reply_tokens=40)
    engine = Engine(checkpoint, config, timer=time.thread_time)
    for number in range(num_calls):
        call_id = f"c{number}"
        engine.receive(OpenStream(call_id=call_id, system_prompt=SYSTEM, seed=number), 0.0)
        engine.receive(PushText(call_id=call_id, text=QUESTION), 0.0)
        engine.receive(StartReply(call_id=call_id, turn_id="r"), 0.0)
        engine.receive(Say(call_id=call_id, turn_id="s", text=f"{SENTENCE} {number}"), 0.0)
    samples = 0
    while engine.has_work(0.0):
        for event in engine.step(0.0):
            if isinstance(event, AudioDelta):
                samples += len(event.pcm) // 2
            elif isinstance(event, ToolCallRequested):
                engine.receive(
                    ToolResult(
                        call_id=event.call_id,
                        turn_id=event.turn_id,
                        tool_call_id=event.tool_call_id,
                        content="status shipped day wednesday",
                    ),
                    0.0,
                )
    seconds = samples / checkpoint.rates.output_sample_rate_hz
    by_kind: dict[str, list[float]] = {}
    for kind, _, spent in engine.job_times:
        by_kind.setdefault(kind.value, []).append(1000 * spent)
    total = sum(map(sum, by_kind.values())) / 1000
    for number in range(num_calls):
        engine.receive(CloseStream(call_id=f"c{number}"), 0.0)
    return {
        "audio_s": round(seconds, 1),
        "rtf": round(total / seconds, 4) if seconds else None,
        "job_ms": {kind: [round(statistics.median(ms), 2), round(max(ms), 2)] for kind, ms in sorted(by_kind.items())},
        "longest_job_ms": round(max(max(ms) for ms in by_kind.values()), 1),
    }


def measure(checkpoint: Checkpoint, calls: Sequence[int] = CALLS) -> dict[str, Any]:
    """Everything, as one JSON object."""
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    result: dict[str, Any] = {
        "checkpoint": checkpoint.label,
        "bridges": list(checkpoint.bridges),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, 1 thread, torch {torch.__version__}",
        "load_at_start": round(load, 1),
        "repeats": REPEATS,
        "rtf": {str(n): {k: round(v, 4) for k, v in real_time_factors(checkpoint, n).items()} for n in calls},
        "first_audio_ms": {str(n): first_audio_ms(checkpoint, n) for n in calls},
        "engine": {str(n): speaking(checkpoint, n) for n in calls},
        "prefill_48_tokens_ms": round(prefill_ms(checkpoint, 48), 2),
    }
    result["load_at_end"] = round(os.getloadavg()[0], 1)
    return result


def table(result: dict[str, Any]) -> str:
    """The same for people."""
    calls = list(result["rtf"])
    lines = [
        f"{result['checkpoint']}, bridges={result['bridges']}, {result['machine']}, load {result['load_at_start']}",
        f"real-time factor (CPU s per s of audio){'':12}" + "".join(f"{n:>9} call(s)" for n in calls),
    ]
    for part in result["rtf"][calls[0]]:
        lines.append(f"  {part:<48}" + "".join(f"{result['rtf'][n][part]:>17.4f}" for n in calls))
    for kind in ("cpu", "wall"):
        name = f"first audio after the decision, {kind} ms"
        lines.append(f"{name:<50}" + "".join(f"{result['first_audio_ms'][n][kind]:>17.1f}" for n in calls))
    for name in ("rtf", "longest_job_ms"):
        lines.append(
            f"{'whole engine, ' + name:<50}" + "".join(f"{result['engine'][n][name] or 0:>17.3f}" for n in calls)
        )
    return "\n".join(lines)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _is_small(contents: Mapping[str, Any]) -> bool:
    """Whether a CPU can run whole calls: the sizes say so, whatever the name."""
    return contents["llm"]["hidden_size"] * contents["llm"]["num_hidden_layers"] <= _LARGEST_ON_CPU


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Real-time factors, first audio and calls held by the engine")
    parser.add_argument("--checkpoint", type=Path, help="checkpoint folder; default: random weights at nano's sizes")
    parser.add_argument("--profile", help="a profile's name instead")
    parser.add_argument("--random-weights", action="store_true", help="only the profile's sizes: nothing is loaded")
    parser.add_argument("--calls", type=_numbers, default=list(CALLS), help="numbers of calls, with commas")
    parser.add_argument("--seconds", type=float, default=20.0, help="real time for each number of calls; 0 = none")
    arguments = parser.parse_args(argv)
    checkpoint: Checkpoint
    if arguments.profile and arguments.random_weights:
        contents = read_profile(profile_folder(arguments.profile))
        if torch.cuda.is_available():
            calls_text = ",".join(map(str, arguments.calls))
            return gpu_main(["--profile", arguments.profile, "--calls", calls_text])
        if not _is_small(contents):
            print(f"{arguments.profile}: no GPU here; its modules alone, one at a time")
            return parents_main(["--profile", arguments.profile])
        checkpoint = random_checkpoint_of(contents, torch.device("cpu"), torch.float32)
    elif arguments.profile:
        checkpoint = load_checkpoint(profile_folder(arguments.profile))
    else:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = load_checkpoint(arguments.checkpoint or write_random_checkpoint(folder, dims=NANO))
    result = measure(checkpoint, arguments.calls)
    print(table(result))
    if arguments.seconds > 0:
        results = measure_calls(checkpoint, arguments.calls, "cpu", "float32", arguments.seconds, arguments.seconds / 5)
        result["calls"] = [one.row() for one in results]
        print(calls_table(results))
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
