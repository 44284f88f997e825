"""Weights in the forms that serve give what the plain layers give; 8-bit ones stay close."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from minmo_runtime.model.backbone import Backbone
from minmo_runtime.model.dims import BackboneDims
from minmo_runtime.model.hift import HiftDims, HiftVocoder, ResBlock
from minmo_runtime.model.linear_forms import (
    Fp8Linear,
    PackedLinear,
    by_columns,
    can_pack,
    has_scaled_mm,
    replace_linears,
    scaled_fp8,
)
from minmo_runtime.random_checkpoint import TINY
from minmo_runtime.serving_form import to_serving_form
from minmo_runtime.weights import module_of

DIMS = BackboneDims(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    vocab_size=60,
)
IDS = torch.arange(24).reshape(2, 12)
needs_packed = pytest.mark.skipif(not can_pack(torch.float32), reason="this torch has no oneDNN")


def backbone() -> Backbone:
    torch.manual_seed(0)
    return Backbone(DIMS).eval().requires_grad_(False)


@needs_packed
@torch.inference_mode()
def test_packed_layers_equal_plain_ones_for_any_number_of_rows() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 8, bias=False))
    packed = replace_linears(copy.deepcopy(plain), PackedLinear, fewest=0)
    assert all(isinstance(layer, PackedLinear) for layer in packed)
    for shape in ((1, 24), (3, 24), (2, 70, 24), (2, 5, 24)):
        x = torch.randn(shape).transpose(0, -2).contiguous().transpose(0, -2)  # not contiguous where it can be
        torch.testing.assert_close(packed(x), plain(x), atol=1e-5, rtol=0)


@needs_packed
def test_small_layers_stay_as_they_are() -> None:
    layers = replace_linears(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 100)), PackedLinear, fewest=500)
    assert [type(layer) for layer in layers] == [nn.Linear, PackedLinear]


def test_only_large_wide_weights_are_stored_by_columns() -> None:
    wide, high = torch.randn(2048, 512), torch.randn(512, 2048)
    assert by_columns(wide).stride() == (1, 2048) and torch.equal(by_columns(wide), wide)
    assert by_columns(high) is high and by_columns(wide[:64]).stride() == (512, 1)


@torch.inference_mode()
def test_a_fused_model_holds_its_weights_once_and_can_be_fused_again() -> None:
    model = backbone()
    wanted = model(IDS)
    for _ in range(2):
        model.fuse()
        torch.testing.assert_close(model(IDS), wanted, atol=1e-5, rtol=0)
    mlp = model.model.layers[0].mlp
    assert mlp.gate_proj.weight.untyped_storage().data_ptr() == mlp.up_proj.weight.untyped_storage().data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_a_language_model_of_packed_layers_says_the_same(dtype: torch.dtype) -> None:
    if not can_pack(dtype):
        pytest.skip(f"this processor has no packed {dtype}")
    model = backbone().to(dtype)
    wanted = model(IDS).float()
    for _ in range(2):  # the second time changes nothing
        model.fuse(PackedLinear)
    bound = 1e-5 if dtype == torch.float32 else 0.05
    assert float((model(IDS).float() - wanted).abs().max()) < bound
    assert model.model.layers[0].mlp.gate_proj is None, "the plain weights are let go"


def test_eight_bits_keep_three_binary_digits_whatever_the_row_s_size() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 64) * torch.tensor([1e-6, 1e-3, 1.0, 50.0, 1e4, 0.0])[:, None]
    rounded, scale = scaled_fp8(x)
    assert rounded.dtype == torch.float8_e4m3fn and scale.shape == (6, 1)
    error = (rounded.float() * scale - x).abs()
    assert bool((error <= x.abs() / 16 + x.abs().amax(dim=1, keepdim=True) * 2**-10).all())


@torch.inference_mode()
def test_an_eight_bit_model_stays_close_to_its_floats() -> None:
    model = backbone()
    wanted = model(IDS)
    made = to_serving_form("llm", model, "fp8")(IDS)
    assert isinstance(model.model.layers[0].self_attn.o_proj, Fp8Linear)
    assert not has_scaled_mm(model.model.norm.weight), "a CPU multiplies the same numbers as floats"
    assert 0 < float((made - wanted).abs().mean()) < 0.08 * float(wanted.abs().mean())


@torch.inference_mode()
def test_eight_bit_products_are_those_of_the_rounded_numbers() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(32, 16)
    x = torch.randn(2, 3, 32)
    (weight, weight_scale), (rounded, scale) = scaled_fp8(layer.weight), scaled_fp8(x)
    wanted = nn.functional.linear(rounded.float() * scale, weight.float() * weight_scale, layer.bias)
    torch.testing.assert_close(Fp8Linear(layer.weight, layer.bias)(x), wanted, atol=1e-5, rtol=1e-5)


@needs_packed
@torch.inference_mode()
def test_the_vocoder_s_packed_blocks_make_the_same_sound() -> None:
    torch.manual_seed(0)
    dims = HiftDims(base_channels=32, f0_cond_channels=16, resblock_kernel_sizes=(3, 7))
    plain = HiftVocoder(dims).eval().requires_grad_(False).fold_weight_norm()
    packed = copy.deepcopy(plain)
    for _ in range(2):  # the second time changes nothing
        to_serving_form("vocoder", packed)
    mel = torch.randn(2, 80, 20)
    noise = plain.noise(0, mel)
    torch.testing.assert_close(packed(mel, noise)[0], plain(mel, noise)[0], atol=1e-5, rtol=0)
    assert not any(isinstance(module, ResBlock) for module in packed.modules())


@torch.inference_mode()
def test_nano_sized_parts_are_not_touched() -> None:
    for part in ("encoder", "flow"):
        module = module_of(part, TINY[part]).eval()
        to_serving_form(part, module)
        assert not any(isinstance(child, PackedLinear) for child in module.modules())
