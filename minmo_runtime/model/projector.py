"""The input projector of the figure: encoder frames (25 Hz) to LLM input vectors (12.5 Hz).

Two causal Transformer layers at the encoder's width, then one convolution that halves the rate and changes the width.
The paper gives these counts and the factor 2 and nothing else: kernel, memory and widths are ours (data of the
checkpoint). Optionally the CTC posteriors of the same frames come in through a table of piece vectors: then the
untrained projector already points at the words that were heard (ours; 0 pieces = off). Streaming equals offline for any
chunk sizes.
Walk: step 8. Source: MinMo (arXiv 2501.06282, Table 1 and §3.1).

Legend: B calls, T encoder frames, D_in encoder width, D LLM width, V CTC pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minmo_runtime.model.causal_transformer import CausalLayer, LayerState
from minmo_runtime.model.dims import Dims


@dataclass(frozen=True)
class ProjectorDims(Dims):
    """`left_context` in encoder frames per layer; `kernel_size` of the convolution (looking back only); `num_pieces`
    CTC pieces.
    """

    encoder_size: int
    llm_hidden_size: int
    num_layers: int = 2
    num_heads: int = 4
    ffn_size: int = 768
    left_context: int = 80
    kernel_size: int = 4
    downsample: int = 2
    num_pieces: int = 0


@dataclass
class ProjectorState:
    """One call's memory: per layer, and the convolution's last inputs [1, D_in, <= kernel - 1] with the phase of its
    stride.
    """

    layers: list[LayerState]
    tail: Tensor
    pieces: Tensor


class InputProjector(nn.Module):
    """Encoder frames -> LLM input vectors; one vector per `downsample` frames, given out when its last frame is
    there.
    """

    def __init__(self, dims: ProjectorDims) -> None:
        super().__init__()
        self.dims = dims
        self.layers = nn.ModuleList(
            [
                CausalLayer(dims.encoder_size, dims.num_heads, dims.ffn_size, dims.left_context)
                for _ in range(dims.num_layers)
            ]
        )
        self.conv = nn.Conv1d(dims.encoder_size, dims.llm_hidden_size, dims.kernel_size, stride=dims.downsample)
        self.piece_table = nn.Parameter(torch.zeros(dims.num_pieces, dims.llm_hidden_size)) if dims.num_pieces else None

    @property
    def _pad(self) -> int:
        # With this much zero padding on the left, output i ends exactly at frame downsample * (i + 1) - 1.
        return self.dims.kernel_size - self.dims.downsample

    def init_state(self) -> ProjectorState:
        tail = self.conv.weight.new_zeros(1, self.dims.encoder_size, self._pad)
        return ProjectorState(
            [layer.init_state() for layer in self.layers], tail, tail.new_zeros(0, self.dims.num_pieces)
        )

    def forward(self, frames: Tensor, posteriors: Tensor | None = None) -> Tensor:
        """Offline: [B, T, D_in] (right padding allowed), posteriors [B, T, V] -> [B, T // downsample, D]."""
        x = frames
        for layer in self.layers:
            x = layer(x)
        x = self.conv(nn.functional.pad(x.transpose(1, 2), (self._pad, 0))).transpose(1, 2)
        if self.piece_table is not None:
            assert posteriors is not None, "this projector was made with CTC pieces"
            x = x + self._words(posteriors[:, : x.shape[1] * self.dims.downsample])
        return x

    def forward_chunk(self, frames: Tensor, state: ProjectorState, posteriors: Tensor | None = None) -> Tensor:
        """Streaming, one call: [T, D_in], any T >= 0 -> the [n, D] vectors that are complete now."""
        x = frames[None]
        for layer, layer_state in zip(self.layers, state.layers, strict=True):
            x = layer.forward_chunk(x, layer_state)
        return self._convolve(x, state, posteriors)

    def _convolve(self, x: Tensor, state: ProjectorState, posteriors: Tensor | None) -> Tensor:
        """[1, T, D_in] behind the layers -> [n, D]; the state's memory of the convolution moves on."""
        x = torch.cat([state.tail, x.transpose(1, 2)], dim=2)
        num_out = max(0, (x.shape[2] - self.dims.kernel_size) // self.dims.downsample + 1)
        state.tail = x[:, :, num_out * self.dims.downsample :]
        if self.piece_table is not None:
            assert posteriors is not None, "this projector was made with CTC pieces"
            state.pieces = torch.cat([state.pieces, posteriors])
        if not num_out:
            return x.new_zeros(0, self.dims.llm_hidden_size)
        out = self.conv(x)[0].transpose(0, 1)[:num_out]
        if self.piece_table is not None:
            used = num_out * self.dims.downsample
            out = out + self._words(state.pieces[None, :used])[0]
            state.pieces = state.pieces[used:]
        return out

    def forward_rows(
        self, frames: Tensor, states: Sequence[ProjectorState], posteriors: Tensor
    ) -> tuple[list[Tensor], list[ProjectorState]]:
        """Streaming, one chunk of each of B calls: [B, T, D_in] and [B, T, V] -> their complete vectors, [n, D] each,
        and the states after it; none is changed."""
        x, layers = frames, []
        for number, layer in enumerate(self.layers):
            x, after = layer.forward_rows(x, [state.layers[number] for state in states])
            layers.append(after)
        vectors, after_rows = [], []
        for row, state in enumerate(states):
            own = ProjectorState([after[row] for after in layers], state.tail, state.pieces)
            vectors.append(self._convolve(x[row : row + 1], own, posteriors[row]))
            after_rows.append(own)
        return vectors, after_rows

    def _words(self, posteriors: Tensor) -> Tensor:
        """Piece vectors weighted by the posteriors, summed over the frames of one output. The blank's row (0) stays
        zero.
        """
        pooled = posteriors[..., 1:].unflatten(1, (-1, self.dims.downsample)).sum(2)
        return pooled @ self.piece_table[1:]  # type: ignore[index]  # callers checked that the table is there
