"""The flow against golden vectors of the reference code (tiny sizes, random weights); see the reference folder's
README.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from minmo_runtime.model.flow import Flow, FlowDims
from minmo_runtime.model.flow_encoder import chunk_mask

Tensors = dict[str, Tensor]
LISTING = Path(__file__).parents[3] / "shared" / "reference" / "cosyvoice2_flow.json"


def max_error(made: Tensor, expected: Tensor) -> float:
    assert made.shape == expected.shape, (made.shape, expected.shape)
    return float((made - expected).abs().max())


def golden_dims(config: dict[str, object]) -> FlowDims:
    """The reference's constructor values in our names."""
    encoder, estimator, cfm = config["encoder"], config["estimator"], config["cfm"]
    assert isinstance(encoder, dict) and isinstance(estimator, dict) and isinstance(cfm, dict)
    return FlowDims.from_dict(
        {
            "vocab_size": config["vocab_size"],
            "spk_embed_dim": config["spk_embed_dim"],
            "n_timesteps": cfm["n_timesteps"],
            "t_scheduler": cfm["t_scheduler"],
            "inference_cfg_rate": cfm["inference_cfg_rate"],
            "sigma_min": cfm["sigma_min"],
            "encoder": {
                **{
                    k: encoder[k]
                    for k in ("output_size", "attention_heads", "linear_units", "num_blocks", "num_up_blocks")
                },
                "static_chunk_size": encoder["static_chunk_size"],
                "pre_lookahead_len": config["pre_lookahead_len"],
            },
            "estimator": {
                "channels": estimator["channels"][0],
                **{k: estimator[k] for k in ("attention_head_dim", "num_heads", "n_blocks", "num_mid_blocks")},
            },
        }
    )


@pytest.fixture(scope="module")
def case(golden_dir: Path) -> tuple[Flow, Tensors]:
    if not (golden_dir / "flow_config.json").exists():
        pytest.skip("no golden vectors of the flow here")
    flow = Flow(golden_dims(json.loads((golden_dir / "flow_config.json").read_text()))).eval()
    flow.load_state_dict(load_file(golden_dir / "flow_weights.safetensors"), strict=True)
    return flow, load_file(golden_dir / "flow_io.safetensors")


def vectors(io: Tensors, scenario: str) -> Tensors:
    """One scenario's vectors; skips when this golden folder does not hold them."""
    found = {key[len(scenario) + 1 :]: value for key, value in io.items() if key.startswith(scenario + ".")}
    if not found:
        pytest.skip(f"{scenario} is not in this golden folder")
    return found


@pytest.mark.parametrize("scenario", ["enc_full", "enc_full_ctx", "enc_full_batch", "enc_stream", "enc_stream_ctx"])
@torch.inference_mode()
def test_encoder_equals_the_reference(case: tuple[Flow, Tensors], scenario: str) -> None:
    flow, io = case
    v = vectors(io, scenario)
    hidden, valid = flow.encoder(v["in.xs"], v["in.xs_lens"], v.get("in.context"), "stream" in scenario)
    assert torch.equal(valid, v["out.mask"][:, 0].bool())
    assert max_error(hidden * valid[..., None], v["out.h"] * valid[..., None]) < 1e-4


@pytest.mark.parametrize("scenario", ["est_full", "est_full_pad", "est_stream", "est_stream_pad"])
@torch.inference_mode()
def test_estimator_equals_the_reference(case: tuple[Flow, Tensors], scenario: str) -> None:
    flow, io = case
    v = vectors(io, scenario)
    attention = (
        chunk_mask(v["in.x"].shape[-1], 2 * flow.dims.encoder.static_chunk_size, -1) if "stream" in scenario else None
    )
    inputs = (v["in.x"], v["in.mu"], v["in.t"], v["in.spks"], v["in.cond"])
    made = flow.decoder.estimator(*inputs, v["in.mask"][:, 0].bool(), attention)
    assert max_error(made, v["out.y"]) < 1e-4


@pytest.mark.parametrize("scenario", ["cfm_loss_full", "cfm_loss_stream"])
@torch.inference_mode()
def test_matching_loss_equals_the_reference(case: tuple[Flow, Tensors], scenario: str) -> None:
    flow, io = case
    v = vectors(io, scenario)
    loss = flow.matching_loss(
        v["in.x1"],
        v["in.mu"],
        v["in.mask"][:, 0].bool(),
        v["in.spks"],
        v["in.cond"],
        v["rand.t"][:, 0, 0],
        v["rand.z"],
        v["rand.cfg_uniform"] > 0.2,
        "stream" in scenario,
    )
    assert abs(float(loss) - float(v["out.loss"])) < 1e-4


@pytest.mark.parametrize("streaming", [0, 1])
@pytest.mark.parametrize("finalize", [0, 1])
def test_tokens_to_mel_equals_the_reference(case: tuple[Flow, Tensors], streaming: int, finalize: int) -> None:
    flow, io = case
    v = vectors(io, "e2e")
    expected = vectors(io, f"e2e.streaming_{streaming}_finalize_{finalize}")["out.mel"]
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
    v = vectors(io, "e2e")
    expected = vectors(io, "e2e_noprompt")["out.mel"]
    errors = [max_error(flow(v["in.token"], v["in.embedding"], is_streaming=s), expected) for s in (False, True)]
    assert min(errors) < 2e-4, errors


def test_streamed_turn_equals_the_reference(case: tuple[Flow, Tensors]) -> None:
    """Caches and single steps instead of the reference's re-run of the whole history."""
    flow, io = case
    v = vectors(io, "e2e")
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


@pytest.mark.skipif(not LISTING.exists(), reason="no full-size listing here")
def test_full_size_listing_loads_strictly() -> None:
    listing = json.loads(LISTING.read_text())["tensors"]
    with torch.device("meta"):
        flow = Flow(FlowDims())
        weights = {name: torch.empty(entry["shape"]) for name, entry in listing.items()}
    flow.load_state_dict(weights, strict=True, assign=True)
