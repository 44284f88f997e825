"""The output projector of the figure: what the LLM says and means, turned into semantic vectors for the voice LM.

One linear layer over [hidden ++ embedding], per sampled text token and, as a prefix, per position of the caller's
current turn (so that "please speak slowly" reaches the voice directly). Two forms, chosen by the checkpoint:
- `paper`: semantic = linear([hidden ++ embedding]).
- `residual`: semantic = text_table[id] + linear([hidden ++ embedding]), the linear zero at the start; then an untrained
  projector speaks exactly as the voice LM does from text. The caller's turn has no text to speak: its prefix is the
  linear alone.
It knows nothing of sampling or of the order of rows. Walk: step 9. Source: MinMo (arXiv 2501.06282 §3.2); `residual` is
ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minmo_runtime.model.dims import Dims

FORMS = ("paper", "residual")


@dataclass(frozen=True)
class OutputProjectorDims(Dims):
    """`llm_hidden_size` in (twice: hidden and embedding), `semantic_size` out.

    `max_query`: of a longer caller's turn, its last positions only are the prefix (the paper states no limit; 0 = no
    prefix).
    """

    llm_hidden_size: int
    semantic_size: int
    form: str = "residual"
    max_query: int = 48

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"output_projector: form {self.form!r} must be one of {', '.join(FORMS)}")


class OutputProjector(nn.Module):
    """[hidden ++ embedding] -> semantic vector."""

    def __init__(self, dims: OutputProjectorDims) -> None:
        super().__init__()
        self.dims = dims
        self.linear = nn.Linear(2 * dims.llm_hidden_size, dims.semantic_size)
        if dims.form == "residual":
            nn.init.zeros_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor, embedding: Tensor, text_rows: Tensor | None = None) -> Tensor:
        """Text tokens being said.

        hidden [..., D_llm]: the last hidden state that *sampled* each token; embedding [..., D_llm]: the token's input
        embedding; text_rows [..., D]: the voice LM's own table at the token, needed by the residual form. -> [..., D]
        """
        projected = self.linear(torch.cat([hidden, embedding], dim=-1))
        if self.dims.form == "paper":
            return projected
        assert text_rows is not None, "the residual form needs the voice LM's text rows"
        return text_rows + projected

    def query(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        """The prefix: the last `max_query` positions of the caller's current turn.

        hidden, embedding [Q, D_llm]: hidden state and input embedding at the same position. -> [<= max_query, D]
        """
        first = max(0, len(hidden) - self.dims.max_query)
        return self.linear(torch.cat([hidden[first:], embedding[first:]], dim=-1))
