"""Decoding in fixed shapes, as on a GPU but eagerly: the padded step gives what the plain forward pass gives."""

from __future__ import annotations

import random

import pytest
import torch

from minmo_runtime.checkpoint_contents import module_of
from minmo_runtime.decode_step import DecodeStep, length_buckets
from minmo_runtime.model.backbone import Backbone
from minmo_runtime.model.dims import BackboneDims
from minmo_runtime.model.fixed_shapes import FixedCalls, bucket
from minmo_runtime.model.hift import HiftDims, HiftVocoder
from minmo_runtime.model.vocoder import push_rows
from minmo_runtime.model.voice_lm import VoiceLm, VoiceLmDims, VoiceStream
from minmo_runtime.quantise import int8_linears
from minmo_runtime.random_checkpoint import TINY

DIMS = BackboneDims(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    vocab_size=60,
)
NUM_SLOTS = 6
FULL_CONTEXT = {
    "front_end": "lfr",
    "lfr_m": 7,
    "lfr_n": 6,
    "fsmn_padding": "symmetric",
    "chunk_frames": 0,
    "left_context_frames": 0,
    "num_queries": 16,
}


@pytest.fixture(scope="module")
def model() -> Backbone:
    torch.manual_seed(0)
    return Backbone(DIMS).eval().requires_grad_(False).fuse()


def test_buckets_are_the_smallest_that_fit() -> None:
    assert [bucket(n, (1, 2, 4, 8)) for n in (1, 2, 3, 8)] == [1, 2, 4, 8]
    assert length_buckets(1700) == (256, 512, 1024, 1700)
    assert length_buckets(200) == (200,)


@torch.inference_mode()
def test_rows_of_any_age_in_any_company_equal_the_plain_pass(model: Backbone) -> None:
    rng = random.Random(0)
    plain, fixed = model.new_cache(NUM_SLOTS, 300), model.new_cache(NUM_SLOTS + 1, 300)
    step = DecodeStep(model, fixed, has_graphs=False)
    for slot, length in enumerate((250, 3, 17, 1, 40, 255)):  # lengths on both sides of a bucket
        ids = torch.randint(0, 60, (1, length))
        for cache in (plain, fixed):
            model(ids, cache=cache, slots=[slot])
    for _ in range(12):
        slots = rng.sample(range(NUM_SLOTS), rng.randint(1, NUM_SLOTS))
        embeds = model.embed(torch.randint(0, 60, (len(slots),)))
        wanted = model(embeds=embeds[:, None], cache=plain, slots=slots)[:, 0]
        made = step.run(embeds, slots)
        assert float((made - wanted).abs().max()) < 1e-5
    assert fixed.lengths[:NUM_SLOTS] == plain.lengths and fixed.lengths[NUM_SLOTS] == 0


@torch.inference_mode()
def test_a_nan_row_touches_neither_neighbours_nor_padding(model: Backbone) -> None:
    cache = model.new_cache(4, 300)
    step = DecodeStep(model, cache, has_graphs=False)
    embeds = model.embed(torch.tensor([1, 2, 3]))
    wanted = step.run(embeds, [0, 1, 2]).clone()
    for slot in range(3):
        cache.reset(slot)
    embeds[1] = torch.nan
    made = step.run(embeds, [0, 1, 2])
    assert torch.isnan(made[1]).all() and torch.allclose(made[[0, 2]], wanted[[0, 2]])
    step.run(model.embed(torch.tensor([4])), [0])
    assert not torch.isnan(cache.keys[0][0]).any()


def test_a_full_slot_is_named(model: Backbone) -> None:
    cache = model.new_cache(3, 8)
    cache.lengths[1] = 8
    step = DecodeStep(model, cache, has_graphs=False)
    with pytest.raises(ValueError, match=r"slots \[1\] are full"):
        step.run(model.embed(torch.tensor([1, 1])), [0, 1])
    assert cache.lengths == [0, 8, 0]


def voice_lm() -> VoiceLm:
    torch.manual_seed(1)
    dims = VoiceLmDims(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        speech_token_size=40,
        text_vocab_size=60,
    )
    return VoiceLm(dims).eval().requires_grad_(False)


