"""`python -m minmo_runtime.bench.parents`: the full-size public parents on a CPU, one module at a time, beside the
parents' own code.

The reference figures are those of issue 3, taken on two cores with float32 and the public code: a voice LM step, the
flow's first second of speech and one with three seconds before it (the reference runs the whole history again), one
second of HiFT, ten seconds of SenseVoice-Small. Ours runs the same sizes with random weights through the serving forms.
Each row is the median of `--repeats`; wall time, as the reference's, and beside it the CPU time of all threads, for a
machine that is not quiet; the last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minmo_runtime.bench.random_weights import random_module
from minmo_runtime.model.encoder import VoiceEncoder
from minmo_runtime.model.flow import Flow
from minmo_runtime.model.hift import HiftVocoder
from minmo_runtime.model.voice_lm import VoiceLm
from minmo_runtime.profiles import profile_folder, read_profile
from minmo_runtime.serving_form import to_serving_form

PROFILE = "minmo-8b"
CONTEXT = 128  # rows in the voice LM's cache
HISTORY_S = (0, 3, 10)  # speech of the turn before the second that is measured
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Row:
    name: str
    reference_ms: str
    ours_ms: float  # wall
    cpu_ms: float  # of all threads: what the machine gave, whatever else ran on it
    limit: str  # what keeps it from being faster

    @property
    def ratio(self) -> float | None:
        """Of the reference's best figure; below 1 ours is faster."""
        numbers = re.findall(r"\d+", self.reference_ms)
        return round(self.ours_ms / float(numbers[0]), 2) if numbers else None


LIMITS = {
    "voice_lm": "reading the weights once: 1.4 GB in float32, 0.7 in bfloat16, 0.4 in int8",
    "flow": "multiplications: 10 Euler steps, each twice for guidance",
    "vocoder": "multiplications of 72 filters at 24 kHz, then sines",
    "encoder": "multiplications: 70 blocks over 171 rows",
}


def in_turns(jobs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, tuple[float, float]]:
    """Median wall and CPU milliseconds of each job. They take turns, so that a busy machine is busy for all of them."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in jobs}
    for _ in range(repeats + 1):
        for name, job in jobs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            job()
            times[name].append((1000 * (time.perf_counter() - wall), 1000 * (time.process_time() - cpu)))
    return {
        name: (
            round(statistics.median(wall for wall, _ in pairs[1:]), 1),
            round(statistics.median(cpu for _, cpu in pairs[1:]), 1),
        )
        for name, pairs in times.items()
    }


def _rows(
    part: str, references: Mapping[str, str], jobs: Mapping[str, Callable[[], object]], repeats: int
) -> list[Row]:
    found = in_turns(jobs, repeats)
    return [Row(name, references[name], *found[name], LIMITS[part]) for name in jobs]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def voice_lm_rows(table: Mapping[str, Any], dtypes: Sequence[torch.dtype], repeats: int, has_int8: bool) -> list[Row]:
    """One step behind CONTEXT rows, in each number format."""
    jobs: dict[str, Callable[[], object]] = {}
    for name in (*map(_name, dtypes), *(("int8",) if has_int8 else ())):
        dtype = torch.float32 if name == "int8" else getattr(torch, name)
        model = random_module("voice_lm", table, _CPU, dtype)
        assert isinstance(model, VoiceLm)
        to_serving_form("voice_lm", model, "int8" if name == "int8" else "as_stored")
        cache = model.new_cache(1, CONTEXT + 8)
        row = torch.zeros(1, 1, model.dims.hidden_size, dtype=dtype)

        def step(model: VoiceLm = model, cache: Any = cache, row: torch.Tensor = row) -> None:
            cache.lengths[0] = CONTEXT
            model.llm_decoder(model.trunk(embeds=row, cache=cache))

        jobs[f"voice LM, one step, {name}"] = step
    return _rows("voice_lm", dict.fromkeys(jobs, "131-170"), jobs, 5 * repeats)


def flow_rows(table: Mapping[str, Any], dtype: torch.dtype, repeats: int, chunk_tokens: int = 25) -> list[Row]:
    """One second of speech, as the reference's streaming form makes it: a chunk of 25 tokens and 3 ahead."""
    model = random_module("flow", {**table, "chunk_tokens": chunk_tokens, "left_context_s": -1.0}, _CPU, dtype)
    assert isinstance(model, Flow)
    to_serving_form("flow", model)
    dims = model.dims
    per_second = round(dims.token_rate_hz)
    voice = torch.randn(1, dims.spk_embed_dim, dtype=dtype)
    reference = {0: "2000", 3: "5700"}
    jobs: dict[str, Callable[[], object]] = {}
    references = {}
    for seconds in HISTORY_S:
        cache = model.new_cache(1, dims.window_chunks(2.0))
        state = model.new_state(voice, slot=0)
        ahead = dims.encoder.pre_lookahead_len
        model.push(state, [1] * (seconds * per_second + ahead))
        _run(model, state, cache)
        before = state.num_chunks, state.frames_done

        def again(state: Any = state, cache: Any = cache, before: tuple[int, int] = before, ahead: int = ahead) -> None:
            state.num_chunks, state.frames_done = before  # the ring still holds that history: the same chunk again
            state.tokens = [1] * (per_second + ahead)
            _run(model, state, cache)

        name = f"flow, 1 s of speech after {seconds} s, {_name(dtype)}"
        jobs[name], references[name] = again, reference.get(seconds, "more")
    return _rows("flow", references, jobs, repeats)


