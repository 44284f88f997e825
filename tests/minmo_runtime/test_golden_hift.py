"""HiFT and the voice-side mel against golden vectors of the reference code; see the reference folder's README."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from minmo_runtime.mel import MelConfig, MelSpectrogram
from minmo_runtime.model.hift import HiftDims, HiftVocoder, hift_keys
from minmo_runtime.model.vocoder import build_vocoder, load_vocoder

Tensors = dict[str, Tensor]
LISTING = Path(__file__).parents[3] / "shared" / "reference" / "cosyvoice2_hift.json"


def max_error(made: Tensor, expected: Tensor) -> float:
    assert made.shape == expected.shape, (made.shape, expected.shape)
    return float((made - expected).abs().max())


def vectors(io: Tensors, scenario: str) -> Tensors:
    """One scenario's vectors; skips when this golden folder does not hold them."""
    found = {key[len(scenario) + 1 :]: value for key, value in io.items() if key.startswith(scenario + ".")}
    if not found:
        pytest.skip(f"{scenario} is not in this golden folder")
    return found


def golden_dims(config: dict[str, object]) -> HiftDims:
    """The reference's constructor values in our names."""
    names = (
        "in_channels base_channels f0_cond_channels nb_harmonics sampling_rate nsf_sigma nsf_voiced_threshold "
        "upsample_rates upsample_kernel_sizes resblock_kernel_sizes source_resblock_kernel_sizes audio_limit"
    ).split()
    table = {name: config[name] for name in names}
    dilations, istft = config["resblock_dilation_sizes"], config["istft"]
    assert isinstance(dilations, list) and isinstance(istft, dict) and all(row == dilations[0] for row in dilations)
    table |= {"resblock_dilation_sizes": dilations[0], "istft_n_fft": istft["n_fft"], "istft_hop_len": istft["hop_len"]}
    return HiftDims.from_dict(table)


@pytest.fixture(scope="module")
def case(golden_dir: Path) -> tuple[HiftVocoder, Tensors]:
    if not (golden_dir / "hift_config.json").exists():
        pytest.skip("no golden vectors of HiFT here")
    vocoder = HiftVocoder(golden_dims(json.loads((golden_dir / "hift_config.json").read_text()))).eval()
    vocoder.load_state_dict(load_file(golden_dir / "hift_weights.safetensors"), strict=True)
    return vocoder, load_file(golden_dir / "hift_io.safetensors")


@torch.inference_mode()
def test_mel_to_wave_equals_the_reference(case: tuple[HiftVocoder, Tensors]) -> None:
    vocoder, io = case
    v = vectors(io, "full")
    f0_hz = vocoder.f0_predictor(v["in.mel"])
    assert max_error(f0_hz, v["out.f0"]) < 1e-3
    if "mid.sines" in v:
        assert max_error(vocoder.m_source.sines(v["out.f0"]), v["mid.sines"]) < 2e-3
    wave, source = vocoder(v["in.mel"], v["rand.noise_raw"])
    assert max_error(source, v["out.source"]) < 5e-4
    assert max_error(wave, v["out.wav"]) < 5e-4


@torch.inference_mode()
def test_decode_of_a_given_source_equals_the_reference(case: tuple[HiftVocoder, Tensors]) -> None:
    vocoder, io = case
    v = vectors(io, "decode")
    assert max_error(vocoder.decode(v["in.mel"], v["in.source"]), v["out.wav"]) < 1e-4


@torch.inference_mode()
def test_streamed_pieces_equal_the_reference(case: tuple[HiftVocoder, Tensors]) -> None:
    vocoder, io = case
    v = vectors(io, "stream")
    state, start = vocoder.new_state(), 0
    sizes = v["in.chunk_frames"].tolist()
    for index, size in enumerate(sizes):
        piece = v["in.mel"][..., start : start + size]
        start += size
        made = vocoder.push(piece, state, index == len(sizes) - 1, v[f"chunk{index}.rand.noise_raw"])
        assert max_error(made, v[f"chunk{index}.out.emitted"]) < 5e-4


@torch.inference_mode()
def test_old_weight_norm_names_and_prefix_load_and_fold(case: tuple[HiftVocoder, Tensors]) -> None:
    vocoder, io = case
    v = vectors(io, "full")
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


@pytest.mark.skipif(not LISTING.exists(), reason="no full-size listing here")
def test_full_size_listing_loads_strictly() -> None:
    listing = json.loads(LISTING.read_text())["tensors"]
    with torch.device("meta"):
        vocoder = HiftVocoder(HiftDims())
        weights = {name: torch.empty(entry["shape"]) for name, entry in listing.items()}
    vocoder.load_state_dict(weights, strict=True, assign=True)


@pytest.mark.parametrize(
    ("scenario", "high_hz"), [("mel24k_0", 8000.0), ("mel24k_1", 8000.0), ("mel24k_fmaxnone_0", 12000.0)]
)
def test_mel_equals_the_reference(golden_dir: Path, scenario: str, high_hz: float) -> None:
    if not (golden_dir / "mel_io.safetensors").exists():
        pytest.skip("no golden vectors of the mel here")
    io = load_file(golden_dir / "mel_io.safetensors")
    expected = vectors(io, scenario)["out.mel"]
    waveform = io[scenario.replace("_fmaxnone", "") + ".in.wav"]
    made = MelSpectrogram(MelConfig(high_hz=high_hz))(waveform[None])[0]
    assert max_error(made, expected) < 1e-4


def test_unknown_kind_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="hift, source_filter"):
        build_vocoder({"kind": "griffin_lim"})
