"""Checkpoint folders: round trip in each number format, and errors that name what is wrong."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import minmo_runtime
from minmo_runtime.checkpoint_contents import CheckpointError
from minmo_runtime.config import RuntimeConfig
from minmo_runtime.random_checkpoint import TINY, write_random_checkpoint
from minmo_runtime.weight_files import file_hash
from minmo_runtime.weights import load_checkpoint

NANO = Path(minmo_runtime.__file__).parent / "checkpoints" / "nano"


def rewrite(folder: Path, old: str, new: str) -> None:
    path = folder / "checkpoint.toml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0.0), ("bfloat16", 0.01), ("int8", 0.02)])
def test_weights_survive_each_number_format(tmp_path: Path, dtype: str, tolerance: float) -> None:
    exact = load_checkpoint(write_random_checkpoint(tmp_path / "a", seed=3)).modules.llm.state_dict()
    stored = load_checkpoint(write_random_checkpoint(tmp_path / "b", seed=3, dtype=dtype)).modules.llm.state_dict()
    for key, tensor in exact.items():
        assert (tensor - stored[key]).abs().max() <= tolerance * max(1e-6, float(tensor.abs().max())), key


def test_a_wrong_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path)
    path = folder / "llm.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = torch.ones(7)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has shape \[7\].*\[32\]"):
        load_checkpoint(folder)


def test_missing_and_surplus_keys_are_named(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path)
    path = folder / "voice_lm.safetensors"
    tensors = load_file(path)
    tensors["strange"] = tensors.pop("llm_decoder.bias")
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"missing llm_decoder\.bias; not wanted strange"):
        load_checkpoint(folder)


def test_an_unknown_size_is_refused_with_the_allowed_names(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path)
    rewrite(folder, "[llm]", "[llm]\nhidden = 3")
    with pytest.raises(CheckpointError, match=r"\[llm\].*unknown key hidden; allowed: hidden_size"):
        load_checkpoint(folder)


def test_a_changed_file_is_refused_by_its_hash(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path)
    good = file_hash(folder / "llm.safetensors")
    text = (folder / "checkpoint.toml").read_text() + f'\n[files.llm]\nsha256 = "{good}"\n'
    (folder / "checkpoint.toml").write_text(text)
    load_checkpoint(folder)
    with (folder / "llm.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(CheckpointError, match="sha256"):
        load_checkpoint(folder)


def test_voice_lm_and_flow_must_share_their_voice_tokenizer(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path)
    lines = '\n[files.voice_lm]\nvoice_tokenizer_sha256 = "a"\n\n[files.flow]\nvoice_tokenizer_sha256 = "b"\n'
    (folder / "checkpoint.toml").write_text((folder / "checkpoint.toml").read_text() + lines)
    with pytest.raises(CheckpointError, match="different voice tokenizers"):
        load_checkpoint(folder)


PROJECTOR = {"encoder_size": 32, "llm_hidden_size": 32, "ffn_size": 32}


def test_a_predictor_on_hidden_states_needs_a_projector(tmp_path: Path) -> None:
    dims = {**TINY, "duplex": {"input_size": 128, "hidden_size": 32}}
    with pytest.raises(CheckpointError, match="duplex.*needs a trained projector"):
        load_checkpoint(write_random_checkpoint(tmp_path, dims=dims))


def test_a_predictor_on_encoder_frames_stands_without_a_projector(tmp_path: Path) -> None:
    dims = {**TINY, "duplex": {"input_size": 64, "input": "encoder", "hidden_size": 32}}
    assert load_checkpoint(write_random_checkpoint(tmp_path, dims=dims)).bridges == ("in",)


@pytest.mark.parametrize(
    ("part", "sizes", "message"),
    [
        ("duplex", {"input_size": 60, "input": "encoder"}, r"duplex\.input_size = 60: must be equal .* 64"),
        ("duplex", {"input_size": 64, "input": "encoder", "num_facts": 3}, r"duplex\.num_facts = 3: must be equal"),
    ],
)
def test_a_connector_of_another_size_is_refused(tmp_path: Path, part: str, sizes: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(write_random_checkpoint(tmp_path, dims={**TINY, part: sizes}))


def test_an_unknown_input_of_the_predictor_is_refused_with_the_allowed_ones(tmp_path: Path) -> None:
    dims = {**TINY, "duplex": {"input_size": 64, "input": "encoder"}}
    folder = write_random_checkpoint(tmp_path, dims=dims)
    rewrite(folder, 'input = "encoder"', 'input = "mel"')
    rewrite(folder, "[duplex]", "[projector]\nencoder_size = 32\nllm_hidden_size = 32\n\n[duplex]")
    with pytest.raises(CheckpointError, match="'mel' must be one of llm\\+projector, encoder"):
        load_checkpoint(folder)


def test_a_connector_trained_with_another_llm_is_refused_with_both_hashes_and_what_to_run(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path)
    path = folder / "checkpoint.toml"
    path.write_text(
        path.read_text() + '\n[files.llm]\ntensors_sha256 = "b1"\n\n[files.output_projector]\nllm_sha256 = "a0"\n'
    )
    with pytest.raises(CheckpointError, match=r"output_projector.*llm a0.*llm b1.*minmo train 2a"):
        load_checkpoint(folder)
    path.write_text(path.read_text().replace('"b1"', '"a0"'))
    load_checkpoint(folder)


def test_an_empty_folder_says_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint\.toml: not there"):
        load_checkpoint(tmp_path)


def test_settings_out_of_range_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"runtime\.max_streams = 0: must be from 1 to 256"):
        RuntimeConfig(max_streams=0)


def test_with_every_connector_no_bridge_stands(tmp_path: Path) -> None:
    dims = {**TINY, "projector": PROJECTOR, "duplex": {"input_size": 128}}
    checkpoint = load_checkpoint(write_random_checkpoint(tmp_path, dims=dims))
    assert checkpoint.bridges == () and not checkpoint.warnings


def test_a_connector_without_weights_is_bridged_not_random(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path)
    (folder / "output_projector.safetensors").unlink()
    checkpoint = load_checkpoint(folder)
    assert "out" in checkpoint.bridges and not checkpoint.untrained and checkpoint.warnings


def test_a_voice_tokenizer_of_zeros_is_untrained_and_a_changed_one_refused(tmp_path: Path) -> None:
    copy = tmp_path / "nano"
    shutil.copytree(NANO, copy)
    path, contents = copy / "voice_tokenizer.safetensors", (copy / "checkpoint.toml").read_text()
    save_file({key: torch.zeros_like(tensor) for key, tensor in load_file(path).items()}, path)
    with pytest.raises(CheckpointError, match="voice_tokenizer.safetensors: sha256"):
        load_checkpoint(copy)
    listed = tomllib.loads(contents)["files"]["voice_tokenizer"]["sha256"]
    (copy / "checkpoint.toml").write_text(contents.replace(listed, file_hash(path)))
    assert load_checkpoint(copy).label == "nano UNTRAINED(voice_tokenizer)"
