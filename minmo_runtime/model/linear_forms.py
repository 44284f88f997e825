"""Forms that a linear layer takes in service, with the same numbers in another order or in fewer bits.

- `PackedLinear`: weights in oneDNN's own order, made once instead of at each call. On a CPU many rows at once (encoder,
  flow) take a quarter less time, and bfloat16 rows a third of it.
- `by_columns`: float32 weights much wider than high, stored column by column: one row of a decode step then reads them
  at the memory's pace (facts in docs/performance.md).
- `Fp8Linear`: 8-bit floats (e4m3), one scale a row of the weight and one a row of the input; on a GPU that multiplies
  them itself by `torch._scaled_mm`, elsewhere the same numbers multiplied as floats.

All are for serving: nothing here is trained or saved. Which form is used where stands in serving_form.py. Part of
steps 8 and 9 of the walk. Source of the 8-bit format: arXiv 2209.05433; of the packed operator: torch's own CPU
compiler, which calls it for every linear layer.

Legend: B rows, T positions, D inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

# weight [N, D] and bias [N] or None → [..., D] -> [..., N]
Joined = Callable[[Tensor], Tensor]
_PACKED_ROWS = 64  # oneDNN lays weights out for about that many rows at once; any number may come
_WIDE = 2  # times as many outputs as inputs
_FEWEST_BY_COLUMNS = 1 << 20  # smaller ones are read from the processor's cache
_FP8_MAX = 448.0  # of e4m3
_NEEDED_BY_SCALED_MM = 16  # widths it wants to be multiples of


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this build of torch, on this processor, has the packed product for `dtype`."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


class PackedLinear(nn.Module):
    """nn.Linear on a CPU with prepacked weights. `weight` is opaque: only its device and dtype may be asked."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _PACKED_ROWS)
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class PlainLinear(nn.Module):
    """nn.Linear of weights that are somewhere already."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


def by_columns(weight: Tensor) -> Tensor:
    """The same [N, D], stored column by column if it is large and wide."""
    is_wide = weight.shape[0] >= _WIDE * weight.shape[1] and weight.numel() >= _FEWEST_BY_COLUMNS
    return weight.t().contiguous().t() if is_wide and weight.dtype == torch.float32 else weight


def scaled_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """[..., D] → the same in e4m3, and the scale of each row [..., 1] that brings it back."""
    scale = (x.float().abs().amax(dim=-1, keepdim=True) / _FP8_MAX).clamp(min=1e-12)
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


class Fp8Linear(nn.Module):
    """Weights in 8 bits, inputs rounded to 8 bits as they come; sums in float32."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.scale = scaled_fp8(weight.detach())  # [N, D], [N, 1]
        self.bias = None if bias is None else bias.detach()
        self.is_native = has_scaled_mm(weight)

    def forward(self, x: Tensor) -> Tensor:
        rounded, scale = scaled_fp8(x.flatten(0, -2))  # [B * T, D], [B * T, 1]
        if self.is_native:
            made = torch._scaled_mm(
                rounded, self.weight.t(), scale_a=scale, scale_b=self.scale.t(), out_dtype=torch.bfloat16
            ).to(x.dtype)
        else:
            made = (rounded.float() @ self.weight.t().float() * scale * self.scale.t()).to(x.dtype)
        if self.bias is not None:
            made = made + self.bias
        return made.unflatten(0, x.shape[:-1])


def has_scaled_mm(weight: Tensor) -> bool:
    """Whether the device multiplies 8-bit floats with a scale a row: NVIDIA from compute capability 9.0 on."""
    if weight.device.type != "cuda" or any(size % _NEEDED_BY_SCALED_MM for size in weight.shape):
        return False
    return torch.cuda.get_device_capability(weight.device) >= (9, 0)


def replace_linears(module: nn.Module, make: Callable[[Tensor, Tensor | None], nn.Module], fewest: int) -> nn.Module:
    """Every nn.Linear inside `module` with at least `fewest` weights becomes `make(weight, bias)`."""
    for name, child in module.named_children():
        if not isinstance(child, nn.Linear):
            replace_linears(child, make, fewest)
        elif child.weight.numel() >= fewest:
            setattr(module, name, make(child.weight, child.bias))
    return module