def speak(model: VoiceLm, is_fixed: bool) -> list[list[int]]:
    """Three turns that begin and wait for text at different times."""
    cache = model.new_cache(4, 300)
    one_row = DecodeStep(model.trunk, cache, has_graphs=False).run if is_fixed else None
    torch.manual_seed(2)
    vectors = torch.randn(3, 20, 32)
    streams: list[VoiceStream] = []
    for tick in range(90):
        if tick % 15 == 0 and len(streams) < 3:
            row = len(streams)
            streams.append(model.new_stream(row, row, model.dims.rules(), model.dims.sampling()))
        for row, stream in enumerate(streams):
            if tick % (5 + row) == 0 and len(stream.semantic) < 20:
                stream.push(vectors[row, len(stream.semantic) : len(stream.semantic) + 5])
                if len(stream.semantic) == 20:
                    stream.finish()
        model.decode_step(streams, cache, one_row)
    return [stream.turn.voice_tokens for stream in streams]


@torch.no_grad()
def test_no_pass_makes_tensors_on_another_device_than_its_weights() -> None:
    """Every device but the CPU would refuse them; "meta" does too, and needs no GPU."""
    with torch.device("meta"):
        modules = {part: module_of(part, TINY[part]).to(torch.bfloat16) for part in ("encoder", "llm", "flow")}
        whole = module_of("encoder", {**TINY["encoder"], **FULL_CONTEXT}).to(torch.bfloat16)

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, device="meta", dtype=torch.bfloat16)

    encoder, llm, flow = modules["encoder"], modules["llm"], modules["flow"]
    assert encoder.ctc_log_probs(encoder.forward_chunk(zeros(2, 16, 80), encoder.init_state(2))[0]).is_meta
    assert encoder(zeros(2, 32, 80), torch.tensor([8, 6])).is_meta
    assert whole(zeros(2, 20, 560), torch.tensor([24, 20]), torch.zeros(2, 4, dtype=torch.long)).is_meta
    cache = llm.new_cache(4, 300)
    assert llm(torch.zeros(2, 5, dtype=torch.long, device="meta"), cache=cache, slots=[0, 2], num_new=[5, 3]).is_meta
    assert DecodeStep(llm, cache, has_graphs=False).run(zeros(2, 32), [0, 2]).is_meta
    states = [flow.new_state(zeros(1, 8), slot=slot) for slot in range(2)]
    flow_cache = flow.new_cache(3, 2)
    for state in states:
        flow.push(state, [1] * 20, is_final=True)
    while flow.can_step(states[0]):
        mels = flow.step_rows(states, flow_cache)
    assert mels[0] is not None and mels[0].is_meta


def test_the_voice_lm_draws_the_same_tokens_in_fixed_shapes() -> None:
    model = voice_lm()
    plain = speak(model, is_fixed=False)
    assert plain == speak(model, is_fixed=True) and min(map(len, plain)) > 20


@torch.inference_mode()
def test_int8_layers_stay_close_to_their_floats() -> None:
    torch.manual_seed(3)
    model = Backbone(DIMS).eval()
    ids = torch.randint(0, 60, (1, 30))
    wanted = model(ids)
    int8_linears(model.model.layers)
    made = model(ids)
    assert not isinstance(model.model.layers[0].mlp.up_proj, torch.nn.Linear)
    assert 0 < float((made - wanted).abs().mean()) < 0.05 * float(wanted.abs().mean())


@torch.inference_mode()
def test_the_vocoder_in_fixed_shapes_makes_the_same_sound() -> None:
    torch.manual_seed(4)
    dims = HiftDims(base_channels=32, f0_cond_channels=16, resblock_kernel_sizes=(3,), resblock_dilation_sizes=(1,))
    vocoder = HiftVocoder(dims).eval().fold_weight_norm()
    mels = torch.randn(3, 80, 50)
    calls = FixedCalls(has_graphs=False)
    made: list[list[torch.Tensor]] = []
    for fixed in (None, calls):
        states = [vocoder.new_state() for _ in mels]
        pieces: list[list[torch.Tensor]] = [[] for _ in mels]
        for begin in range(0, 50, 20):
            rows = [mel[None, :, begin : begin + 20] for mel in mels]
            for row, samples in enumerate(push_rows(vocoder, rows, states, [begin == 40] * 3, fixed)):
                assert isinstance(samples, torch.Tensor)
                pieces[row].append(samples)
        made.append([torch.cat(row) for row in pieces])
    assert [key[1:3] for key in calls.shapes] == [(4, 20), (4, 28)], (
        "three rows fill up to four; the last piece is free"
    )
    for plain, same in zip(*made, strict=True):
        assert float((plain - same).abs().max()) < 1e-5


def test_another_shape_under_the_same_name_is_refused() -> None:
    calls = FixedCalls(has_graphs=False)
    double = calls(("double",), lambda x: 2 * x, [torch.ones(3)])
    assert double.tolist() == [2.0] * 3
    with pytest.raises(ValueError, match=r"takes \[3\], not \[4\]"):
        calls(("double",), lambda x: 2 * x, [torch.ones(4)])
