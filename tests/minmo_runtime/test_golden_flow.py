"""The flow against golden vectors of the reference code (small sizes, random weights)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from minmo_runtime.model.flow import Flow, _noise_table
from minmo_runtime.model.flow_dims import FlowDims
from minmo_runtime.model.flow_encoder import chunk_mask
from tests.minmo_runtime.golden import Case, Tensors, max_error, scenario, scenarios


def golden_dims(config: dict[str, Any]) -> FlowDims:
    """The reference's constructor values in our names."""
    encoder, estimator, cfm = config["encoder"], config["estimator"], config["cfm"]
    assert config["input_size"] == encoder["output_size"], "the reference's up_embed is built with input_size"
    assert estimator["static_chunk_size"] == encoder["up_stride"] * encoder["static_chunk_size"]
    assert len(estimator["channels"]) == 1, "one width, as released: the estimator never goes down in rate"
    # num_decoding_left_chunks is not read: the reference takes it and never uses it (decoder.py passes -1).
    return FlowDims.from_dict(
        {
            "vocab_size": config["vocab_size"],
            "num_mel_bins": config["output_size"],
            "token_rate_hz": config["input_frame_rate"],
            "spk_embed_dim": config["spk_embed_dim"],
            "n_timesteps": cfm["n_timesteps"],
            "t_scheduler": cfm["t_scheduler"],
            "inference_cfg_rate": cfm["inference_cfg_rate"],
            "sigma_min": cfm["sigma_min"],
            "encoder": {
                **{
                    k: encoder[k]
                    for k in (
                        "output_size",
                        "attention_heads",
                        "linear_units",
                        "num_blocks",
                        "num_up_blocks",
                        "static_chunk_size",
                        "up_stride",
                    )
                },
                "pre_lookahead_len": config["pre_lookahead_len"],
            },
            "estimator": {
                "channels": estimator["channels"][0],
                **{k: estimator[k] for k in ("attention_head_dim", "num_heads", "n_blocks", "num_mid_blocks")},
            },
        }
    )


@pytest.fixture(scope="module")
def config(golden_dir: Path) -> dict[str, Any]:
    return Case(golden_dir, "flow").config


@pytest.fixture(scope="module")
def case(golden_dir: Path, config: dict[str, Any]) -> tuple[Flow, Tensors]:
    files = Case(golden_dir, "flow")
    flow = Flow(golden_dims(config)).eval()
    flow.load_state_dict(files.weights(), strict=True)
    return flow, files.vectors()


@torch.inference_mode()
def test_encoder_equals_the_reference(case: tuple[Flow, Tensors]) -> None:
    """The look-ahead goes through the same input layer and only into the look-ahead convolution; the rest is padded."""
    flow, io = case
    for name in scenarios(io, "enc_"):
        v, seen = scenario(io, name), {}
        encoder = flow.encoder
        hooks = [
            module.register_forward_hook(lambda _, __, made, part=part, seen=seen: seen.__setitem__(part, made))
            for part, module in (("embed_x", encoder.embed), ("up_embed", encoder.up_embed))
        ]
        hidden, valid = encoder(v["in.xs"], v["in.xs_lens"], v.get("in.context"), "stream" in name)
        for hook in hooks:
            hook.remove()
        assert torch.equal(valid, v["out.mask"][:, 0].bool()), name
        # Padding of the reference's batch is not zeroed.
        assert max_error(hidden * valid[..., None], v["out.h"] * valid[..., None]) < 1e-4, name
        if "mid.embed_x" in v and "in.context" not in v:  # with a context our layer runs once over both
            assert max_error(seen["embed_x"], v["mid.embed_x"]) < 1e-4, name
        if "mid.up_embed" in v:
            assert max_error(seen["up_embed"], v["mid.up_embed"]) < 1e-4, name


