"""Stages 1a-1c: callers come through the gate of service; what is shipped fits together or is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from minmo_runtime.checkpoint_contents import CheckpointError, module_of, parts
from minmo_runtime.model.lora import Lora, LoraDims
from minmo_runtime.model.projector import InputProjector, ProjectorDims
from minmo_runtime.random_checkpoint import TINY, byte_tokenizer, letter_tokenizer
from minmo_runtime.training import alignment
from minmo_runtime.training.alignment import AlignmentTask
from minmo_runtime.training.alignment_calls import gated, served_features
from minmo_runtime.training.resume import load_tensors, save_tensors
from minmo_runtime.training.served_llm import llm_hash, load_served_llm, lora_of
from minmo_runtime.training.ship import assemble
from minmo_runtime.training.stage import load_stage
from minmo_runtime.weights import load_checkpoint

PROJECTOR = ProjectorDims(32, 32, num_heads=2, ffn_size=32, num_pieces=500)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A training work folder with every part at random."""
    ship = tmp_path / "ship"
    ship.mkdir()
    byte_tokenizer().save(str(ship / "text_tokenizer.json"))
    letter_tokenizer(500).save(str(ship / "ctc_tokenizer.json"))
    torch.manual_seed(0)
    for part in parts():
        if part in TINY and part != "output_projector":
            module = module_of(part, TINY[part])
            save_tensors(ship / f"{part}.safetensors", module.state_dict(), {"dims": json.dumps(TINY[part])})
            (ship / f"{part}.json").write_text(json.dumps(TINY[part]))
    return tmp_path


def task_of(work: Path, lora_rank: int = 0) -> AlignmentTask:
    llm, encoder = module_of("llm", TINY["llm"]), module_of("encoder", TINY["encoder"])
    llm.load_state_dict(load_tensors(work / "ship" / "llm.safetensors")[0])
    encoder.load_state_dict(load_tensors(work / "ship" / "encoder.safetensors")[0])
    lora = Lora(llm, LoraDims(rank=lora_rank)) if lora_rank else None
    if lora is not None:
        for tensor in lora.tensors.values():
            torch.nn.init.normal_(tensor, 0.0, 0.3)
    return AlignmentTask(encoder, InputProjector(PROJECTOR), llm, lora, 0.0)


def ship_stage(work: Path, name: str, task: AlignmentTask) -> None:
    state = dict(task.state_dict())
    alignment.ship(load_stage(name), work, task, state)


def test_the_additions_of_1c_are_in_the_llm_that_is_served(work: Path, tmp_path: Path) -> None:
    task = task_of(work, lora_rank=4)
    ship_stage(work, "1c", task)
    assert lora_of(work / "ship") is not None
    remarks = assemble(work / "ship", tmp_path / "out", dtype="float32")
    checkpoint = load_checkpoint(tmp_path / "out")
    assert "in" not in checkpoint.bridges and any("additions of stage 1c" in remark for remark in remarks)
    ids = torch.randint(0, 264, (1, 9))
    with torch.no_grad():
        served, trained = checkpoint.modules.llm(ids), task.llm(ids)  # the task's layers add theirs as they go
        stage_2a = load_served_llm(work)[0](ids)
    torch.testing.assert_close(served, trained, atol=0.05, rtol=0.05)  # additions are kept in bfloat16
    torch.testing.assert_close(stage_2a, served, atol=1e-5, rtol=1e-5)


def test_behind_captions_as_text_the_llm_is_the_base(work: Path, tmp_path: Path) -> None:
    ship_stage(work, "1c", task_of(work, lora_rank=4))
    assemble(work / "ship", tmp_path / "out", without=("projector",), dtype="float32")
    checkpoint = load_checkpoint(tmp_path / "out")
    assert "in" in checkpoint.bridges
    base = load_tensors(work / "ship" / "llm.safetensors")[0]
    assert all(torch.equal(tensor, base[name]) for name, tensor in checkpoint.modules.llm.state_dict().items())


@pytest.mark.parametrize("part", ["llm", "encoder"])
def test_a_projector_behind_a_part_trained_anew_is_refused(work: Path, tmp_path: Path, part: str) -> None:
    ship_stage(work, "1c", task_of(work, lora_rank=4))
    path = work / "ship" / f"{part}.safetensors"
    tensors, metadata = load_tensors(path)
    tensors[next(name for name in tensors if name.endswith("weight"))] += 0.5
    save_tensors(path, tensors, metadata)
    assert (lora_of(work / "ship") is None) == (part == "llm")
    with pytest.raises(CheckpointError, match=f"projector was trained with the {part} .*minmo train 1a"):
        assemble(work / "ship", tmp_path / "out")
    if part == "llm":
        with pytest.raises(ValueError, match="run stage 1a first"):
            alignment.load_projector(work / "ship" / "projector.safetensors", llm_hash(work / "ship"))


def test_additions_of_an_earlier_run_are_not_folded_into_a_base_that_1a_heard(work: Path) -> None:
    ship_stage(work, "1c", task_of(work, lora_rank=4))
    with_additions = llm_hash(work / "ship")
    ship_stage(work, "1a", task_of(work))
    assert lora_of(work / "ship") is None and llm_hash(work / "ship") != with_additions


def test_a_sentence_is_heard_with_the_pre_roll_and_whole_chunks_of_service() -> None:
    rate = 16_000
    time = np.arange(int(1.5 * rate)) / rate
    buzz = sum(np.sin(2 * np.pi * 140 * k * time) / k for k in range(1, 20)) * (
        0.5 + 0.5 * np.sin(2 * np.pi * 4 * time)
    )
    waveform = np.concatenate([np.zeros(rate), 0.2 * buzz, np.zeros(2 * rate), 0.2 * buzz, np.zeros(3000)])
    waveform = (waveform + np.random.default_rng(0).normal(0, 1e-3, len(waveform))).astype("f4")
    first, second = gated(waveform)  # a pause longer than the hangover parts them
    # 480 ms before the onset and 640 ms behind the last voiced packet, not the whole silence.
    assert 1.5 * rate < len(first) < (1.5 + 0.48 + 0.64 + 0.3) * rate
    assert len(second) < (1.5 + 0.48 + 0.3) * rate  # ends with the waveform
    features = served_features(first, 16)
    assert len(features) % 16 == 0 and features.dtype == np.float16
    assert abs(len(features) / 100 - len(first) / rate) < 0.2
