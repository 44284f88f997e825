"""Weights of linear layers as int8 on a CPU: one scale a row, inputs quantised as they come (torch's dynamic form).

A decode step of a large LLM on a CPU waits for its weights; a quarter of the bytes is more than twice the speed
(facts/nano.md 1). Off by default: nano holds its calls in float32, and int8 changes a few of its words. For serving on
a CPU only; it knows nothing of checkpoints. Used by the runner when `runtime.weights` says so.
"""

from __future__ import annotations

import warnings

import torch
from torch import nn


def int8_linears(module: nn.Module) -> nn.Module:
    """Replace every nn.Linear inside `module` (which must not be fused)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch moves this to another package, which does not load beside a CPU build
        return torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, dtype=torch.qint8, inplace=True)