@torch.inference_mode()
def test_estimator_equals_the_reference(case: tuple[Flow, Tensors]) -> None:
    flow, io = case
    chunk = flow.dims.frames_per_token * flow.dims.encoder.static_chunk_size
    for name in scenarios(io, "est_"):
        v, seen = scenario(io, name), {}
        estimator = flow.decoder.estimator
        hook = estimator.time_mlp.register_forward_hook(lambda _, __, made, seen=seen: seen.update(time=made))
        attention = chunk_mask(v["in.x"].shape[-1], chunk, -1) if "stream" in name else None
        inputs = (v["in.x"], v["in.mu"], v["in.t"], v["in.spks"], v["in.cond"])
        made = estimator(*inputs, v["in.mask"][:, 0].bool(), attention)
        hook.remove()
        assert max_error(made, v["out.y"]) < 1e-4, name
        if "mid.time_emb" in v:
            assert max_error(seen["time"], v["mid.time_emb"]) < 1e-4, name


@torch.inference_mode()
def test_matching_loss_equals_the_reference(case: tuple[Flow, Tensors], config: dict[str, Any]) -> None:
    """Time in the loss is uniform, not cosine-warped; a row keeps its conditions above the rate."""
    flow, io = case
    for name in scenarios(io, "cfm_loss"):
        v = scenario(io, name)
        loss = flow.matching_loss(
            v["in.x1"],
            v["in.mu"],
            v["in.mask"][:, 0].bool(),
            v["in.spks"],
            v["in.cond"],
            v["rand.t"][:, 0, 0],
            v["rand.z"],
            v["rand.cfg_uniform"] > config["cfm"]["training_cfg_rate"],
            "stream" in name,
        )
        assert max_error(loss, v["out.loss"]) < 1e-4, name


def test_start_noise_and_times_are_the_references(case: tuple[Flow, Tensors]) -> None:
    """The noise is one table for all turns, aligned to the start of the prompt; its values are pinned to the digit."""
    flow, io = case
    noise = scenario(io, "e2e")["in.rand_noise"]
    table = _noise_table(flow.dims.num_mel_bins)
    assert torch.equal(table[..., : noise.shape[-1]], noise)
    if table.shape == (1, 80, 15_000):
        assert table[0, 0, :3].tolist() == pytest.approx([-1.1258398, -1.1523602, -0.2505786], abs=1e-6)
        assert float(table.double().sum()) == pytest.approx(-1291.2014, abs=1e-3)
    if "t_span" in io:
        assert max_error(torch.tensor(flow.time_points()), io["t_span"]) < 1e-6


@torch.inference_mode()
def test_mean_and_steps_inside_a_turn_equal_the_reference(case: tuple[Flow, Tensors]) -> None:
    flow, io = case
    v = scenario(io, "e2e")
    for name in sorted({key.split(".")[0] for key in v if key.startswith("streaming_")}):
        inner = {key[len(name) + 1 :]: value for key, value in v.items() if key.startswith(name)}
        if "mid.mu" not in inner:
            continue
        tokens, context = torch.cat((v["in.prompt_token"], v["in.token"]), dim=1), None
        if name.endswith("finalize_0"):
            ahead = flow.dims.encoder.pre_lookahead_len
            tokens, context = tokens[:, :-ahead], tokens[:, -ahead:]
        is_streaming = name.startswith("streaming_1")
        mu, _ = flow.mean(tokens, torch.tensor([tokens.shape[1]]), context, is_streaming)
        assert max_error(mu.transpose(1, 2), inner["mid.mu"]) < 1e-4, name


@pytest.mark.parametrize("streaming", [0, 1])
@pytest.mark.parametrize("finalize", [0, 1])
def test_tokens_to_mel_equals_the_reference(case: tuple[Flow, Tensors], streaming: int, finalize: int) -> None:
    flow, io = case
    v = scenario(io, "e2e")
    expected = scenario(io, f"e2e.streaming_{streaming}_finalize_{finalize}")["out.mel"]
    made = flow(
        v["in.token"],
        v["in.embedding"],
        v["in.prompt_token"],
        v["in.prompt_feat"].transpose(1, 2),
        bool(streaming),
        bool(finalize),
    )
    assert max_error(made, expected) < 2e-4


