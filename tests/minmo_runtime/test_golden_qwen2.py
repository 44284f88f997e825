"""Our backbone against transformers' Qwen2ForCausalLM: weights and outputs of a tiny random model, float32 on CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minmo_runtime.model.backbone import Backbone
from minmo_runtime.model.dims import BackboneDims

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"
REFERENCE = Path(__file__).parents[3] / "shared" / "reference"
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=[GOLDEN, REFERENCE], ids=["fixtures", "reference"])
def golden(request: pytest.FixtureRequest) -> tuple[Backbone, dict[str, torch.Tensor]]:
    folder: Path = request.param
    if not (folder / "qwen2_weights.safetensors").exists():
        pytest.skip(f"no golden vectors in {folder.name}")
    config = json.loads((folder / "qwen2_config.json").read_text())
    sizes = {key: value for key, value in config.items() if key not in ("hidden_act", "attention_bias")}
    model = Backbone(BackboneDims.from_dict(sizes))
    model.load_state_dict(load_file(folder / "qwen2_weights.safetensors"))
    return model.eval(), load_file(folder / "qwen2_io.safetensors")


@torch.no_grad()
def test_single_sequence_equals_transformers(golden: tuple[Backbone, dict[str, torch.Tensor]]) -> None:
    model, io = golden
    ids = io["single.in.input_ids"]
    assert torch.equal(model.embed(ids), io["single.out.hidden_0"])
    hidden = model(ids)
    torch.testing.assert_close(hidden, io["single.out.hidden_3"], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(model.logits(hidden), io["single.out.logits"], atol=TOLERANCE, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_equals_transformers(golden: tuple[Backbone, dict[str, torch.Tensor]], side: str) -> None:
    model, io = golden
    mask = io[f"{side}pad.in.attention_mask"]
    hidden = model(
        io[f"{side}pad.in.input_ids"], attention_mask=mask, position_ids=io.get(f"{side}pad.in.position_ids")
    )
    real = mask.bool()
    torch.testing.assert_close(model.logits(hidden)[real], io[f"{side}pad.out.logits"][real], atol=TOLERANCE, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("is_fused", [False, True])
def test_chunked_cache_equals_transformers(golden: tuple[Backbone, dict[str, torch.Tensor]], is_fused: bool) -> None:
    model, io = golden
    if is_fused:
        model.fuse()
    cache = model.new_cache(num_slots=2, max_length=64)
    pieces = io["single.in.input_ids"].split([10, 1, 14, 6], dim=1)
    logits = torch.cat([model.logits(model(piece, cache=cache, slots=[1])) for piece in pieces], dim=1)
    torch.testing.assert_close(logits, io["chunked.out.logits"], atol=TOLERANCE, rtol=0)
    assert cache.lengths == [0, 31]


@torch.no_grad()
def test_greedy_tokens_equal_transformers(golden: tuple[Backbone, dict[str, torch.Tensor]]) -> None:
    model, io = golden
    cache = model.new_cache(num_slots=1, max_length=64)
    token = model.logits(model(io["single.in.input_ids"], cache=cache)[:, -1:]).argmax(-1)
    tokens = [int(token)]
    while len(tokens) < 16:
        token = model.logits(model(token, cache=cache)).argmax(-1)
        tokens.append(int(token))
    assert tokens == io["greedy.out.tokens"].tolist()


@torch.no_grad()
def test_input_vectors_equal_transformers(golden: tuple[Backbone, dict[str, torch.Tensor]]) -> None:
    model, io = golden
    logits = model.logits(model(embeds=io["embeds.in.inputs_embeds"]))
    torch.testing.assert_close(logits, io["embeds.out.logits"], atol=TOLERANCE, rtol=0)
