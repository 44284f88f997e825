"""Profiles load the parents' own files, and calls run through the engine with them: bridges, re-runs, prompt voice."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from minmo_runtime.api import (
    AudioDelta,
    CancelReply,
    Caption,
    OpenStream,
    PushAudio,
    ReplyFinished,
    ReplyTruncated,
    RuntimeEvent,
    Say,
    StartReply,
    StreamFailed,
    StreamOpened,
    TextDelta,
)
from minmo_runtime.checkpoint_contents import CheckpointError, module_of, parts, toml_of
from minmo_runtime.config import RuntimeConfig
from minmo_runtime.engine import Engine
from minmo_runtime.full_context import SettledText
from minmo_runtime.profiles import (
    NANO,
    ProfileError,
    models_folder,
    profile_folder,
    profile_names,
    read_profile,
    references,
    sources,
    sources_of,
)
from minmo_runtime.weight_files import save_weights
from minmo_runtime.weights import Checkpoint, load_checkpoint
from tests.minmo_runtime.public_files import write_public_checkpoint

CONFIG = RuntimeConfig(max_streams=2, max_reply_tokens=8, max_voice_tokens=60)
RATE = 16_000


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_public_checkpoint(tmp_path_factory.mktemp("public"))


@pytest.fixture
def checkpoint(public: tuple[Path, Path]) -> Checkpoint:
    return load_checkpoint(public[0], models=public[1])


# ------------------------------------------------------------------------- data


def test_shipped_profiles_are_named_and_an_unknown_one_is_refused_with_them() -> None:
    assert profile_names() == ("nano", "minmo-8b", "minmo-8b-paper", "minmo-small", "nano-human")
    assert profile_folder("nano") == NANO
    with pytest.raises(ProfileError, match="profile 'gpt': must be nano, minmo-8b, .*nano-human, or a folder"):
        profile_folder("gpt")


@pytest.mark.parametrize("name", profile_names())
def test_every_table_of_every_profile_builds_its_module(name: str) -> None:
    contents = read_profile(profile_folder(name))
    with torch.device("meta"):
        for part in parts():
            if part in contents:
                module_of(part, contents[part])


def test_every_public_file_a_profile_names_is_one_its_source_fetches() -> None:
    known = sources()
    for name in profile_names():
        contents = read_profile(profile_folder(name))
        for reference in references(contents):
            source, _, file = reference.partition(":")
            if source in known:
                assert file in known[source].files, reference
            else:  # made here, never fetched
                assert source in ("prompt_voice", name), reference
    assert [s.name for s in sources_of(read_profile(profile_folder("nano-human")))] == ["sensevoice-small"]
    assert all(s.licence and s.huggingface and s.modelscope for s in known.values())


def test_models_folder_is_the_setting_then_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MINMO_MODELS", str(tmp_path / "b"))
    assert models_folder(str(tmp_path / "a")) == tmp_path / "a"
    assert models_folder() == tmp_path / "b"
    monkeypatch.delenv("MINMO_MODELS")
    assert models_folder().parts[-2:] == ("minmo", "models")


# ---------------------------------------------------------------------- loading


def test_public_files_load_under_the_parents_names(checkpoint: Checkpoint) -> None:
    assert checkpoint.bridges == ("in", "out", "duplex") and not checkpoint.untrained
    assert checkpoint.voice_text is not None and checkpoint.prompt_voice is not None
    assert not any("parametrizations" in key for key in checkpoint.modules.vocoder.state_dict())
    assert float(checkpoint.modules.encoder.cmvn_shift[0]) == -8.0
    assert checkpoint.voice_text.encode("hello") != checkpoint.text_tokenizer.encode("hello")
    assert checkpoint.voice_text.special("<|endofprompt|>") == 261  # behind BlankEN's own three


def test_shards_hold_what_one_file_would(public: tuple[Path, Path], checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder, models = write_public_checkpoint(tmp_path, "minmo-small")
    whole = load_checkpoint(folder, models=models).modules.llm.state_dict()
    sharded = checkpoint.modules.llm.state_dict()
    assert "lm_head.weight" in sharded and "lm_head.weight" not in whole  # 7B's head is its own
    assert torch.equal(sharded["model.norm.weight"], whole["model.norm.weight"])


def test_a_missing_public_file_names_the_command_that_brings_it(public: tuple[Path, Path], tmp_path: Path) -> None:
    models = tmp_path / "models"
    shutil.copytree(public[1], models)
    (models / "cosyvoice2-0.5b" / "flow.pt").unlink()
    with pytest.raises(CheckpointError, match=r"flow\.pt: not there; run `minmo models fetch minmo-8b`"):
        load_checkpoint(public[0], models=models)


def test_a_bridge_falls_away_when_its_connector_lies_in_the_profiles_folder(tmp_path: Path) -> None:
    folder, models = write_public_checkpoint(tmp_path)
    contents = read_profile(folder)
    sizes = {"llm_hidden_size": contents["llm"]["hidden_size"], "semantic_size": contents["voice_lm"]["hidden_size"]}
    contents["output_projector"] |= sizes
    (folder / "checkpoint.toml").write_text(toml_of(contents))
    save_weights(
        module_of("output_projector", contents["output_projector"]),
        models / "minmo-8b" / "output_projector.safetensors",
    )
    checkpoint = load_checkpoint(folder, models=models)
    assert checkpoint.bridges == ("in", "duplex")
    call = Call(checkpoint)
    call.events += call.engine.receive(Say(call_id="c", turn_id="1", text="hello you"), call.now)
    call.run()
    assert call.of(AudioDelta) and not call.of(StreamFailed)


def test_a_missing_shard_is_named(public: tuple[Path, Path], tmp_path: Path) -> None:
    models = tmp_path / "models"
    shutil.copytree(public[1], models)
    (models / "qwen2.5-7b-instruct" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors: named in .*index\.json, but not"):
        load_checkpoint(public[0], models=models)


def test_a_torch_file_with_code_in_it_is_not_loaded(public: tuple[Path, Path], tmp_path: Path) -> None:
    models = tmp_path / "models"
    shutil.copytree(public[1], models)
    torch.save({"weight": torch.zeros(1), "run": Path("x")}, models / "cosyvoice2-0.5b" / "flow.pt")
    with pytest.raises(CheckpointError, match=r"flow\.pt: holds more than tensors and is not loaded"):
        load_checkpoint(public[0], models=models)


def test_without_a_prompt_voice_it_loads_and_asks_for_one(public: tuple[Path, Path], tmp_path: Path) -> None:
    models = tmp_path / "models"
    shutil.copytree(public[1], models)
    shutil.rmtree(models / "prompt_voice")
    checkpoint = load_checkpoint(public[0], models=models)
    assert any("no prompt voice; `minmo models voice`" in warning for warning in checkpoint.warnings)


# ------------------------------------------------------------------ whole calls


class Call:
    """One call in virtual time."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.engine, self.now, self.events = Engine(checkpoint, CONFIG), 0.0, list[RuntimeEvent]()
        self.events += self.engine.receive(OpenStream(call_id="c", system_prompt="be kind"), 0.0)
        self.clock = 0
        self.run()

    def run(self) -> None:
        for _ in range(5000):
            self.events += self.engine.step(self.now)
            if not self.engine.has_work(self.now):
                self.now += 0.1
                if not self.engine.has_work(self.now) and not self.engine.has_replies:
                    return
        raise AssertionError("the engine does not come to rest")

    def speak(self, seconds: float, seed: int = 0) -> None:
        """Voiced noise in packets of 20 ms, with the engine running between them; then the silence of the hangover."""
        loud = np.random.default_rng(seed).normal(0, 3000, round(seconds * RATE)).astype("<i2")
        quiet = np.zeros(round(0.8 * RATE), "<i2")
        for pcm, voiced in ((loud, True), (quiet, False)):
            for start in range(0, len(pcm), 320):
                packet = pcm[start : start + 320].tobytes()
                request = PushAudio(call_id="c", pcm=packet, start_sample=self.clock, voiced=voiced)
                self.events += self.engine.receive(request, self.now)
                self.clock += len(packet) // 2
                while self.engine.has_work(self.now):
                    self.events += self.engine.step(self.now)
                self.now += 0.02

    def of(self, kind: type) -> list:
        return [event for event in self.events if isinstance(event, kind)]


