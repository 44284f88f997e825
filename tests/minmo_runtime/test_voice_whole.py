"""Connectors behind an encoder that sees whole segments (the public profiles): the LLM reads what two runs agree on,
and the paper's predictor is answered all the same."""

from __future__ import annotations

import pytest
import torch

from minmo_runtime.api import Caption, DuplexPrediction, ReplyFinished, StartReply, StreamFailed, StreamOpened
from minmo_runtime.checkpoint_contents import module_of, toml_of
from minmo_runtime.conversation import AudioVector
from minmo_runtime.full_context import SettledVoice
from minmo_runtime.hearing import Hearing
from minmo_runtime.profiles import read_profile
from minmo_runtime.weight_files import save_weights
from minmo_runtime.weights import Checkpoint, load_checkpoint
from tests.minmo_runtime.public_files import write_public_checkpoint
from tests.minmo_runtime.test_profiles import Call


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """minmo-8b in small sizes with every connector."""
    folder, models = write_public_checkpoint(tmp_path_factory.mktemp("whole"))
    contents = read_profile(folder)
    llm, voice = contents["llm"]["hidden_size"], contents["voice_lm"]["hidden_size"]
    contents["projector"] |= {
        "encoder_size": contents["encoder"]["output_size"], "llm_hidden_size": llm, "ffn_size": 32, "num_heads": 2
    }  # fmt: skip
    contents["output_projector"] |= {"llm_hidden_size": llm, "semantic_size": voice}
    contents["duplex"] |= {"input_size": 4 * llm, "hidden_size": 32, "num_heads": 2, "ffn_size": 32}
    (folder / "checkpoint.toml").write_text(toml_of(contents))
    torch.manual_seed(0)
    for part in ("projector", "output_projector", "duplex"):
        save_weights(module_of(part, contents[part]), models / "minmo-8b" / f"{part}.safetensors")
    return load_checkpoint(folder, models=models)


def test_a_call_without_any_bridge_is_heard_predicted_and_answered(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Hearing, "_ctc_text", lambda self, tokens: "hello")
    call = Call(checkpoint)
    assert call.of(StreamOpened)[0].bridges == ()
    call.speak(1.5)
    assert call.of(Caption)[-1].is_final
    stream = call.engine.streams["c"]
    read = [p for p in stream.conversation.cached_ids if isinstance(p, AudioVector)]
    # 60 ms a position: pre-roll, speech and hangover.
    assert 30 <= len(read) <= 50
    assert len(call.of(DuplexPrediction)) == call.clock // 1280  # none is left waiting
    call.events += call.engine.receive(StartReply(call_id="c", turn_id="1"), call.now)
    call.run()
    assert not call.of(StreamFailed) and call.of(ReplyFinished)
    message = stream.conversation.messages[1]
    assert (message.role, message.text, list(message.audio)) == ("user", "hello", read)


def test_only_positions_that_two_runs_agree_on_are_read_and_they_keep_their_identity() -> None:
    run = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    voice = SettledVoice()
    assert voice.push(run[:3], is_last=False) == []
    first = voice.push(torch.cat([run[:2] * 1.01, run[2:3] * 2, run[3:4]]), is_last=False)
    assert len(first) == 2
    again = voice.push(torch.cat([run[:2], run[2:3] * 2, run[3:5]]), is_last=False)
    assert again[:2] == first and len(again) == 4
    back = voice.push(torch.cat([run[:1], run[1:2] * 3, run[2:3] * 2, run[3:6]]), is_last=True)
    assert back[0] is first[0] and back[1] is not first[1] and len(back) == 6
    assert torch.equal(back[5].vector, run[5])
