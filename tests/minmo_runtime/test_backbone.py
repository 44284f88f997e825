"""The backbone's cache: pieces equal the whole, and no row feels its neighbours."""

from __future__ import annotations

import random

import pytest
import torch

from minmo_runtime.model.backbone import Backbone
from minmo_runtime.model.dims import BackboneDims
from minmo_runtime.model.layers import apply_rotary

TINY = BackboneDims(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=64,
    vocab_size=50,
)
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def model() -> Backbone:
    torch.manual_seed(1)
    model = Backbone(TINY)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def sequence(seed: int, length: int) -> torch.Tensor:
    return torch.randint(0, TINY.vocab_size, (1, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("seed", range(6))
def test_random_pieces_equal_the_whole(model: Backbone, seed: int) -> None:
    ids = sequence(seed, 40)
    rng = random.Random(seed)
    cache = model.new_cache(num_slots=3, max_length=64)
    pieces, start = [], 0
    while start < ids.shape[1]:
        width = min(rng.randint(1, 12), ids.shape[1] - start)
        pieces.append(model(ids[:, start : start + width], cache=cache, slots=[2]))
        start += width
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids), atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_rows_do_not_feel_neighbours_that_join_leave_or_stall(model: Backbone) -> None:
    """Four calls in random company: each gives what it gives alone."""
    rng = random.Random(7)
    wholes = [sequence(100 + call, 30) for call in range(4)]
    alone = [model(ids) for ids in wholes]
    cache = model.new_cache(num_slots=6, max_length=40)
    slots = [4, 0, 3, 1]
    done = [0] * 4
    heard: list[list[torch.Tensor]] = [[] for _ in wholes]
    while any(count < 30 for count in done):
        present = [call for call in range(4) if done[call] < 30 and rng.random() < 0.7]
        if not present:
            continue
        width = rng.choice((1, 1, 5))
        num_new = [min(rng.randint(0, width), 30 - done[call]) for call in present]
        ids = torch.zeros(len(present), width, dtype=torch.long)
        for row, call in enumerate(present):
            ids[row, : num_new[row]] = wholes[call][0, done[call] : done[call] + num_new[row]]
        hidden = model(ids, cache=cache, slots=[slots[call] for call in present], num_new=num_new)
        for row, call in enumerate(present):
            heard[call].append(hidden[row, : num_new[row]])
            done[call] += num_new[row]
    for call in range(4):
        torch.testing.assert_close(torch.cat(heard[call]), alone[call][0], atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_fork_and_cut_go_on_from_the_kept_part(model: Backbone) -> None:
    ids = sequence(3, 20)
    cache = model.new_cache(num_slots=2, max_length=32)
    model(ids, cache=cache, slots=[0])
    cache.fork(source=0, target=1, length=12)
    cache.truncate(0, 8)
    other = torch.cat([ids[:, :12], sequence(4, 5)], dim=1)
    forked = model(other[:, 12:], cache=cache, slots=[1])
    torch.testing.assert_close(forked, model(other)[:, 12:], atol=TOLERANCE, rtol=0)
    again = model(ids[:, 8:], cache=cache, slots=[0])
    torch.testing.assert_close(again, model(ids)[:, 8:], atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_slot_that_held_nan_is_clean_after_reset(model: Backbone) -> None:
    cache = model.new_cache(num_slots=1, max_length=16)
    model(embeds=torch.full((1, 9, TINY.hidden_size), float("nan")), cache=cache)
    cache.reset(0)
    ids = sequence(5, 4)
    torch.testing.assert_close(model(ids, cache=cache), model(ids), atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_fused_projections_change_nothing(model: Backbone) -> None:
    ids = sequence(6, 15)
    plain = model(ids)
    twin = Backbone(TINY)
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(twin.eval().fuse()(ids), plain, atol=TOLERANCE, rtol=0)


def test_full_slot_is_refused_not_overwritten(model: Backbone) -> None:
    cache = model.new_cache(num_slots=1, max_length=4)
    with pytest.raises(ValueError, match="full"):
        model(sequence(1, 5), cache=cache)
    assert cache.lengths == [0]


def test_one_slot_twice_in_a_batch_is_refused(model: Backbone) -> None:
    cache = model.new_cache(num_slots=2, max_length=8)
    with pytest.raises(ValueError, match="bad rows"):
        model(sequence(1, 3).expand(2, 3), cache=cache, slots=[1, 1])


def test_unknown_size_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="unknown key hiden_size"):
        BackboneDims.from_dict({**TINY.to_dict(), "hiden_size": 3})
    with pytest.raises(ValueError, match="missing key vocab_size"):
        BackboneDims.from_dict({key: value for key, value in TINY.to_dict().items() if key != "vocab_size"})


@torch.no_grad()
def test_a_fresh_model_looks_back_in_its_first_layer() -> None:
    """Heads 0 to 3 look at the tokens 1, 2, 1 and 3 back, wherever they stand; the other layers add nothing yet."""
    dims = BackboneDims.from_dict({**TINY.to_dict(), "hidden_size": 256, "head_dim": 64})
    model = Backbone(dims).init_weights(torch.Generator().manual_seed(0))
    first = model.model.layers[0]
    x = first.input_layernorm(model.embed(sequence(2, 40)))
    q, k, _ = first.self_attn.project(x)
    cos, sin = model.rotary(torch.arange(40)[None], 40)
    q, k = apply_rotary(q, cos[:, None], sin[:, None])[0], apply_rotary(k, cos[:, None], sin[:, None])[0]
    for head, gap in enumerate((1, 2, 1, 3)):
        weights = (q[head, 30] @ k[head // 2, :31].T / 8).softmax(-1)
        assert int(weights.argmax()) == 30 - gap
        assert float(weights.max()) > 0.9
    second = model.model.layers[1]
    assert not second.self_attn.o_proj.weight.any()
    assert not second.mlp.down_proj.weight.any()
