"""Which form the weights of each part take for serving: by device, number format and `runtime.weights`.

Called once by the runner, and by the benches, so that they measure what serves. Small layers (nano's) stay as they are:
one row of a weight that sits in the processor's cache gains nothing from another order. Knows the parts by their names
in a checkpoint and nothing of files. Before step 8 of the walk; the forms are in model/linear_forms.py and quantise.py.
"""

from __future__ import annotations

import torch
from torch import nn

from minmo_runtime.model.backbone import Backbone
from minmo_runtime.model.flow import Flow
from minmo_runtime.model.flow_estimator import SelfAttention
from minmo_runtime.model.hift import HiftVocoder
from minmo_runtime.model.hift_serving import pack_blocks
from minmo_runtime.model.linear_forms import Fp8Linear, PackedLinear, PlainLinear, by_columns, can_pack, replace_linears
from minmo_runtime.model.voice_lm import VoiceLm
from minmo_runtime.quantise import int8_linears

_FEWEST_PACKED = 1 << 18  # weights of one layer


@torch.no_grad()
def to_serving_form(part: str, module: nn.Module, weights: str = "as_stored") -> nn.Module:
    """Change `module`, which is on its device and in its number format already; may be called twice."""
    parameter = next(module.parameters())
    is_packable = parameter.device.type == "cpu" and can_pack(parameter.dtype)
    if isinstance(module, (Backbone, VoiceLm)):
        trunk = module.trunk if isinstance(module, VoiceLm) else module
        _language_model(trunk, weights, is_packable and parameter.dtype == torch.bfloat16)
        if isinstance(module, VoiceLm) and parameter.device.type == "cpu":
            module.llm_decoder.weight.data = by_columns(module.llm_decoder.weight.data)
    elif isinstance(module, Flow):
        _flow(module, is_packable)
    elif part == "encoder" and is_packable:
        replace_linears(module, PackedLinear, _FEWEST_PACKED)
    elif isinstance(module, HiftVocoder) and is_packable:
        pack_blocks(module)
    return module


def _flow(flow: Flow, is_packable: bool) -> None:
    """Its attention blocks are small and many: one product for query, key and value, if they are large enough."""
    for block in flow.decoder.estimator.modules():
        if isinstance(block, SelfAttention) and block.fused is None:
            is_large = 3 * block.to_q.weight.numel() >= _FEWEST_PACKED
            block.fuse(PackedLinear if is_packable and is_large else PlainLinear)
    if is_packable:
        replace_linears(flow, PackedLinear, _FEWEST_PACKED)


def _language_model(trunk: Backbone, weights: str, is_packed: bool) -> None:
    """A decode step reads every weight for a few rows: fewer bytes and one long read are what counts."""
    if weights == "int8":
        int8_linears(trunk.model.layers)
    elif weights == "fp8":
        trunk.fuse(Fp8Linear)
    else:
        trunk.fuse(PackedLinear if is_packed else None)
