"""The sizes of the flow (model/flow.py), as a checkpoint's table `[flow]` gives them, and what follows from them.

Source: CosyVoice 2's configuration, as described in facts/minmo.md 2.2; the mean as a start is ours.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from minmo_runtime.model.dims import Dims
from minmo_runtime.model.flow_encoder import FlowEncoderDims
from minmo_runtime.model.flow_estimator import FlowEstimatorDims


@dataclass(frozen=True)
class FlowDims(Dims):
    """Table `[flow]` of a checkpoint, with sub-tables `encoder` and `estimator`."""

    vocab_size: int = 6561
    spk_embed_dim: int = 192
    num_mel_bins: int = 80
    token_rate_hz: float = 25.0
    n_timesteps: int = 10
    t_scheduler: str = "cosine"
    inference_cfg_rate: float = 0.7
    sigma_min: float = 1e-6
    mean_weight: float = 0.0
    noise_scale: float = 1.0
    left_context_s: float = -1.0
    prompt_context_s: float = 4.0  # of a prompt, in reach beyond a bounded left context
    chunk_tokens: int = 0  # 0: the encoder's own static_chunk_size (CosyVoice 2: 25; MinMo: 15)
    encoder: FlowEncoderDims = field(default_factory=FlowEncoderDims)
    estimator: FlowEstimatorDims = field(default_factory=FlowEstimatorDims)

    def __post_init__(self) -> None:
        if self.chunk_tokens:
            encoder = dataclasses.replace(self.encoder, static_chunk_size=self.chunk_tokens)
            object.__setattr__(self, "encoder", encoder)
        if self.t_scheduler not in ("cosine", "linear"):
            raise ValueError(f"flow: t_scheduler {self.t_scheduler!r} must be cosine or linear")
        if self.n_timesteps == 0 and self.mean_weight == 0:
            raise ValueError("flow: n_timesteps 0 speaks the mean; mean_weight 0 says that the mean was not trained")

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> FlowDims:
        table = dict(table)
        table["encoder"] = FlowEncoderDims.from_dict(table.get("encoder", {}))
        table["estimator"] = FlowEstimatorDims.from_dict(table.get("estimator", {}))
        known = {item.name for item in dataclasses.fields(cls)}
        if unknown := sorted(set(table) - known):
            raise ValueError(f"FlowDims: unknown key {', '.join(unknown)}; allowed: {', '.join(sorted(known))}")
        return cls(**table)

    @property
    def num_left_chunks(self) -> int:
        """Whole chunks of left context; -1 = all."""
        if self.left_context_s < 0:
            return -1
        return round(self.left_context_s * self.token_rate_hz / self.chunk_size)

    @property
    def frames_per_token(self) -> int:
        return self.encoder.up_stride

    @property
    def chunk_size(self) -> int:
        """Tokens of one chunk."""
        return self.encoder.static_chunk_size

    def pinned_chunks(self, num_prompt_tokens: int) -> int:
        """Chunks at a turn's beginning that hold its prompt's speech and stay in reach."""
        bound = int(self.prompt_context_s * self.token_rate_hz / self.chunk_size)
        return min(bound, math.ceil(num_prompt_tokens / self.chunk_size))

    def window_chunks(self, max_s: float) -> int:
        """Whole chunks of left context in service: what it was trained with, at most `max_s`."""
        bound = int(max_s * self.token_rate_hz / self.chunk_size)
        return bound if self.num_left_chunks < 0 else min(bound, self.num_left_chunks)
