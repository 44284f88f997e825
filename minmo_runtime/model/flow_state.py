"""What the flow (model/flow.py) keeps of one turn between its jobs.

Legend: M mel bins, T mel frames.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from minmo_runtime.model.flow_cache import GrowingCache


@dataclass(eq=False)  # one is itself only
class FlowState:
    """One turn of one call. Owner: whoever calls `push` and `step`; the model writes it."""

    speaker: Tensor  # [1, M]
    prompt_mel: Tensor | None = None  # [1, M, T] condition at the start
    tokens: list[int] = field(default_factory=list)  # not yet encoded
    is_final: bool = False
    frames_done: int = 0  # mel frames made or in work, prompt included
    frames_to_skip: int = 0  # of the prompt, never handed out
    num_chunks: int = 0  # finished
    num_pinned: int = 0  # chunks at the beginning that stay in reach: the prompt's
    slot: int = -1  # of the FlowCache; -1: the left context is here
    encoder_cache: GrowingCache = field(default_factory=GrowingCache)
    estimator_caches: list[GrowingCache] = field(default_factory=list)  # one per Euler step
    chunk: ChunkInWork | None = None


@dataclass(eq=False)
class ChunkInWork:
    """A chunk between its encoding and its last Euler step."""

    mu: Tensor  # [1, M, T]; of step_rows always as wide as a full chunk
    x: Tensor  # [1, M, T]
    condition: Tensor  # [1, M, T]
    num_steps_done: int = 0
    num_frames: int = 0  # real ones of T
