"""The full duplex predictor of the figure: who should have the floor, every LLM audio frame.

One causal Transformer layer and a linear softmax over the LLM's hidden states (nano: ++ the projector's output). Six
classes, masked by whether the agent speaks; the paper's two decisions are P(user_done) while it is silent and
P(interrupt) while it speaks. It predicts only: thresholds, patience and the floor itself belong to `agent/turn_taking`.
Walk: step 8. Source: MinMo (arXiv 2501.06282 §3.4; two decisions). The six classes are ours (design §4a). Streaming
equals offline.

Legend: B calls, T LLM audio frames, D input width, C = 6 classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minmo_runtime.model.causal_transformer import CausalLayer, LayerState
from minmo_runtime.model.dims import Dims

CLASSES = ("idle", "user_continues", "user_done", "user_waits", "backchannel", "interrupt")
WHILE_SILENT = ("idle", "user_continues", "user_done", "user_waits")
WHILE_SPEAKING = ("idle", "backchannel", "interrupt")


@dataclass(frozen=True)
class DuplexDims(Dims):
    """`input_size`: LLM hidden, plus the projector's width where the checkpoint uses it; `left_context` in LLM audio
    frames.
    """

    input_size: int
    hidden_size: int = 192
    num_heads: int = 4
    ffn_size: int = 768
    left_context: int = 100


class DuplexPredictor(nn.Module):
    """Inputs and who speaks -> class probabilities. Whether the agent speaks is also an input (one learned vector)."""

    def __init__(self, dims: DuplexDims) -> None:
        super().__init__()
        self.dims = dims
        self.norm_in = nn.LayerNorm(dims.input_size)
        self.linear_in = nn.Linear(dims.input_size, dims.hidden_size)
        self.agent_speaks = nn.Parameter(torch.zeros(dims.hidden_size))
        self.layer = CausalLayer(dims.hidden_size, dims.num_heads, dims.ffn_size, dims.left_context)
        self.norm_out = nn.LayerNorm(dims.hidden_size)
        self.classify = nn.Linear(dims.hidden_size, len(CLASSES))
        allowed = torch.tensor([[name in names for name in CLASSES] for names in (WHILE_SILENT, WHILE_SPEAKING)])
        self.register_buffer("allowed", allowed, persistent=False)  # [2, C]

    def init_state(self) -> LayerState:
        return self.layer.init_state()

    def forward(self, inputs: Tensor, agent_speaks: Tensor) -> Tensor:
        """Offline: inputs [B, T, D], agent_speaks [B, T] bool -> log-probabilities [B, T, C], -inf where masked."""
        return self._classify(self.layer(self._embed(inputs, agent_speaks)), agent_speaks)

    def forward_chunk(self, inputs: Tensor, agent_speaks: Tensor, state: LayerState) -> Tensor:
        """Streaming, one call: [T, D], [T] bool, any T >= 0 -> [T, C]."""
        x = self.layer.forward_chunk(self._embed(inputs, agent_speaks)[None], state)[0]
        return self._classify(x, agent_speaks)

    def _embed(self, inputs: Tensor, agent_speaks: Tensor) -> Tensor:
        return self.linear_in(self.norm_in(inputs)) + agent_speaks[..., None] * self.agent_speaks

    def _classify(self, x: Tensor, agent_speaks: Tensor) -> Tensor:
        logits = self.classify(self.norm_out(x))
        return logits.masked_fill(~self.allowed[agent_speaks.long()], -torch.inf).log_softmax(-1)
