"""Stages 0e and 0f: sizes load, batches depend on the step alone, starts are what they claim."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from minmo_runtime.model.flow import Flow
from minmo_runtime.model.flow_dims import FlowDims
from minmo_runtime.training.flow import Batches, VoiceTokenSpeech, _start_from_scratch, matching_loss
from minmo_runtime.training.stage import load_stage
from minmo_runtime.training.vocoder import AgentSpeech, VocoderTrainer

LEVELS = [3, 3]
DIMS = FlowDims.from_dict(
    {
        "vocab_size": 9,
        "n_timesteps": 2,
        "inference_cfg_rate": 0.0,
        "mean_weight": 1.0,
        "noise_scale": 0.5,
        "encoder": {"output_size": 16, "attention_heads": 2, "linear_units": 32, "num_blocks": 1, "num_up_blocks": 1},
        "estimator": {"channels": 16, "attention_head_dim": 8, "num_heads": 2, "n_blocks": 1, "num_mid_blocks": 1},
    }
)


def speech(lengths: list[int]) -> VoiceTokenSpeech:
    rng = np.random.default_rng(0)
    tokens = [rng.integers(0, 9, n) for n in lengths]
    mels = [(rng.standard_normal((80, 2 * n)) - 6).astype(np.float16) for n in lengths]
    return VoiceTokenSpeech(["a"] * len(lengths), tokens, mels, [], "hash")


def test_shipped_stage_sizes_build_and_stay_small() -> None:
    flow = Flow(FlowDims.from_dict(load_stage("0f").settings["dims"]))
    assert sum(p.numel() for p in flow.parameters()) < 7_500_000  # bf16: under 15 MiB a file
    assert flow.dims.num_left_chunks == 2


def test_a_batch_depends_on_the_step_alone_and_an_epoch_holds_everything_once() -> None:
    data = speech([5, 9, 2, 7, 3, 8])
    first, second = Batches(data, 20, seed=1), Batches(data, 20, seed=1)
    for step in (0, 1, 5):
        for a, b in zip(first.at(step), second.at(step), strict=True):
            assert torch.equal(a, b)
    num_batches = len(first._groups)
    lengths = sorted(int(n) for step in range(num_batches) for n in first.at(step)[1])
    assert lengths == [2, 3, 5, 7, 8, 9]


@torch.no_grad()
def test_neighbours_and_padding_do_not_change_a_row_of_a_batch() -> None:
    """Padding is the same whatever the neighbour; only a row's last look-ahead sees it, as in the reference."""
    torch.manual_seed(0)
    flow = Flow(DIMS)
    tokens = torch.randint(0, 9, (2, 12))
    together, valid = flow.mean(tokens, torch.tensor([7, 12]))
    assert valid.sum(1).tolist() == [14, 24]
    padded_later, _ = flow.mean(torch.cat((tokens[:1, :7], torch.zeros(1, 5, dtype=torch.long)), 1), torch.tensor([7]))
    assert torch.allclose(padded_later[..., :14], together[:1, :, :14], atol=1e-5)


def test_untrained_flow_starts_at_the_average_mel_with_direction_zero() -> None:
    torch.manual_seed(0)
    flow, data = Flow(DIMS), speech([6, 8])
    with torch.no_grad():
        _start_from_scratch(flow, data, LEVELS)
    average = np.mean([mel.astype(np.float32).mean(1) for mel in data.mels], axis=0)
    assert np.allclose(flow.encoder_proj.bias.detach().numpy(), average)
    x = torch.randn(1, 80, 8)
    with torch.no_grad():
        made = flow.decoder.estimator(x, x, torch.zeros(1), torch.zeros(1, 80), torch.zeros_like(x))
    assert float(made.abs().max()) == 0.0


def test_tokens_that_share_digits_start_alike() -> None:
    torch.manual_seed(0)
    flow, data = Flow(DIMS), speech([6])
    with torch.no_grad():
        _start_from_scratch(flow, data, LEVELS)
    table = flow.input_embedding.weight.detach()
    near, far = (table[0] - table[1]).norm(), (table[0] - table[8]).norm()  # one digit apart, all digits apart
    assert near < far


def test_matching_trains_the_estimator_and_leaves_the_mean_alone() -> None:
    torch.manual_seed(0)
    flow, batches = Flow(DIMS), Batches(speech([6, 8]), 100, 0)
    matching_loss(flow, batches, 0).backward()
    assert flow.encoder_proj.weight.grad is None
    assert flow.decoder.estimator.final_proj.weight.grad is not None


def test_vocoder_trainer_resumes_where_it_was(tmp_path: Path) -> None:
    settings = {
        "learning_rate": 1e-3,
        "warmup_steps": 1,
        "batch_size": 1,
        "segment_frames": 8,
        "own_f0_from": 0.5,
        "dims": {"width": 8, "num_blocks": 1, "f0_width": 8},
    }
    rng = np.random.default_rng(0)
    waves = [(rng.standard_normal(480 * 12) * 3000).astype(np.int16)]
    data = AgentSpeech(waves, [np.full(12, 200.0, np.float32)], ["a"])
    trainer = VocoderTrainer(settings, 0, 100.0)
    trainer.step(data)
    trainer.save(tmp_path, tmp_path)
    again = VocoderTrainer(settings, 1, 100.0)
    assert again.resume(tmp_path)
    assert (again.steps, again.spent_s) == (1, trainer.spent_s)
    for a, b in zip(again.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert all(np.isfinite(list(again.step(data).values())))