def test_tokens_to_mel_without_prompt_equals_the_reference(case: tuple[Flow, Tensors]) -> None:
    flow, io = case
    v = scenario(io, "e2e")
    expected = scenario(io, "e2e_noprompt")["out.mel"]
    errors = [max_error(flow(v["in.token"], v["in.embedding"], is_streaming=s), expected) for s in (False, True)]
    assert min(errors) < 2e-4, errors


def test_streamed_turn_equals_the_reference(case: tuple[Flow, Tensors]) -> None:
    """Caches and single steps instead of the reference's re-run of the whole history."""
    flow, io = case
    v = scenario(io, "e2e")
    state = flow.new_state(v["in.embedding"], v["in.prompt_token"][0].tolist(), v["in.prompt_feat"].transpose(1, 2))
    mels = []
    for token in v["in.token"][0].tolist():
        flow.push(state, [token])
        while flow.can_step(state):
            mels.append(flow.step(state))
    flow.push(state, [], is_final=True)
    while flow.can_step(state):
        mels.append(flow.step(state))
    made = torch.cat([mel for mel in mels if mel is not None], dim=-1)
    assert max_error(made, v["streaming_1_finalize_1.out.mel"]) < 2e-4


@torch.inference_mode()
def test_turns_in_company_equal_the_reference(case: tuple[Flow, Tensors]) -> None:
    """As served: caches of fixed size, rows of different ages at different Euler steps in one pass. The window holds
    all that there is; a smaller one is another function (test_engine_flow.py)."""
    flow, io = case
    v = scenario(io, "e2e")
    prompt, tokens = v["in.prompt_token"][0].tolist(), v["in.token"][0].tolist()
    window = -(-(len(prompt) + len(tokens)) // flow.dims.chunk_size)
    cache = flow.new_cache(2, window, len(prompt))
    states = [flow.new_state(v["in.embedding"], prompt, v["in.prompt_feat"].transpose(1, 2), slot=s) for s in (0, 1)]
    mels: list[list[torch.Tensor]] = [[], []]
    flow.push(states[0], tokens, is_final=True)
    for round_ in range(2 * (window + 1) * (flow.dims.n_timesteps + 1)):
        if round_ == 3:
            flow.push(states[1], tokens, is_final=True)
        for is_inside in (True, False):
            rows = [row for row, s in enumerate(states) if flow.can_step(s) and (s.chunk is not None) is is_inside]
            made = flow.step_rows([states[row] for row in rows], cache) if rows else []
            for row, mel in zip(rows, made, strict=True):
                mels[row] += [] if mel is None else [mel]
    assert not any(flow.can_step(state) for state in states)
    for turn in mels:
        assert max_error(torch.cat(turn, dim=-1), v["streaming_1_finalize_1.out.mel"]) < 2e-4


@torch.inference_mode()
def test_aligned_prefix_is_the_start_of_the_longer_mel(case: tuple[Flow, Tensors]) -> None:
    """Only if prompt and tokens fill whole chunks: the reference differs otherwise, so a caller must align."""
    flow, io = case
    v, prefix = scenario(io, "e2e"), scenario(io, "e2e_prefix")
    made = {}
    for which in ("short", "long"):
        tokens = v["in.token"][:, : int(prefix[f"in.n_token_{which}"])]
        prompt = v["in.prompt_token"], v["in.prompt_feat"].transpose(1, 2)
        made[which] = flow(tokens, v["in.embedding"], *prompt, is_streaming=True, is_final=False)
        assert max_error(made[which], prefix[f"out.mel_{which}"]) < 2e-4
    assert max_error(made["long"][..., : made["short"].shape[-1]], made["short"]) < 1e-4
