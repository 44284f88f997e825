"""HiFT, the mels and the whole way from voice tokens to samples against golden vectors of the reference code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minmo_runtime.mel import MelConfig, MelSpectrogram, mel_filterbank
from minmo_runtime.model.flow import Flow
from minmo_runtime.model.hift import HiftDims, HiftVocoder, hift_keys
from minmo_runtime.model.vocoder import build_vocoder, load_vocoder
from minmo_runtime.whisper_mel import campplus_fbank, whisper_filters, whisper_mel
from tests.minmo_runtime.golden import Case, Tensors, max_error, scenario, scenarios
from tests.minmo_runtime.test_golden_flow import golden_dims as flow_dims


def golden_dims(config: dict[str, Any], overlap_frames: int) -> HiftDims:
    """The reference's constructor values in our names."""
    names = (
        "in_channels base_channels f0_cond_channels nb_harmonics sampling_rate nsf_alpha nsf_sigma "
        "nsf_voiced_threshold upsample_rates upsample_kernel_sizes resblock_kernel_sizes resblock_dilation_sizes "
        "source_resblock_kernel_sizes source_resblock_dilation_sizes lrelu_slope audio_limit"
    ).split()
    table = {name: config[name] for name in names} | {"overlap_frames": overlap_frames}
    istft = config["istft"]
    return HiftDims.from_dict({**table, "istft_n_fft": istft["n_fft"], "istft_hop_len": istft["hop_len"]})


def with_phase_sums(tolerance: float, mel: Tensor, dims: HiftDims) -> float:
    """The bounds are for 50 frames of CosyVoice 2's source. Phase is a float32 sum over frames, so what two orders of
    adding differ by grows with them (0.001 at 50 frames, 0.016 at 500, says the vectors' README), with the highest
    harmonic's step per sample, and with the loudness of the sines."""
    full = HiftDims()
    highest = (dims.nb_harmonics + 1) / dims.sampling_rate / ((full.nb_harmonics + 1) / full.sampling_rate)
    return tolerance * max(1.0, mel.shape[-1] / 50) * max(1.0, highest * dims.nsf_alpha / full.nsf_alpha)


@pytest.fixture(scope="module")
def case(golden_dir: Path) -> tuple[HiftVocoder, Tensors]:
    files = Case(golden_dir, "hift")
    config, io = files.config, files.vectors()
    # The sizes of a set do not name what its pieces carry over; their cross-fade does.
    window = io.get("stream.window_hamming_float64")
    overlap = HiftDims().overlap_frames if window is None else len(window) // 2 // config["samples_per_frame"]
    vocoder = HiftVocoder(golden_dims(config, overlap)).eval()
    vocoder.load_state_dict(files.weights(), strict=True)
    assert vocoder.dims.samples_per_frame == config["samples_per_frame"]
    return vocoder, io


@torch.inference_mode()
def test_mel_to_wave_equals_the_reference(case: tuple[HiftVocoder, Tensors]) -> None:
    vocoder, io = case
    v = scenario(io, "full")
    f0_hz = vocoder.f0_predictor(v["in.mel"])
    assert max_error(f0_hz, v["out.f0"]) < 1e-3
    if "mid.sines" in v:
        sines = vocoder.m_source.sines(v["out.f0"])
        assert max_error(sines, v["mid.sines"]) < with_phase_sums(2e-3, v["in.mel"], vocoder.dims)
    wave, source = vocoder(v["in.mel"], v["rand.noise_raw"])
    assert max_error(source, v["out.source"]) < with_phase_sums(5e-4, v["in.mel"], vocoder.dims)
    assert max_error(wave, v["out.wav"]) < with_phase_sums(5e-4, v["in.mel"], vocoder.dims)


@torch.inference_mode()
def test_decode_of_a_given_source_equals_the_reference(case: tuple[HiftVocoder, Tensors]) -> None:
    vocoder, io = case
    v = scenario(io, "decode")
    assert max_error(vocoder.decode(v["in.mel"], v["in.source"]), v["out.wav"]) < 1e-4


@torch.inference_mode()
def test_streamed_pieces_equal_the_reference(case: tuple[HiftVocoder, Tensors]) -> None:
    vocoder, io = case
    v = scenario(io, "stream")
    state, start = vocoder.new_state(), 0
    sizes = v["in.chunk_frames"].tolist()
    for index, size in enumerate(sizes):
        piece = v["in.mel"][..., start : start + size]
        start += size
        made = vocoder.push(piece, state, index == len(sizes) - 1, v[f"chunk{index}.rand.noise_raw"])
        bound = with_phase_sums(5e-4, v["in.mel"], vocoder.dims)
        assert max_error(made, v[f"chunk{index}.out.emitted"]) < bound, f"piece {index}"


