"""Stages: gates, freezing by hash, resuming, the chain that stops at a failed gate."""

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import minmo_runtime
from minmo_runtime.model.backbone import Backbone
from minmo_runtime.model.dims import BackboneDims
from minmo_runtime.text import TextTokenizer
from minmo_runtime.training.dialogues import dialogue
from minmo_runtime.training.freeze import (
    FrozenTensorChanged,
    changed_frozen,
    only_trainable,
    shipped_hashes,
    tensor_hash,
)
from minmo_runtime.training.loop import LoopSettings, StepLoop, schedule
from minmo_runtime.training.overfit import learn_to_answer, turns_right
from minmo_runtime.training.stage import STAGES_DIR, Gate, load_stage, parse_stage
from minmo_runtime.training.train import GateFailed, expand, train

NANO = Path(minmo_runtime.__file__).parent / "checkpoints" / "nano"
TOML = """
name = "{name}"
title = "test"
module = "{module}"
parts = ["a"]
trainable = ["a.layer.*"]
[settings]
x = 1
[[gate]]
metric = "wer"
at_most = 0.1
count = "words"
min_count = 100
"""


def stage_of(**changes):
    table = {"name": "9x", "title": "t", "module": "m", "parts": ["a"], "trainable": ["a.layer.*"], **changes}
    return parse_stage(table)


@pytest.mark.parametrize(
    ("gate", "metrics", "passed"),
    [
        ({"metric": "wer", "at_most": 0.1}, {"wer": 0.1}, True),
        ({"metric": "wer", "at_most": 0.1}, {"wer": 0.11}, False),
        ({"metric": "slots", "at_least": 0.97}, {"slots": 0.98}, True),
        ({"metric": "w", "at_most_of": "s", "ratio": 1.3, "margin": 0.03}, {"w": 0.064, "s": 0.035}, True),
        ({"metric": "w", "at_most_of": "s", "ratio": 1.3, "margin": 0.03}, {"w": 0.066, "s": 0.035}, False),
        ({"metric": "w", "at_most_of": "s", "ratio": 1.3, "margin": 0.03}, {"w": 0.25, "s": 0.20}, True),
        ({"metric": "s", "at_least_of": "b", "margin": 0.0}, {"s": 0.5, "b": 0.51}, False),
        ({"metric": "wer", "at_most": 0.1, "count": "n", "min_count": 10}, {"wer": 0.0, "n": 9}, False),
        ({"metric": "wer", "at_most": 0.1}, {}, False),
    ],
)
def test_gate(gate, metrics, passed):
    result = Gate(**gate).check(metrics)
    assert result.passed is passed
    assert str(result).startswith("pass" if passed else "FAIL")


def test_a_gate_has_exactly_one_bar():
    with pytest.raises(ValueError, match="exactly one"):
        Gate("wer", at_most=0.1, at_least=0.0)


def test_unknown_stage_key_is_refused_by_name():
    with pytest.raises(ValueError, match="unknown key trainble"):
        stage_of(trainble=["x"])


def test_every_shipped_stage_file_is_readable_and_trains_only_its_own_parts():
    names = [path.stem for path in STAGES_DIR.glob("*.toml")]
    assert "0h" in names
    for name in names:
        stage = load_stage(name)
        assert stage.trainable or not stage.parts, name
        for pattern in stage.trainable:
            assert pattern.split(".", 1)[0] in stage.parts, (name, pattern)


def test_groups_expand_in_order():
    assert expand(["0h", "connectors"]) == ["0h", "1a", "1b", "1c", "2a", "2b", "3", "4"]


def test_schedule_warms_up_stays_flat_and_ends_at_zero():
    settings = LoopSettings(warmup_steps=10, flat_share=0.5)
    assert schedule(0.0, 0, settings) == pytest.approx(0.1)
    assert schedule(0.4, 50, settings) == 1.0
    assert schedule(0.75, 90, settings) == pytest.approx(0.5)
    assert schedule(1.0, 100, settings) == 0.0


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 2)


def test_only_named_tensors_get_gradients_and_others_are_asserted_unchanged():
    module = Small()
    with only_trainable(stage_of(), {"a": module}) as trainable:
        assert trainable == ["a.layer.weight", "a.layer.bias"]
        assert [name for name, p in module.named_parameters() if p.requires_grad] == ["layer.weight", "layer.bias"]
        with torch.no_grad():
            module.layer.weight.add_(1)
    with (
        pytest.raises(FrozenTensorChanged, match="a.frozen.bias"),
        only_trainable(stage_of(), {"a": module}),
        torch.no_grad(),
    ):
        module.frozen.bias.add_(1e-6)