def window_error(table: Mapping[str, Any], num_tokens: int = 150, window_s: float = 2.0) -> dict[str, float]:
    """Mean absolute difference of the mel, bounded window against all of the history, inside the window and beyond it.

    Random weights here: it shows that the inside is exact and how the figure is taken; what the window costs in sound
    is told by trained weights (`--profile` with its files).
    """
    model = random_module("flow", {**table, "left_context_s": -1.0}, _CPU, torch.float32)
    assert isinstance(model, Flow)
    dims = model.dims
    tokens = torch.randint(0, dims.vocab_size, (1, num_tokens), generator=torch.Generator().manual_seed(0))
    voice = torch.randn(1, dims.spk_embed_dim, generator=torch.Generator().manual_seed(0))
    whole = model(tokens, voice)
    window = dims.window_chunks(window_s)
    cache, state, mels = model.new_cache(1, window), model.new_state(voice, slot=0), []
    model.push(state, tokens[0].tolist(), is_final=True)
    while model.can_step(state):
        mels += [mel for mel in model.step_rows([state], cache) if mel is not None]
    error = (torch.cat(mels, dim=-1) - whole).abs()
    inside = (window + 1) * dims.chunk_size * dims.frames_per_token
    spread = float(whole.std())
    return {
        "window_s": round(window * dims.chunk_size / dims.token_rate_hz, 2),
        "inside_max": float(error[..., :inside].max()),
        "beyond_mean": float(error[..., inside:].mean()),
        "mel_std": spread,
    }


