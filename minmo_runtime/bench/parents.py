"""`python -m minmo_runtime.bench.parents`: the full-size public parents on a CPU, one module at a time, beside the
parents' own code.

The reference figures are those of issue 3, taken on two cores with float32 and the public code: a voice LM step, the
flow's first second of speech and one with three seconds before it (the reference runs the whole history again), one
second of HiFT, ten seconds of SenseVoice-Small. Ours runs the same sizes with random weights through the serving forms.
Each row is the median of `--repeats`; wall time, as the reference's; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
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
    ours_ms: float


def milliseconds(job: Callable[[], object], repeats: int, prepare: Callable[[], object] = lambda: None) -> float:
    times = []
    for _ in range(repeats + 1):
        prepare()
        begin = time.perf_counter()
        job()
        times.append(1000 * (time.perf_counter() - begin))
    return round(statistics.median(times[1:]), 1)


def voice_lm_rows(table: Mapping[str, Any], dtype: torch.dtype, repeats: int, has_int8: bool) -> list[Row]:
    rows = []
    for name in ("int8", str(dtype).removeprefix("torch.")) if has_int8 else (str(dtype).removeprefix("torch."),):
        model = random_module("voice_lm", table, _CPU, torch.float32 if name == "int8" else dtype)
        assert isinstance(model, VoiceLm)
        to_serving_form("voice_lm", model, "int8" if name == "int8" else "as_stored")
        cache = model.new_cache(1, CONTEXT + 8)
        row = torch.zeros(1, 1, model.dims.hidden_size, dtype=torch.float32 if name == "int8" else dtype)

        def step(model: VoiceLm = model, cache: Any = cache, row: torch.Tensor = row) -> None:
            cache.lengths[0] = CONTEXT
            model.llm_decoder(model.trunk(embeds=row, cache=cache))

        rows.append(Row(f"voice LM, one step, {name}", "131-170", milliseconds(step, 5 * repeats)))
    return rows


def flow_rows(table: Mapping[str, Any], dtype: torch.dtype, repeats: int, chunk_tokens: int = 25) -> list[Row]:
    """One second of speech, as the reference's streaming form makes it: a chunk of 25 tokens and 3 ahead."""
    model = random_module("flow", {**table, "chunk_tokens": chunk_tokens, "left_context_s": -1.0}, _CPU, dtype)
    assert isinstance(model, Flow)
    to_serving_form("flow", model)
    dims = model.dims
    per_second = round(dims.token_rate_hz)
    voice = torch.randn(1, dims.spk_embed_dim, dtype=dtype)
    reference = {0: "2000", 3: "5700"}
    rows = []
    for seconds in HISTORY_S:
        cache = model.new_cache(1, dims.window_chunks(2.0))
        state = model.new_state(voice, slot=0)
        ahead = dims.encoder.pre_lookahead_len
        model.push(state, [1] * (seconds * per_second + ahead))
        _run(model, state, cache)
        before = state.num_chunks, state.frames_done

        def prepare(state: Any = state, before: tuple[int, int] = before, count: int = per_second + ahead) -> None:
            state.num_chunks, state.frames_done = before  # the ring still holds that history: the same chunk again
            state.tokens = [1] * count

        name = f"flow, 1 s of speech after {seconds} s, {str(dtype).removeprefix('torch.')}"
        ours = milliseconds(lambda state=state, cache=cache: _run(model, state, cache), repeats, prepare)
        rows.append(Row(name, reference.get(seconds, "more"), ours))
    return rows


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


def _run(model: Flow, state: Any, cache: Any) -> None:
    while model.can_step(state):
        model.step_rows([state], cache)


def hift_rows(table: Mapping[str, Any], repeats: int) -> list[Row]:
    model = random_module("vocoder", table, _CPU, torch.float32)
    assert isinstance(model, HiftVocoder)
    to_serving_form("vocoder", model)
    mel = torch.randn(1, model.dims.in_channels, 50) - 5
    with torch.inference_mode():
        ours = milliseconds(lambda: model.push(mel, model.new_state(), is_final=True), repeats)
    return [Row("HiFT, 1 s, float32", "240", ours)]


def encoder_rows(table: Mapping[str, Any], dtype: torch.dtype, repeats: int) -> list[Row]:
    model = random_module("encoder", table, _CPU, dtype)
    assert isinstance(model, VoiceEncoder)
    to_serving_form("encoder", model)
    frames = torch.randn(1, 167, model.dims.num_mel_bins * model.dims.lfr_m, dtype=dtype)  # 10 s at 60 ms
    queries = torch.zeros(1, 4, dtype=torch.long)
    with torch.inference_mode():
        ours = milliseconds(lambda: model.ctc_log_probs(model(frames, queries=queries)), repeats)
    return [Row(f"SenseVoice-Small, 10 s, {str(dtype).removeprefix('torch.')}", "662", ours)]


@torch.inference_mode()
def measure(tables: Mapping[str, Any], dtypes: Sequence[torch.dtype], repeats: int, has_int8: bool = True) -> list[Row]:
    """One module after the other: at most one is in memory."""
    rows: list[Row] = []
    for index, dtype in enumerate(dtypes):
        rows += voice_lm_rows(tables["voice_lm"], dtype, repeats, has_int8 and not index)
        rows += flow_rows(tables["flow"], dtype, repeats)
        rows += encoder_rows(tables["encoder"], dtype, repeats)
    return rows + hift_rows(tables["vocoder"], repeats)


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
    print(f"{'':44}{'reference ms':>14}{'ours ms':>10}")
    for row in rows:
        print(f"{row.name:<44}{row.reference_ms:>14}{row.ours_ms:>10.1f}")
    with torch.inference_mode():
        error = window_error(tables["flow"])
    print(
        f"flow in a window of {error['window_s']} s against all of the history: mel off by {error['inside_max']:.1e} "
        f"at most inside it, by {error['beyond_mean']:.3f} on average beyond (mel std {error['mel_std']:.3f})"
    )
    found = {"profile": arguments.profile, "load": load, "rows": [vars(row) for row in rows], "window": error}
    line = json.dumps(found)
    if arguments.out:
        arguments.out.write_text(line + "\n", encoding="utf-8")
    print(line)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