def test_a_stage_without_anything_to_train_is_refused():
    with pytest.raises(ValueError, match="no tensor"), only_trainable(stage_of(trainable=["b.*"]), {"a": Small()}):
        pass


def test_hash_sees_one_bit_and_the_type():
    x = torch.zeros(3)
    y = x.clone()
    y[1] = 1e-45
    assert tensor_hash(x) != tensor_hash(y)
    assert tensor_hash(x) != tensor_hash(x.half())


def test_own_tensors_and_named_parts_must_not_change_others_may():
    before = {"a.layer.w": "1", "a.head.w": "2", "b.w": "3"}
    after = {"a.layer.w": "9", "a.head.w": "8", "b.w": "4", "a.new": "5"}
    assert changed_frozen(before, after, stage_of()) == ["a.head.w", "a.new"]
    assert changed_frozen(before, after, stage_of(frozen_parts=["b"])) == ["a.head.w", "a.new", "b.w"]
    assert changed_frozen(before, after, stage_of(frozen_parts=["*"])) == ["a.head.w", "a.new", "b.w"]
    assert changed_frozen(before, before, stage_of(frozen_parts=["*"])) == []


def run_steps(folder, max_steps, stop_at=None):
    """A tiny run in which every step draws its batch from its number."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    settings = LoopSettings(
        max_steps=max_steps, warmup_steps=2, save_every_s=1e9, autocast_bf16=False, log_every_steps=5
    )
    loop = StepLoop(model, settings, folder, 1e9, lambda name, p: name == "0.weight")

    def loss_of(step):
        if step == stop_at:
            raise KeyboardInterrupt
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(16, 6, generator=generator), torch.randint(0, 3, (16,), generator=generator)
        return nn.functional.cross_entropy(model(x), y)

    try:
        loop.run(loss_of, lambda: None, lambda line: None)
    except KeyboardInterrupt:
        loop.save()
    return loop


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole = run_steps(tmp_path / "whole", 24)
    run_steps(tmp_path / "cut", 24, stop_at=11)
    resumed = run_steps(tmp_path / "cut", 24)
    assert whole.steps == resumed.steps == 24
    for name, tensor in whole.averaged_state().items():
        assert torch.equal(tensor, resumed.averaged_state()[name]), name
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def test_a_finished_run_does_no_more_steps(tmp_path):
    first = run_steps(tmp_path, 6)
    again = run_steps(tmp_path, 6, stop_at=0)
    assert again.steps == first.steps == 6


def fake_trainer(monkeypatch, name, run):
    module = types.ModuleType(name)
    module.run = run
    monkeypatch.setitem(sys.modules, f"minmo_runtime.training.{name}", module)


def write_stage(folder, name, module):
    (folder / f"{name}.toml").write_text(TOML.format(name=name, module=module))


def test_a_failed_gate_stops_the_chain_and_is_named(tmp_path, monkeypatch):
    ran = []

    def run(stage, work_dir, budget_s):
        ran.append(stage.name)
        return {"wer": 0.05 if stage.name == "s1" else 0.2, "words": 500}

    fake_trainer(monkeypatch, "fake_trainer", run)
    for name in ("s1", "s2", "s3"):
        write_stage(tmp_path, name, "fake_trainer")
    with pytest.raises(GateFailed, match=r"stage s2: gate not passed: wer: 0.2000 <= 0.1000, n = 500 words"):
        train(["s1", "s2", "s3"], tmp_path / "work", stages_dir=tmp_path, log=lambda line: None)
    assert ran == ["s1", "s2"]
    # Run again: what passed is not repeated, what failed is.
    with pytest.raises(GateFailed):
        train(["s1", "s2", "s3"], tmp_path / "work", stages_dir=tmp_path, log=lambda line: None)
    assert ran == ["s1", "s2", "s2"]
    result = json.loads((tmp_path / "work" / "stages" / "s2" / "result.json").read_text())
    assert result["gates"][0]["passed"] is False


def test_a_stage_that_writes_a_frozen_tensor_is_caught(tmp_path, monkeypatch):
    ship = tmp_path / "work" / "ship"
    ship.mkdir(parents=True)
    save_file({"layer.w": torch.zeros(2), "head.w": torch.zeros(2)}, ship / "a.safetensors")

    def run(stage, work_dir, budget_s):
        save_file({"layer.w": torch.ones(2), "head.w": torch.full((2,), 1e-3)}, ship / "a.safetensors")
        return {"wer": 0.0, "words": 500}

    fake_trainer(monkeypatch, "fake_trainer", run)
    write_stage(tmp_path, "s1", "fake_trainer")
    assert set(shipped_hashes(tmp_path / "work")) == {"a.layer.w", "a.head.w"}
    with pytest.raises(FrozenTensorChanged, match="a.head.w"):
        train(["s1"], tmp_path / "work", stages_dir=tmp_path, log=lambda line: None)


def test_a_failed_stage_gives_back_the_parts_it_found(tmp_path, monkeypatch):
    ship = tmp_path / "work" / "ship"
    ship.mkdir(parents=True)
    save_file({"layer.w": torch.zeros(2)}, ship / "a.safetensors")

    def run(stage, work_dir, budget_s):
        save_file({"layer.w": torch.ones(2)}, ship / "a.safetensors")
        return {"wer": 0.5, "words": 500}

    fake_trainer(monkeypatch, "fake_trainer", run)
    (tmp_path / "s1.toml").write_text(
        TOML.format(name="s1", module="fake_trainer").replace("[settings]", "restores_on_failure = true\n[settings]")
    )
    before = shipped_hashes(tmp_path / "work")
    with pytest.raises(GateFailed):
        train(["s1"], tmp_path / "work", stages_dir=tmp_path, log=lambda line: None)
    assert shipped_hashes(tmp_path / "work") == before
    assert (tmp_path / "work" / "stages" / "s1" / "failed" / "a.safetensors").exists()


def test_epoch_batches_hold_every_utterance_once_and_fit():
    from minmo_runtime.training.voice_lm import batches_of_epoch

    lengths = np.random.default_rng(0).integers(20, 300, 200)
    batches = batches_of_epoch(lengths, 2048, seed=1, epoch=3)
    assert sorted(np.concatenate(batches).tolist()) == list(range(200))
    assert all(len(batch) * lengths[batch].max() <= 2048 for batch in batches)
    again = batches_of_epoch(lengths, 2048, seed=1, epoch=3)
    assert all((a == b).all() for a, b in zip(batches, again, strict=True))


def test_written_form_takes_order_numbers_only():
    from minmo_runtime.training.voice_lm import written_form

    assert written_form("order four five six one two. one moment.") == "order 45612. one moment."
    assert written_form("from one oh five to nine thirty") == "from one oh five to nine thirty"


def test_lora_changes_nothing_at_first_and_merges_to_the_same_outputs():
    from minmo_runtime.model.backbone import Backbone
    from minmo_runtime.model.dims import BackboneDims
    from minmo_runtime.model.lora import Lora, LoraDims, merged

    dims = BackboneDims(32, 2, 2, 1, 48, vocab_size=20)
    llm = Backbone(dims).eval()
    ids = torch.randint(0, 20, (2, 9))
    before, base = llm(ids), {name: tensor.clone() for name, tensor in llm.state_dict().items()}
    lora = Lora(llm, LoraDims(rank=3), torch.Generator().manual_seed(0))
    lora.attach(llm)
    torch.testing.assert_close(llm(ids), before)
    with torch.no_grad():
        for tensor in lora.tensors.values():
            tensor.normal_()
    changed = llm(ids)
    assert (changed - before).abs().max() > 1e-3
    plain = Backbone(dims).eval()
    plain.load_state_dict(merged(base, lora.export(), lora.dims.scale))
    torch.testing.assert_close(plain(ids), changed, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(base[name], tensor) for name, tensor in llm.state_dict().items())


def test_a_call_is_learnt_by_heart_and_a_model_that_learnt_nothing_is_told_apart():
    tokenizer = TextTokenizer.from_file(NANO / "text_tokenizer.json")
    dims = BackboneDims(64, 2, 2, 2, 128, tokenizer.vocab_size)
    llm = Backbone(dims).init_weights(torch.Generator().manual_seed(0))
    calls = [dialogue(f"heart/{number}", "train", 0.0) for number in range(1)]
    assert turns_right(llm, tokenizer, calls) < 0.2
    learn_to_answer(llm, tokenizer, calls, load_stage("overfit"), 30.0)
    assert turns_right(llm, tokenizer, calls) == 1.0
