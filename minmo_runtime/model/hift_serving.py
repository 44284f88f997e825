"""HiFT's residual blocks as a CPU runs them best: channels innermost, filters prepacked, the activation in place.

The same numbers as `hift.ResBlock` in another order of memory (5 % of the vocoder's time at full size, and its 72
filters then run at the pace of the processor's multipliers: 105 of 110 billion operations a second and core). Splitting
the filters further (fast FIR forms, three quarters of the multiplications) was tried and took longer. For serving only:
the weight norm must be folded. Part of step 9 of the walk.

Legend: B rows, C channels, S samples.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minmo_runtime.model.hift import HiftVocoder, ResBlock, Snake

_USUAL_SAMPLES = 400  # oneDNN lays the weights out for about that length; any may come


class _PackedFilter:
    """A Conv1d that keeps the length, on x [B, C, 1, S] with channels innermost."""

    def __init__(self, conv: nn.Conv1d) -> None:
        self.padding, self.dilation = [0, int(conv.padding[0])], [1, conv.dilation[0]]
        weight = conv.weight.detach()[:, :, None].contiguous(memory_format=torch.channels_last)
        like = [1, conv.in_channels, 1, _USUAL_SAMPLES]
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(weight, self.padding, [1, 1], self.dilation, 1, like)
        assert conv.bias is not None
        self.bias = conv.bias.detach()

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._convolution_pointwise(
            x, self.weight, self.bias, self.padding, [1, 1], self.dilation, 1, "none", [], ""
        )


class _QuickSnake:
    """x + sin²(a x) / a in four passes over memory, one of them the result."""

    def __init__(self, snake: Snake) -> None:
        self.alpha = snake.alpha.detach()[:, None, None]
        self.inverse = 1.0 / (self.alpha + 1e-9)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.addcmul(x, (x * self.alpha).sin_().square_(), self.inverse)


class PackedResBlock(nn.Module):
    """x [B, C, S] → [B, C, S], as `block` gives it."""

    def __init__(self, block: ResBlock) -> None:
        super().__init__()
        rounds = zip(block.activations1, block.convs1, block.activations2, block.convs2, strict=True)
        self.rounds = [
            (_QuickSnake(act1), _PackedFilter(conv1), _QuickSnake(act2), _PackedFilter(conv2))  # type: ignore[arg-type]
            for act1, conv1, act2, conv2 in rounds
        ]

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, None].contiguous(memory_format=torch.channels_last)
        for act1, conv1, act2, conv2 in self.rounds:
            x = conv2(act2(conv1(act1(x)))).add_(x)
        return x[:, :, 0].contiguous()


def pack_blocks(vocoder: HiftVocoder) -> HiftVocoder:
    """Every residual block in its serving form; may be called twice."""
    for blocks in (vocoder.resblocks, vocoder.source_resblocks):
        for index, block in enumerate(blocks):
            if isinstance(block, ResBlock):
                blocks[index] = PackedResBlock(block)
    return vocoder