@torch.inference_mode()
def test_old_weight_norm_names_and_prefix_load_and_fold(case: tuple[HiftVocoder, Tensors]) -> None:
    vocoder, io = case
    v = scenario(io, "full")
    old = {
        "generator."
        + name.replace(".parametrizations.weight.original0", ".weight_g").replace(
            ".parametrizations.weight.original1", ".weight_v"
        ): value
        for name, value in vocoder.state_dict().items()
    }
    assert set(hift_keys(old)) == set(vocoder.state_dict())
    loaded = load_vocoder(build_vocoder({"kind": "hift", **vocoder.dims.to_dict()}), old)
    assert not any("parametrizations" in name for name in loaded.state_dict())
    assert max_error(loaded.decode(v["in.mel"], v["out.source"]), v["out.wav"]) < 5e-4


@torch.inference_mode()
def test_source_is_voiced_where_the_reference_says(case: tuple[HiftVocoder, Tensors]) -> None:
    vocoder, io = case
    v = scenario(io, "full")
    if "mid.uv" not in v:
        pytest.skip("full.mid.uv is not in this golden folder")
    voiced = (v["out.f0"] > vocoder.dims.nsf_voiced_threshold).repeat_interleave(vocoder.dims.samples_per_frame, dim=1)
    assert torch.equal(voiced[..., None].to(torch.uint8), v["mid.uv"])


@torch.inference_mode()
def test_streamed_pieces_put_together_are_the_references_wave(case: tuple[HiftVocoder, Tensors]) -> None:
    vocoder, io = case
    v = scenario(io, "stream")
    if "out.concat" not in v:
        pytest.skip("stream.out.concat is not in this golden folder")
    state, start, made = vocoder.new_state(), 0, []
    sizes = v["in.chunk_frames"].tolist()
    for index, size in enumerate(sizes):
        noise = v[f"chunk{index}.rand.noise_raw"]
        made.append(vocoder.push(v["in.mel"][..., start : start + size], state, index == len(sizes) - 1, noise))
        start += size
    assert max_error(torch.cat(made, dim=1), v["out.concat"]) < with_phase_sums(5e-4, v["in.mel"], vocoder.dims)


# ------------------------------------------------------- voice tokens to samples


@pytest.fixture(scope="module")
def voice(golden_dir: Path) -> tuple[Flow, HiftVocoder, Tensors, list[dict[str, Any]]]:
    """Flow and vocoder of this folder, the vectors of the whole way, and what each call of the reference was given."""
    files = Case(golden_dir, "tts_stream")
    flow_files, hift_files = Case(golden_dir, "flow"), Case(golden_dir, "hift")
    overlap = files.facts.get("mel_cache_len", HiftDims().overlap_frames)
    flow = Flow(flow_dims(flow_files.config)).eval()
    vocoder = HiftVocoder(golden_dims(hift_files.config, overlap)).eval()
    flow.load_state_dict(flow_files.weights(), strict=True)
    vocoder.load_state_dict(hift_files.weights(), strict=True)
    return flow, vocoder, files.vectors(), files.facts["calls"]


@torch.inference_mode()
def test_voice_tokens_to_samples_at_once_equal_the_reference(
    voice: tuple[Flow, HiftVocoder, Tensors, list[dict[str, Any]]],
) -> None:
    flow, vocoder, v, _ = voice
    prompt = v["in.prompt_token"], v["in.prompt_feat"].transpose(1, 2)
    mel = flow(v["in.token"], v["in.embedding"], *prompt, is_streaming=False)
    wave, _ = vocoder(mel, v["nonstream.rand.noise_raw"])
    assert max_error(wave, v["nonstream.out.wav"]) < with_phase_sums(1e-3, mel, vocoder.dims)


