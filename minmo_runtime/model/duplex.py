"""The full duplex predictor of the figure: who should have the floor, every LLM audio frame.

One causal Transformer layer and a linear softmax over the LLM's hidden states ++ the projector's output (`input` =
"llm+projector"), or over the encoder's frames where no projector is trained ("encoder"). Beside the vectors it may read
facts about the turn and the last CTC pieces heard (duplex_steps.py): from encoder frames alone an end can hardly be
told from a pause. Six classes, masked by whether the agent speaks; the paper's two decisions are P(user_done) while it
is silent and P(interrupt) while it speaks. It predicts only: patience and the floor itself belong to
`agent/turn_taking`. Walk: step 8. Source: MinMo (arXiv 2501.06282 §3.4; two decisions). Classes, facts and pieces are
ours (design §4a). Streaming equals offline.

Legend: B calls, T steps (one LLM audio frame each), D input width, F facts, W pieces, C = 6 classes.
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
INPUTS = ("llm+projector", "encoder")


@dataclass(frozen=True)
class DuplexDims(Dims):
    """`input_size`: width of one step's vector; `left_context` in steps of `step_ms`; `num_facts` turn facts;
    `piece_window` last CTC pieces out of `num_pieces` (0 = none).
    """

    input_size: int
    input: str = "llm+projector"
    step_ms: int = 80
    hidden_size: int = 192
    num_heads: int = 4
    ffn_size: int = 768
    left_context: int = 100
    num_facts: int = 0
    num_pieces: int = 0
    piece_window: int = 0
    piece_size: int = 32

    def __post_init__(self) -> None:
        if self.input not in INPUTS:
            raise ValueError(f"duplex: input {self.input!r} must be one of {', '.join(INPUTS)}")
        if bool(self.num_pieces) != bool(self.piece_window):
            raise ValueError(
                f"duplex: num_pieces {self.num_pieces} and piece_window {self.piece_window} must both be 0 or neither"
            )


@dataclass
class StepInputs:
    """Inputs of T steps: `vectors` [..., T, D], `agent_speaks` [..., T] bool, `facts` [..., T, F], `pieces` [..., T,
    W] (0 = nothing heard there)."""

    vectors: Tensor
    agent_speaks: Tensor
    facts: Tensor | None = None
    pieces: Tensor | None = None


class DuplexPredictor(nn.Module):
    """Steps -> class probabilities. Whether the agent speaks is also an input (one learned vector)."""

    def __init__(self, dims: DuplexDims) -> None:
        super().__init__()
        self.dims = dims
        self.norm_in = nn.LayerNorm(dims.input_size)
        self.linear_in = nn.Linear(dims.input_size, dims.hidden_size)
        self.agent_speaks = nn.Parameter(torch.zeros(dims.hidden_size))
        self.linear_facts = nn.Linear(dims.num_facts, dims.hidden_size) if dims.num_facts else None
        self.piece_table = nn.Embedding(dims.num_pieces, dims.piece_size) if dims.num_pieces else None
        self.linear_pieces = (
            nn.Linear(dims.piece_window * dims.piece_size, dims.hidden_size) if dims.num_pieces else None
        )
        self.layer = CausalLayer(dims.hidden_size, dims.num_heads, dims.ffn_size, dims.left_context)
        self.norm_out = nn.LayerNorm(dims.hidden_size)
        self.classify = nn.Linear(dims.hidden_size, len(CLASSES))
        allowed = torch.tensor([[name in names for name in CLASSES] for names in (WHILE_SILENT, WHILE_SPEAKING)])
        self.register_buffer("allowed", allowed, persistent=False)  # [2, C]

    def init_state(self) -> LayerState:
        return self.layer.init_state()

    def forward(self, steps: StepInputs) -> Tensor:
        """Offline: [B, T, ...] -> log-probabilities [B, T, C], -inf where masked."""
        return self._classify(self.layer(self._embed(steps)), steps.agent_speaks)

    def forward_chunk(self, steps: StepInputs, state: LayerState) -> Tensor:
        """Streaming, one call: [T, ...], any T >= 0 -> [T, C]."""
        x = self.layer.forward_chunk(self._embed(steps)[None], state)[0]
        return self._classify(x, steps.agent_speaks)

    def _embed(self, steps: StepInputs) -> Tensor:
        x = self.linear_in(self.norm_in(steps.vectors)) + steps.agent_speaks[..., None] * self.agent_speaks
        if self.linear_facts is not None:
            assert steps.facts is not None, "this predictor was made with turn facts"
            x = x + self.linear_facts(steps.facts)
        if self.piece_table is not None:
            assert self.linear_pieces is not None and steps.pieces is not None, "this predictor was made with pieces"
            x = x + self.linear_pieces(self.piece_table(steps.pieces).flatten(-2))
        return x

    def _classify(self, x: Tensor, agent_speaks: Tensor) -> Tensor:
        logits = self.classify(self.norm_out(x))
        return logits.masked_fill(~self.allowed[agent_speaks.long()], -torch.inf).log_softmax(-1)
