"""The flow's Euler step and the vocoder's piece for many calls at once: in fixed shapes (one CUDA graph each) and
eagerly.

Every call is behind a full window of left context, all at the same Euler step, and each pass is the same one again.
Random weights. Times are of whole passes, so a call's second of speech costs `euler_ms` / rows times the Euler steps
and the chunks in a second.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from minmo_runtime.bench.gpu.decode import milliseconds
from minmo_runtime.model.fixed_shapes import FixedCalls
from minmo_runtime.model.flow import Flow
from minmo_runtime.model.flow_cache import FlowCache
from minmo_runtime.model.flow_state import FlowState
from minmo_runtime.model.vocoder import Vocoder, push_rows

WINDOW_S = 2.0


@torch.inference_mode()
def measure(flow: Flow, vocoder: Vocoder, device: torch.device, batches: tuple[int, ...]) -> dict[str, Any]:
    """rows → milliseconds of one pass."""
    return {
        str(rows): {
            **{f"euler{name}_ms": _euler_ms(flow, rows, device, fixed) for name, fixed in _forms(device)},
            **{f"vocoder{name}_ms": _vocoder_ms(flow, vocoder, rows, device, fixed) for name, fixed in _forms(device)},
        }
        for rows in batches
    }


def _forms(device: torch.device) -> list[tuple[str, FixedCalls | None]]:
    return [("", FixedCalls(has_graphs=device.type == "cuda")), ("_eager", None)]


def _euler_ms(flow: Flow, rows: int, device: torch.device, fixed: FixedCalls | None) -> float | None:
    """None for a flow that speaks its mean: it has no Euler step."""
    if not flow.dims.n_timesteps:
        return None
    cache = flow.new_cache(rows + 1, flow.dims.window_chunks(WINDOW_S))
    cache.fixed = fixed
    states = _behind_a_window(flow, cache, rows, device)
    kept = [dataclasses.replace(state.chunk) for state in states if state.chunk is not None]
    num_chunks = states[0].num_chunks

    def step() -> None:
        for state, chunk in zip(states, kept, strict=True):
            state.chunk, state.num_chunks = dataclasses.replace(chunk), num_chunks
        flow.step_rows(states, cache)

    return round(milliseconds(step, device), 3)


def _behind_a_window(flow: Flow, cache: FlowCache, rows: int, device: torch.device) -> list[FlowState]:
    """Turns that have just encoded the first chunk whose whole window is filled."""
    dims = flow.dims
    voice = torch.zeros(1, dims.spk_embed_dim, device=device, dtype=flow.encoder_proj.weight.dtype)
    states = [flow.new_state(voice, slot=slot) for slot in range(rows)]
    for state in states:
        flow.push(state, [1] * ((cache.num_left_chunks + 1) * dims.chunk_size + dims.encoder.pre_lookahead_len))
    while states[0].chunk is None or states[0].num_chunks < cache.num_left_chunks:
        flow.step_rows(states, cache)
    return states


def _vocoder_ms(flow: Flow, vocoder: Vocoder, rows: int, device: torch.device, fixed: FixedCalls | None) -> float:
    frames = flow.dims.chunk_size * flow.dims.frames_per_token
    mels = [torch.zeros(1, flow.dims.num_mel_bins, frames, device=device) - 5.0] * rows

    def piece() -> None:
        push_rows(vocoder, mels, [vocoder.new_state() for _ in mels], [False] * rows, fixed)

    return round(milliseconds(piece, device), 3)
