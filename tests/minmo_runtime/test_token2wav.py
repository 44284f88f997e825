"""Flow and source-filter vocoder: the streamed turn equals the offline form, and turns do not touch each other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from minmo_runtime.model.flow import Flow
from minmo_runtime.model.flow_dims import FlowDims
from minmo_runtime.model.flow_state import FlowState
from minmo_runtime.model.source_filter import (
    SourceFilterDims,
    SourceFilterState,
    SourceFilterVocoder,
    pulse_train,
)
from minmo_runtime.model.vocoder import build_vocoder, load_vocoder
from minmo_runtime.training.pitch import track_f0

FLOW = FlowDims.from_dict(
    {
        "vocab_size": 50,
        "n_timesteps": 2,
        "inference_cfg_rate": 0.0,
        "mean_weight": 1.0,
        "noise_scale": 0.5,
        "left_context_s": 0.4,
        "encoder": {
            "output_size": 32,
            "attention_heads": 2,
            "linear_units": 64,
            "num_blocks": 2,
            "num_up_blocks": 2,
            "static_chunk_size": 5,
        },
        "estimator": {"channels": 32, "attention_head_dim": 8, "num_heads": 2, "n_blocks": 1, "num_mid_blocks": 1},
    }
)
VOCODER = SourceFilterDims(width=24, num_blocks=2, f0_width=16)


@pytest.fixture(scope="module")
def flow() -> Flow:
    torch.manual_seed(0)
    return Flow(FLOW).eval()


@pytest.fixture(scope="module")
def vocoder() -> SourceFilterVocoder:
    torch.manual_seed(0)
    made = SourceFilterVocoder(VOCODER).eval()
    with torch.no_grad():
        made.filters.weight.normal_(std=0.1)
        made.f0_predictor.classifier.weight.mul_(2.0)  # voiced and unvoiced stretches
    return made


def drain(flow: Flow, state: FlowState) -> list[Tensor]:
    mels = []
    while flow.can_step(state):
        mel = flow.step(state)
        if mel is not None:
            mels.append(mel)
    return mels


def stream_tokens(flow: Flow, state: FlowState, tokens: list[int], rng: np.random.Generator) -> Tensor:
    """Push in random pieces, running whatever is ready after each."""
    mels, at = [], 0
    while at < len(tokens):
        size = int(rng.integers(1, 12))
        flow.push(state, tokens[at : at + size], is_final=at + size >= len(tokens) and bool(rng.integers(2)))
        mels += drain(flow, state)
        at += size
    flow.push(state, [], is_final=True)
    return torch.cat(mels + drain(flow, state), dim=-1)


@pytest.mark.parametrize("num_tokens", [1, 4, 5, 8, 37, 41])
@pytest.mark.parametrize("variant", ["two_steps", "mean_only", "guided", "all_left_context", "no_left_context"])
def test_streamed_flow_equals_offline(flow: Flow, num_tokens: int, variant: str) -> None:
    changes = {
        "two_steps": {},
        "mean_only": {"n_timesteps": 0},
        "guided": {"inference_cfg_rate": 0.7, "mean_weight": 0.0, "noise_scale": 1.0},
        "all_left_context": {"left_context_s": -1.0},
        "no_left_context": {"left_context_s": 0.0},
    }[variant]
    rng = np.random.default_rng(num_tokens)
    tokens = rng.integers(0, FLOW.vocab_size, num_tokens).tolist()
    embedding = torch.from_numpy(rng.standard_normal((1, FLOW.spk_embed_dim)).astype(np.float32))
    flow.dims = replace(FLOW, **changes)
    try:
        whole = flow(torch.tensor([tokens]), embedding)
        streamed = stream_tokens(flow, flow.new_state(embedding), tokens, rng)
    finally:
        flow.dims = FLOW
    assert streamed.shape == whole.shape == (1, 80, 2 * num_tokens)
    assert float((streamed - whole).abs().max()) < 1e-5


def test_streamed_flow_with_a_prompt_equals_offline(flow: Flow) -> None:
    rng = np.random.default_rng(3)
    prompt, tokens = rng.integers(0, 50, 7).tolist(), rng.integers(0, 50, 18).tolist()
    prompt_mel, embedding = torch.randn(1, 80, 14), torch.randn(1, FLOW.spk_embed_dim)
    whole = flow(torch.tensor([tokens]), embedding, torch.tensor([prompt]), prompt_mel)
    streamed = stream_tokens(flow, flow.new_state(embedding, prompt, prompt_mel), tokens, rng)
    assert float((streamed - whole).abs().max()) < 1e-5


def test_flow_hands_the_engine_one_small_job_at_a_time(flow: Flow) -> None:
    """A chunk is one encoding and one job per Euler step; the mel comes with the last."""
    state = flow.new_state(torch.zeros(1, FLOW.spk_embed_dim))
    chunk, ahead = FLOW.encoder.static_chunk_size, FLOW.encoder.pre_lookahead_len
    flow.push(state, list(range(chunk + ahead - 1)))
    assert not flow.can_step(state)
    flow.push(state, [7])
    results = [flow.step(state) for _ in range(1 + FLOW.n_timesteps)]
    assert [mel is None for mel in results] == [True] * FLOW.n_timesteps + [False]
    assert not flow.can_step(state)


def test_bounded_left_context_forgets_older_chunks(flow: Flow) -> None:
    """Attention reaches two chunks back; older keys are dropped, so that a long turn costs no more than a short one."""
    state = flow.new_state(torch.zeros(1, FLOW.spk_embed_dim))
    flow.push(state, [1] * 60)
    drain(flow, state)
    kept = state.encoder_cache.keys[flow.encoder.encoders[0].self_attn][0].shape[2]
    assert kept == FLOW.num_left_chunks * FLOW.encoder.static_chunk_size == 10


def test_flow_turns_do_not_touch_each_other(flow: Flow) -> None:
    rng = np.random.default_rng(5)
    tokens = [rng.integers(0, 50, size).tolist() for size in (23, 40)]
    embeddings = [torch.randn(1, FLOW.spk_embed_dim) for _ in tokens]
    alone = [flow(torch.tensor([row]), e) for row, e in zip(tokens, embeddings, strict=True)]
    states = [flow.new_state(e) for e in embeddings]
    mels: list[list[Tensor]] = [[], []]
    for at in range(0, 40, 4):  # the first ends early and stalls at times, the second goes on
        for row, state in enumerate(states):
            if row == 0 and at % 8:
                continue
            piece = tokens[row][at : at + 4] if row else tokens[row][at : at + 8]
            flow.push(state, piece)
            if flow.can_step(state):  # interleave single jobs of both turns
                mel = flow.step(state)
                mels[row] += [] if mel is None else [mel]
    for row, state in enumerate(states):
        flow.push(state, [], is_final=True)
        mels[row] += drain(flow, state)
        assert float((torch.cat(mels[row], dim=-1) - alone[row]).abs().max()) < 1e-5


def stream_mel(vocoder: SourceFilterVocoder, mel: Tensor, state: SourceFilterState, rng: np.random.Generator) -> Tensor:
    pieces, at = [], 0
    while at < mel.shape[-1]:
        size = int(rng.integers(0, 9))
        pieces.append(vocoder.push(mel[..., at : at + size], state))
        at += size
    pieces.append(vocoder.push(mel[..., :0], state, is_final=True))
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("num_frames", [1, 2, 3, 30, 61])
@torch.inference_mode()
def test_streamed_vocoder_equals_offline(vocoder: SourceFilterVocoder, num_frames: int) -> None:
    rng = np.random.default_rng(num_frames)
    mel = torch.from_numpy(rng.standard_normal((1, 80, num_frames)).astype(np.float32)) * 3 - 5
    whole = vocoder(mel)
    assert whole.shape == (1, num_frames * VOCODER.samples_per_frame)
    for _ in range(3):
        streamed = stream_mel(vocoder, mel, vocoder.new_state(), rng)
        assert streamed.shape == whole.shape
        # Phases are sums of predicted F0, so rounding differs a little with the cut.
        assert float((streamed - whole).abs().max()) < 1e-3 * float(whole.abs().max())


@torch.inference_mode()
def test_vocoder_looks_at_most_three_frames_ahead(vocoder: SourceFilterVocoder) -> None:
    """Samples of frame n are out when frame n + 3 has arrived, and later frames do not change them."""
    mel = torch.randn(1, 80, 40) * 3 - 5
    state = vocoder.new_state()
    early = torch.cat([vocoder.push(mel[..., i : i + 1], state) for i in range(23)], dim=1)
    assert early.shape[1] >= 20 * VOCODER.samples_per_frame
    assert torch.allclose(early, vocoder(mel)[:, : early.shape[1]], atol=1e-4)


@torch.inference_mode()
def test_vocoder_turns_do_not_touch_each_other(vocoder: SourceFilterVocoder) -> None:
    mels = [torch.randn(1, 80, size) * 3 - 5 for size in (25, 33)]
    states = [vocoder.new_state() for _ in mels]
    pieces: list[list[Tensor]] = [[], []]
    for at in range(0, 33, 3):
        for row in (0, 1):
            pieces[row].append(vocoder.push(mels[row][..., at : at + 3], states[row]))
    for row in (0, 1):
        pieces[row].append(vocoder.push(mels[row][..., :0], states[row], is_final=True))
        whole = vocoder(mels[row])
        assert float((torch.cat(pieces[row], dim=1) - whole).abs().max()) < 1e-3 * float(whole.abs().max())


def test_empty_turn_makes_no_sound(vocoder: SourceFilterVocoder) -> None:
    assert vocoder.push(torch.zeros(1, 80, 0), vocoder.new_state(), is_final=True).shape == (1, 0)


def test_pulses_have_the_pitch_they_were_given() -> None:
    """The tracker that teaches the F0 predictor finds what the source was told, at the frame's end."""
    f0_hz = torch.cat(
        [torch.full((20,), 120.0), torch.linspace(120, 240, 40), torch.zeros(10), torch.full((20,), 180.0)]
    )
    pulses, phase = pulse_train(f0_hz[None], torch.tensor([120.0]), torch.zeros(1, dtype=torch.float64), VOCODER)
    assert 0 <= float(phase) < 1
    smooth = np.convolve(pulses[0].numpy(), np.hanning(40) / 20, "same")  # a voice is no bare pulse train
    found = track_f0(smooth * 0.1, VOCODER.sample_rate_hz, VOCODER.samples_per_frame)
    inside = [*range(3, 56), *range(75, 86)]
    assert np.abs(np.log2(found[inside] / f0_hz.numpy()[inside])).max() < 0.03
    assert (found[62:68] == 0).all()


def test_source_filter_weights_load_strictly_and_by_kind(vocoder: SourceFilterVocoder) -> None:
    table = {"kind": "source_filter", **VOCODER.to_dict()}
    loaded = load_vocoder(build_vocoder(table), vocoder.state_dict())
    mel = torch.randn(1, 80, 6)
    assert torch.equal(loaded(mel), vocoder(mel))
    with pytest.raises(RuntimeError, match="Missing key"):
        load_vocoder(build_vocoder(table), {})


def test_speaking_an_untrained_mean_is_refused() -> None:
    with pytest.raises(ValueError, match="mean_weight 0"):
        FlowDims(n_timesteps=0)
    with pytest.raises(ValueError, match="unknown key noise"):
        FlowDims.from_dict({"noise": 1})
