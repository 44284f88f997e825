"""A prompt voice's own chunks through the flow, run once and copied into every later turn.

A turn that continues a prompt begins with the prompt's speech: four seconds of it are seven chunks of ten Euler steps
before the first new frame. None of that depends on what is said behind it (whole chunks, look-ahead included, fixed
noise), so the first turn that has passed the prompt leaves a copy of its left context, and the next ones begin there.
A second of prompt costs 115 MB once in this copy and once in every call that speaks. Part of step 9 of the walk.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from minmo_runtime.model.flow import Flow
from minmo_runtime.model.flow_cache import FlowCache, SlotCopy
from minmo_runtime.model.flow_state import FlowState


class FlowPrompt:
    """Tokens and mel [1, M, 2 N] of the prompt, spoken by `embedding` [1, spk_embed_dim]. Owned by the sound jobs."""

    def __init__(self, flow: Flow, tokens: Sequence[int], mel: Tensor, embedding: Tensor) -> None:
        self.flow, self.tokens, self.mel, self.embedding = flow, list(tokens), mel, embedding
        dims = flow.dims
        # Chunks that see nothing but the prompt.
        self.num_chunks = max(0, len(self.tokens) - dims.encoder.pre_lookahead_len) // dims.chunk_size
        self.kept: SlotCopy | None = None

    def new_state(self, cache: FlowCache, slot: int) -> FlowState:
        """A turn behind the prompt, in a slot that nobody uses."""
        state = self.flow.new_state(self.embedding, self.tokens, self.mel, slot=slot)
        if self.kept is not None:
            dims = self.flow.dims
            cache.paste(self.kept, slot)
            del state.tokens[: self.num_chunks * dims.chunk_size]
            state.num_chunks = self.num_chunks
            state.frames_done = self.num_chunks * dims.chunk_size * dims.frames_per_token
            state.frames_to_skip = max(0, state.frames_to_skip - state.frames_done)
        return state

    def look_at(self, state: FlowState, cache: FlowCache) -> None:
        """After each job of a turn: keep what the first one has when it has just passed the prompt."""
        is_there = state.num_chunks == self.num_chunks > 0 and state.chunk is None
        if self.kept is None and is_there and state.prompt_mel is self.mel:
            copy = cache.copy(state.slot)
            self.kept = copy if copy.is_finite() else None