def prompt_error(
    table: Mapping[str, Any], num_prompt: int = 50, num_tokens: int = 100, window_s: float = 1.0
) -> dict[str, float]:
    """Mean absolute difference of a prompted turn's mel from that of all of the history, beyond the window:
    with the prompt's own chunks kept in reach, and without. Random weights: it shows how the figure is taken."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, table["vocab_size"], (1, num_prompt + num_tokens), generator=generator)
    found: dict[str, float] = {}
    model = random_module("flow", {**table, "left_context_s": -1.0}, _CPU, torch.float32)
    assert isinstance(model, Flow)
    dims = model.dims
    voice = torch.randn(1, dims.spk_embed_dim, generator=generator)
    mel = torch.randn(1, dims.num_mel_bins, num_prompt * dims.frames_per_token, generator=generator)
    whole = model(tokens[:, num_prompt:], voice, tokens[:, :num_prompt], mel)
    for name, prompt_s in (("pinned", dims.prompt_context_s), ("not_pinned", 0.0)):
        model.dims = dataclasses.replace(dims, prompt_context_s=prompt_s)
        window = dims.window_chunks(window_s)
        cache = model.new_cache(1, window, num_prompt)
        state = model.new_state(voice, tokens[0, :num_prompt].tolist(), mel, slot=0)
        model.push(state, tokens[0, num_prompt:].tolist(), is_final=True)
        mels = []
        while model.can_step(state):
            mels += [made for made in model.step_rows([state], cache) if made is not None]
        error = (torch.cat(mels, dim=-1) - whole).abs()
        beyond = (window + 1 + cache.num_pinned) * dims.chunk_size * dims.frames_per_token - mel.shape[-1]
        found[f"{name}_mean"] = float(error[..., max(0, beyond) :].mean())
    model.dims = dims
    return {**found, "mel_std": float(whole.std())}


def _run(model: Flow, state: Any, cache: Any) -> None:
    while model.can_step(state):
        model.step_rows([state], cache)


def hift_rows(table: Mapping[str, Any], repeats: int) -> list[Row]:
    model = random_module("vocoder", table, _CPU, torch.float32)
    assert isinstance(model, HiftVocoder)
    to_serving_form("vocoder", model)
    mel = torch.randn(1, model.dims.in_channels, 50) - 5
    name = "HiFT, 1 s, float32"
    return _rows("vocoder", {name: "240"}, {name: lambda: model.push(mel, model.new_state(), is_final=True)}, repeats)


def encoder_rows(table: Mapping[str, Any], dtype: torch.dtype, repeats: int) -> list[Row]:
    model = random_module("encoder", table, _CPU, dtype)
    assert isinstance(model, VoiceEncoder)
    to_serving_form("encoder", model)
    frames = torch.randn(1, 167, model.dims.num_mel_bins * model.dims.lfr_m, dtype=dtype)  # 10 s at 60 ms
    queries = torch.zeros(1, 4, dtype=torch.long)
    name = f"SenseVoice-Small, 10 s, {_name(dtype)}"
    return _rows("encoder", {name: "662"}, {name: lambda: model.ctc_log_probs(model(frames, queries=queries))}, repeats)


@torch.inference_mode()
def measure(tables: Mapping[str, Any], dtypes: Sequence[torch.dtype], repeats: int, has_int8: bool = True) -> list[Row]:
    """One module after the other; the voice LM in all number formats at once, 2.5 GB."""
    rows = voice_lm_rows(tables["voice_lm"], dtypes, repeats, has_int8)
    for dtype in dtypes:
        rows += flow_rows(tables["flow"], dtype, repeats)
        rows += encoder_rows(tables["encoder"], dtype, repeats)
    return rows + hift_rows(tables["vocoder"], repeats)


def table_of(rows: Sequence[Row]) -> str:
    """For people: ours over the quoted reference, and what limits."""
    lines = [f"{'':44}{'reference ms':>14}{'ours ms':>10}{'ratio':>8}{'CPU ms':>10}  what limits it"]
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        lines.append(
            f"{row.name:<44}{row.reference_ms:>14}{row.ours_ms:>10.1f}{ratio:>8}{row.cpu_ms:>10.1f}  {row.limit}"
        )
    slower = [row.name for row in rows if row.ratio is not None and row.ratio >= 1]
    lines.append(f"not faster than the reference: {', '.join(slower) or 'none'}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Full-size parents on a CPU beside the reference")
    parser.add_argument("--profile", default=PROFILE)
    parser.add_argument("--threads", type=int, default=2, help="as the reference's machine: 2")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"], choices=("float32", "bfloat16"))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    load = round(os.getloadavg()[0], 1)
    dtypes = [getattr(torch, name) for name in arguments.dtypes]
    tables = read_profile(profile_folder(arguments.profile))
    rows = measure(tables, dtypes, arguments.repeats)
    print(f"{arguments.profile}, random weights, {arguments.threads} threads, torch {torch.__version__}, load {load}")
    print(table_of(rows))
    with torch.inference_mode():
        error, prompt = window_error(tables["flow"]), prompt_error(tables["flow"])
    print(
        f"flow in a window of {error['window_s']} s against all of the history: mel off by {error['inside_max']:.1e} "
        f"at most inside it, by {error['beyond_mean']:.3f} on average beyond (mel std {error['mel_std']:.3f})"
    )
    print(
        f"flow behind a prompt, beyond the window: mel off by {prompt['pinned_mean']:.4f} with it kept in reach, "
        f"by {prompt['not_pinned_mean']:.4f} without (mel std {prompt['mel_std']:.3f})"
    )
    found = {
        "profile": arguments.profile,
        "load": load,
        "rows": [{**vars(row), "ratio": row.ratio} for row in rows],
        "window": error,
        "prompt": prompt,
    }
    line = json.dumps(found)
    if arguments.out:
        arguments.out.write_text(line + "\n", encoding="utf-8")
    print(line)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
