"""Our backbone against transformers' Qwen2ForCausalLM: weights and outputs of a tiny random model, float32 on CPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from minmo_runtime.model.backbone import Backbone
from minmo_runtime.model.dims import BackboneDims
from minmo_runtime.weight_files import load_weights
from tests.minmo_runtime.golden import Case, Tensors, max_error, scenario

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def case(golden_dir: Path) -> Case:
    return Case(golden_dir, "qwen2")


@pytest.fixture(scope="module")
def io(case: Case) -> Tensors:
    return case.vectors()


@pytest.fixture
def model(case: Case) -> Backbone:
    config = case.config  # what it says besides sizes has one value in Qwen2
    names = [field.name for field in dataclasses.fields(BackboneDims) if field.name in config]
    model = Backbone(BackboneDims(**{name: config[name] for name in names}))
    # As serving reads it: a tied head is in the file a second time.
    load_weights(model, case.weights_path)
    return model.eval()


@torch.no_grad()
def test_single_sequence_equals_transformers_layer_by_layer(model: Backbone, io: Tensors) -> None:
    v, made = scenario(io, "single"), []
    # transformers' last hidden state is behind the final norm, which `forward` returns.
    for layer in list(model.model.layers)[:-1]:
        layer.register_forward_hook(lambda _, __, hidden: made.append(hidden))
    last = model(v["in.input_ids"])
    assert torch.equal(model.embed(v["in.input_ids"]), v["out.hidden_0"])
    for index, hidden in enumerate([*made, last], start=1):
        assert max_error(hidden, v[f"out.hidden_{index}"]) < TOLERANCE, f"layer {index}"
    assert max_error(model.logits(last), v["out.logits"]) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_equals_transformers(model: Backbone, io: Tensors, side: str) -> None:
    v = scenario(io, f"{side}pad")
    mask = v["in.attention_mask"]
    hidden = model(v["in.input_ids"], attention_mask=mask, position_ids=v.get("in.position_ids"))
    real = mask.bool()  # padded rows are zeroed in the vectors
    assert max_error(model.logits(hidden)[real], v["out.logits"][real]) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("is_fused", [False, True])
def test_chunked_cache_equals_transformers(model: Backbone, io: Tensors, is_fused: bool) -> None:
    """Whatever the pieces: how the reference cut its input does not matter with a cache."""
    ids, expected = scenario(io, "single")["in.input_ids"], scenario(io, "chunked")["out.logits"]
    if is_fused:
        model.fuse()
    length = ids.shape[1]
    cache = model.new_cache(num_slots=2, max_length=length)
    sizes = [length // 3, 1, length - length // 3 - 1]
    logits = torch.cat([model.logits(model(piece, cache=cache, slots=[1])) for piece in ids.split(sizes, dim=1)], dim=1)
    assert max_error(logits, expected) < TOLERANCE
    assert cache.lengths == [0, length]


@torch.no_grad()
def test_greedy_tokens_equal_transformers(model: Backbone, io: Tensors) -> None:
    ids, expected = scenario(io, "single")["in.input_ids"], scenario(io, "greedy")["out.tokens"].flatten().tolist()
    cache = model.new_cache(num_slots=1, max_length=ids.shape[1] + len(expected))
    token = model.logits(model(ids, cache=cache)[:, -1:]).argmax(-1)
    tokens = [int(token)]
    while len(tokens) < len(expected):
        token = model.logits(model(token, cache=cache)).argmax(-1)
        tokens.append(int(token))
    assert tokens == expected


@torch.no_grad()
def test_input_vectors_equal_transformers(model: Backbone, io: Tensors) -> None:
    v = scenario(io, "embeds")
    assert max_error(model.logits(model(embeds=v["in.inputs_embeds"])), v["out.logits"]) < TOLERANCE