@torch.inference_mode()
def test_voice_tokens_to_samples_call_by_call_equal_the_reference(
    voice: tuple[Flow, HiftVocoder, Tensors, list[dict[str, Any]]],
) -> None:
    """The reference's calls with its faults: each re-runs the whole history, hops grow, the last has no chunk mask."""
    flow, vocoder, v, calls = voice
    prompt = v["in.prompt_token"], v["in.prompt_feat"].transpose(1, 2)
    state, pieces = vocoder.new_state(), []
    for index, call in enumerate(calls):
        is_final = bool(call["finalize"])
        tokens = v["in.token"][:, : call["n_token"]]
        mel = flow(tokens, v["in.embedding"], *prompt, is_streaming=bool(call["stream"]), is_final=is_final)
        new = mel[..., call["token_offset"] * flow.dims.frames_per_token :]
        pieces.append(vocoder.push(new, state, is_final, v[f"call{index}.rand.noise_raw"]))
        assert pieces[-1].shape[1] == call["wav_len"]
        bound = with_phase_sums(1e-3, new, vocoder.dims)
        assert max_error(pieces[-1], v[f"call{index}.out.wav"]) < bound, f"call {index}"
    assert max_error(torch.cat(pieces, dim=1), v["out.wav"]) < with_phase_sums(1e-3, mel, vocoder.dims)


@torch.inference_mode()
def test_our_own_streaming_keeps_the_chunk_mask_to_the_last_piece(
    voice: tuple[Flow, HiftVocoder, Tensors, list[dict[str, Any]]],
) -> None:
    """The right thing in place of the reference's fault: one mask for the whole turn, and no token is run twice."""
    flow, _, v, _ = voice
    prompt_mel = v["in.prompt_feat"].transpose(1, 2)
    state = flow.new_state(v["in.embedding"], v["in.prompt_token"][0].tolist(), prompt_mel)
    flow.push(state, v["in.token"][0].tolist(), is_final=True)
    mels = []
    while flow.can_step(state):
        mels.append(flow.step(state))
    made = torch.cat([mel for mel in mels if mel is not None], dim=-1)
    whole = flow(v["in.token"], v["in.embedding"], v["in.prompt_token"], prompt_mel, is_streaming=True)
    assert max_error(made, whole) < 2e-4


# ------------------------------------------------------------------------- mels


@pytest.fixture(scope="module")
def mels(golden_dir: Path) -> Tensors:
    return Case(golden_dir, "mel").vectors()


def test_mel_equals_the_reference(mels: Tensors) -> None:
    config = MelConfig()
    if "mel24k.mel_basis_fmax8000" in mels:
        assert max_error(mel_filterbank(config), mels["mel24k.mel_basis_fmax8000"]) < 1e-6
    for name in scenarios(mels, "mel24k_"):
        # fmax "none" is the vocoder's training variant, up to half the sample rate
        high_hz = config.sample_rate_hz / 2 if "fmaxnone" in name else config.high_hz
        waveform = mels[name.replace("_fmaxnone", "") + ".in.wav"]
        made = MelSpectrogram(MelConfig(high_hz=high_hz))(waveform[None])[0]
        assert max_error(made, mels[f"{name}.out.mel"]) < 1e-4, name


def test_whisper_mel_equals_the_reference(mels: Tensors) -> None:
    if "whisper128.mel_filters" in mels:
        assert max_error(whisper_filters(), mels["whisper128.mel_filters"]) < 1e-6
    for name in scenarios(mels, "whisper128_"):
        v = scenario(mels, name)
        assert max_error(whisper_mel(v["in.wav"], len(v["out.mel"])), v["out.mel"]) < 1e-4, name


def test_speaker_fbank_equals_the_reference(mels: Tensors) -> None:
    """Not scaled to int16, as the parent feeds it; the log floor is near, hence the wider bound."""
    for name in scenarios(mels, "campplus_fbank_"):
        made = campplus_fbank(mels[name.replace("campplus_fbank", "whisper128") + ".in.wav"])
        assert max_error(made, mels[f"{name}.out"]) < 2e-3, name


def test_dilations_are_one_row_for_all_blocks_or_one_for_each() -> None:
    one = HiftDims()
    each = HiftDims.from_dict({"resblock_dilation_sizes": [[1, 3, 5]] * 3})
    assert one.stage_blocks() == each.stage_blocks() == [(3, (1, 3, 5)), (7, (1, 3, 5)), (11, (1, 3, 5))]
    other = HiftDims.from_dict({"source_resblock_dilation_sizes": [[1], [2, 4], [3]]})
    assert other.source_blocks() == [(7, (1,)), (7, (2, 4)), (11, (3,))]
    with pytest.raises(ValueError, match="one row for each of kernels"):
        HiftDims.from_dict({"resblock_dilation_sizes": [[1, 3], [1, 3]]}).stage_blocks()


def test_unknown_kind_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="hift, source_filter"):
        build_vocoder({"kind": "griffin_lim"})
