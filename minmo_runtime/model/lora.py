"""Low-rank additions to the LLM's matrices (stage 1c): the base stays what it is, bit for bit.

`attach` adds scale * B(A(x)) to the outputs of the chosen linear layers while training; `merged` folds the same into
a state dict for serving. Keys are the layer's own with `.lora_a` and `.lora_b`. Knows nothing of what is learnt.
Source: LoRA (arXiv 2106.09685).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minmo_runtime.model.dims import Dims

# Dots are not allowed in parameter names; this stands for them inside the module.
_DOT = "__"


@dataclass(frozen=True)
class LoraDims(Dims):
    """`targets`: last names of the layers that get an addition."""

    rank: int = 16
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class Lora(nn.Module):
    """The additions of one base module; A random, B zero: at the start nothing changes."""

    def __init__(self, base: nn.Module, dims: LoraDims, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.dims = dims
        self.tensors = nn.ParameterDict()
        for name, layer in base.named_modules():
            if isinstance(layer, nn.Linear) and name.rsplit(".", 1)[-1] in dims.targets:
                key = name.replace(".", _DOT)
                a = torch.randn(dims.rank, layer.in_features, generator=generator) * layer.in_features**-0.5
                self.tensors[f"{key}{_DOT}lora_a"] = nn.Parameter(a)
                self.tensors[f"{key}{_DOT}lora_b"] = nn.Parameter(torch.zeros(layer.out_features, dims.rank))

    def attach(self, base: nn.Module) -> None:
        """From now on the base's layers add ours to their outputs (the base must not be fused)."""
        for name, layer in base.named_modules():
            key = name.replace(".", _DOT)
            if f"{key}{_DOT}lora_a" in self.tensors:
                layer.register_forward_hook(self._hook(key))

    def _hook(self, key: str):  # type: ignore[no-untyped-def]  # a torch forward hook
        def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            a, b = self.tensors[f"{key}{_DOT}lora_a"], self.tensors[f"{key}{_DOT}lora_b"]
            down = nn.functional.linear(inputs[0], a)
            return output + self.dims.scale * nn.functional.linear(down, b)

        return add

    def export(self) -> dict[str, Tensor]:
        """Tensors under the base's own names."""
        return {name.replace(_DOT, "."): tensor.detach() for name, tensor in self.tensors.items()}


def merged(base: Mapping[str, Tensor], lora: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The base's state dict with the additions folded in; the base's own tensors are not touched."""
    out = dict(base)
    for name, a in lora.items():
        if name.endswith(".lora_a"):
            layer = name.removesuffix(".lora_a")
            addition = scale * (lora[f"{layer}.lora_b"].float() @ a.float())
            out[f"{layer}.weight"] = (base[f"{layer}.weight"].float() + addition).to(base[f"{layer}.weight"].dtype)
    return out