def test_a_call_through_all_three_bridges_is_heard_and_answered(checkpoint: Checkpoint) -> None:
    call = Call(checkpoint)
    assert call.of(StreamOpened)[0].bridges == ("in", "out", "duplex")
    call.speak(1.5)
    captions = call.of(Caption)
    assert captions and captions[-1].is_final and captions[-1].text
    stream = call.engine.streams["c"]
    # Settled words are in the LLM's cache before anybody has decided that the turn is over.
    ahead = checkpoint.text_tokenizer.decode(stream.conversation.cached_ids)
    assert captions[-1].text.lower() in ahead
    call.events += call.engine.receive(StartReply(call_id="c", turn_id="1"), call.now)
    call.run()
    assert not call.of(StreamFailed)
    assert call.of(ReplyFinished)[0].text == "".join(event.text for event in call.of(TextDelta))


def test_a_fixed_sentence_is_said_in_spoken_form_with_the_prompts_voice(checkpoint: Checkpoint) -> None:
    call = Call(checkpoint)
    call.events += call.engine.receive(Say(call_id="c", turn_id="1", text="That is **$12.50** today."), call.now)
    while not call.engine.streams["c"].replies[0].voice:
        call.events += call.engine.step(call.now)
    reply = call.engine.streams["c"].replies[0]
    said = checkpoint.voice_text.decode(checkpoint.voice_text.encode(checkpoint.prompt_voice.text))
    assert said == checkpoint.prompt_voice.text
    call.run()
    vectors = torch.stack(reply.voice.semantic)
    spoken = checkpoint.prompt_voice.text, "That is twelve dollars and fifty cents today."
    ids = [token for text in spoken for token in checkpoint.voice_text.encode(text)]
    assert torch.equal(vectors, checkpoint.modules.voice_lm.text_vectors(torch.tensor(ids)))
    assert call.of(ReplyFinished)[0].text == "That is **$12.50** today."  # the transcript keeps what was written
    samples = sum(len(event.pcm) // 2 for event in call.of(AudioDelta))
    # Only the new tokens sound: the prompt is continued, not repeated.
    assert samples == len(reply.voice.turn.voice_tokens) * 960


def test_a_cut_turn_finds_its_heard_words_with_a_full_context_encoder(checkpoint: Checkpoint) -> None:
    call = Call(checkpoint)
    call.events += call.engine.receive(Say(call_id="c", turn_id="1", text="one two three four five."), call.now)
    while not call.of(AudioDelta):
        call.events += call.engine.step(call.now)
    request = CancelReply(call_id="c", turn_id="1", played_samples=4800, reason="interrupt")
    call.events += call.engine.receive(request, call.now)
    call.run()
    truncated = call.of(ReplyTruncated)[0]
    assert truncated.generated_text.startswith(truncated.heard_text) and not call.of(StreamFailed)


def test_words_that_a_later_run_takes_back_are_cut_from_the_llms_cache(checkpoint: Checkpoint) -> None:
    call = Call(checkpoint)
    stream = call.engine.streams["c"]
    stream.expect_user_turn("i want to sell")
    call.run()
    with_wrong = list(stream.conversation.cached_ids)
    stream.expect_user_turn("i want to send")
    call.run()
    decoded = checkpoint.text_tokenizer.decode(stream.conversation.cached_ids)
    assert decoded.endswith("i want to send") and stream.conversation.cached_ids != with_wrong
    assert call.engine.runner.llm_cache.lengths[stream.slot] == len(stream.conversation.cached_ids)


def test_only_what_two_runs_agree_on_has_settled() -> None:
    text = SettledText()
    assert text.push([1, 2, 3]) == []
    assert text.push([1, 2, 4, 5]) == [1, 2]
    assert text.push([1, 9, 4, 5]) == [1]  # taken back
    assert text.push([1, 9, 4, 5, 6]) == [1, 9, 4, 5]


def test_nano_human_hears_with_sensevoice_and_speaks_with_nano(tmp_path: Path) -> None:
    folder, models = write_public_checkpoint(tmp_path, "nano-human")
    checkpoint = load_checkpoint(folder, models=models)
    nano = load_checkpoint(NANO)
    assert checkpoint.modules.encoder.dims.front_end == "lfr" and "in" in checkpoint.bridges
    assert torch.equal(checkpoint.modules.llm.logits(torch.ones(1, 256)), nano.modules.llm.logits(torch.ones(1, 256)))
    assert checkpoint.voice_text is None  # nano's voice reads the LLM's own ids
    call = Call(checkpoint)
    call.speak(1.0)
    call.events += call.engine.receive(StartReply(call_id="c", turn_id="1"), call.now)
    call.run()
    assert call.of(Caption) and call.of(ReplyFinished) and not call.of(StreamFailed)
