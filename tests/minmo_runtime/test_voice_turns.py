"""A trained input projector in service: the LLM reads the caller's voice at the places and in the numbers of training,
and answers as the plain twin does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from minmo_runtime import plain
from minmo_runtime.api import CancelReply, Caption, DuplexPrediction, OpenStream, PushAudio, PushText, StartReply
from minmo_runtime.config import RuntimeConfig
from minmo_runtime.conversation import AudioVector, Conversation, Message
from minmo_runtime.hearing import Hearing
from minmo_runtime.prefill import input_vectors
from minmo_runtime.random_checkpoint import TINY, write_random_checkpoint
from minmo_runtime.reply import ReplyPhase
from minmo_runtime.stream import Stream
from minmo_runtime.training.alignment import AlignmentTask
from minmo_runtime.training.alignment_calls import AUDIO, gated, lay_out, served_features
from minmo_runtime.training.dialogues import Turn
from minmo_runtime.training.voicing import voiced_packets
from minmo_runtime.weights import Checkpoint, load_checkpoint
from tests.minmo_runtime.test_engine_plain import SYSTEM, Room, assert_same

PROJECTOR = {"encoder_size": 32, "llm_hidden_size": 32, "ffn_size": 32, "num_heads": 2, "num_pieces": 500}
CONFIG = RuntimeConfig(max_streams=2, max_reply_tokens=8, max_voice_tokens=50, sound_rows=2, draft_probability=1.0)
PACKET = 320
CHUNK = 16  # fbank frames


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(
        tmp_path_factory.mktemp("voice"), dims={**TINY, "projector": PROJECTOR}, without=("duplex",)
    )


@pytest.fixture
def checkpoint(folder: Path) -> Checkpoint:
    loaded = load_checkpoint(folder)
    projector = loaded.modules.projector
    assert projector is not None
    torch.nn.init.normal_(projector.piece_table, 0.0, 0.2, generator=torch.Generator().manual_seed(1))
    return loaded


def speech(seconds: float, seed: int) -> NDArray[np.float32]:
    """Buzzing syllables between two silences, 16 kHz, in [-1, 1]: the gate hears one stretch."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * 16_000)) / 16_000
    pitch = rng.uniform(100, 200)
    buzz = sum(np.sin(2 * np.pi * pitch * k * time) / k for k in range(1, 20))
    envelope = 0.4 + 0.6 * np.sin(2 * np.pi * 4 * time + rng.uniform(0, 6)) ** 2
    lead, tail = np.zeros(8000), np.zeros(4800)
    return (np.concatenate([lead, 0.2 * buzz * envelope, tail]) + rng.normal(0, 1e-3, len(time) + 12_800)).astype("f4")


def speak(room: Room, waveform: NDArray[np.float32], start: int = 0, call_id: str = "c") -> int:
    """Push it as the leg does; returns the input clock behind it."""
    pcm = (waveform * 32767).round().clip(-32768, 32767).astype("<i2")
    for index, voiced in enumerate(voiced_packets(pcm)):
        piece = pcm[index * PACKET : (index + 1) * PACKET].tobytes()
        at = start + index * PACKET
        room.send(PushAudio(call_id=call_id, pcm=piece, start_sample=at, voiced=bool(voiced)))
        while room.engine.has_work(room.now):
            room.step()
    return start + len(pcm) // PACKET * PACKET


def opened(checkpoint: Checkpoint, config: RuntimeConfig = CONFIG, call_id: str = "c") -> tuple[Room, Stream]:
    room = Room(checkpoint, config)
    room.send(OpenStream(call_id=call_id, system_prompt=SYSTEM, seed=1))
    return room, room.engine.streams[call_id]


def until_decoding(room: Room, stream: Stream) -> list:
    """The context that the reply is drawn behind."""
    room.send(StartReply(call_id="c", turn_id="r"))
    while not stream.replies or stream.replies[0].phase in (ReplyPhase.LISTENING, ReplyPhase.PREFILL):
        assert room.step()
    return list(stream.conversation.target_ids)


def heard(checkpoint: Checkpoint, waveform: NDArray[np.float32]) -> Message:
    """The same turn by the plain twin."""
    (pcm,) = gated(waveform)
    return Message("user", plain.hear(checkpoint, pcm), tuple(plain.hear_audio(checkpoint, pcm)))


def test_the_bridge_falls_away_with_the_projectors_file_alone(folder: Path, tmp_path: Path) -> None:
    assert "in" not in load_checkpoint(folder).bridges
    bridged = write_random_checkpoint(tmp_path, dims={**TINY, "projector": PROJECTOR})
    (bridged / "projector.safetensors").unlink()
    assert "in" in load_checkpoint(bridged).bridges


@torch.inference_mode()
def test_a_training_call_replayed_through_the_engine_has_the_same_positions_and_inputs(checkpoint: Checkpoint) -> None:
    first, second = speech(1.3, 1), speech(0.9, 2)
    room, stream = opened(checkpoint)
    clock = speak(room, first)
    until_decoding(room, stream)
    room.run()
    said = stream.conversation.messages[2:]
    assert [message.role for message in said] == ["assistant"]
    clock = speak(room, second, clock)
    served = until_decoding(room, stream)

    turns = (Turn("system", SYSTEM), Turn("user", "one"), Turn("assistant", said[0].text, True), Turn("user", "two"))
    features = [served_features(gated(waveform)[0], CHUNK) for waveform in (first, second)]
    trained = lay_out(turns, features, checkpoint.text_tokenizer)
    opening = checkpoint.text_tokenizer.encode("<|im_start|>assistant\n")
    assert [AUDIO if isinstance(p, AudioVector) else p for p in served] == [*trained.ids.tolist(), *opening]
    assert trained.ids.tolist().count(AUDIO) >= 20

    modules = checkpoint.modules
    assert modules.projector is not None
    task = AlignmentTask(modules.encoder, modules.projector, modules.llm, None, 0.0)
    wanted = task.embed([trained])[0][0]
    read = input_vectors(modules.llm, [served])[0, : len(wanted)]
    # Training keeps features in 16 bits.
    torch.testing.assert_close(read, wanted, atol=0.02 * float(wanted.abs().max()), rtol=0)


def test_a_spoken_question_is_answered_as_by_the_plain_twin_whoever_shares_the_batch(checkpoint: Checkpoint) -> None:
    room, _ = opened(checkpoint)
    room.send(OpenStream(call_id="other", system_prompt="another shop.", seed=2))
    waveforms = {"c": speech(1.0, 3), "other": speech(1.4, 4)}
    for call_id, waveform in waveforms.items():
        speak(room, waveform, call_id=call_id)
    for call_id in waveforms:
        room.send(StartReply(call_id=call_id, turn_id="r"))
    room.run()
    for call_id, system, seed in (("c", SYSTEM, 1), ("other", "another shop.", 2)):
        message = heard(checkpoint, waveforms[call_id])
        assert [caption.text for caption in room.of(Caption, call_id)][-1] == message.text
        assert_same(room, call_id, plain.answer(checkpoint, [Message("system", system), message], seed, CONFIG))


def test_the_voice_is_fed_while_the_caller_speaks_and_never_twice(checkpoint: Checkpoint) -> None:
    room, stream = opened(checkpoint)
    waveform = speech(1.2, 5)
    speak(room, waveform)
    ahead = len(stream.conversation.cached_ids)
    assert sum(isinstance(p, AudioVector) for p in stream.conversation.cached_ids) >= 12
    target = until_decoding(room, stream)
    assert len(target) - ahead <= 30  # the end of the turn and the opening of the answer: bytes here
    assert room.engine.runner.prefill.num_positions == len(target)
    (reply,) = stream.replies
    assert len(reply.query_hidden) == sum(isinstance(p, AudioVector) for p in target)  # kept as they passed


def test_a_turn_that_was_not_over_is_given_back_with_its_voice(checkpoint: Checkpoint) -> None:
    room, stream = opened(checkpoint)
    clock = speak(room, speech(0.8, 6))
    first = until_decoding(room, stream)
    room.send(CancelReply(call_id="c", turn_id="r", played_samples=0, reason="false_end"))
    fed = room.engine.runner.prefill.num_positions
    speak(room, speech(0.7, 7), clock)
    both = until_decoding(room, stream)
    voices = [[p for p in ids if isinstance(p, AudioVector)] for ids in (first, both)]
    assert voices[1][: len(voices[0])] == voices[0] and len(voices[1]) > len(voices[0]) + 5
    assert room.engine.runner.prefill.num_positions - fed <= len(both) - first.index(voices[0][-1])


def test_digits_from_the_keypad_stand_for_the_turn(checkpoint: Checkpoint) -> None:
    room, stream = opened(checkpoint)
    speak(room, speech(0.8, 8))
    room.send(PushText(call_id="c", text="keypad 4 5 6"))
    assert not any(isinstance(p, AudioVector) for p in until_decoding(room, stream))
    assert stream.conversation.messages[-1] == Message("user", "keypad 456")


def test_sound_without_words_does_not_reach_the_llm(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hearing, "_ctc_text", lambda self, tokens: "")
    room, stream = opened(checkpoint)
    speak(room, speech(0.8, 9))
    room.run()
    assert not stream.conversation.opening
    assert not any(isinstance(p, AudioVector) for p in stream.conversation.cached_ids)


def test_a_draft_answers_the_voice_and_what_it_read_stays_when_the_caller_goes_on(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["where is my order"]
    monkeypatch.setattr(Hearing, "_ctc_text", lambda self, tokens: words[0])
    room, stream = opened(checkpoint, RuntimeConfig(**{**vars(CONFIG), "draft_probability": 0.2}))
    clock = speak(room, speech(0.8, 10))
    stream.predicted(DuplexPrediction(call_id="c", sample=clock, user_done=0.5, user_continues=0.5), room.now)
    draft = stream.drafting.reply
    assert draft is not None
    while room.engine.has_work(room.now):
        room.step()
    drafted = [p for p in stream.conversation.target_ids if isinstance(p, AudioVector)]
    assert len(drafted) >= 8
    fed = room.engine.runner.prefill.num_positions
    words[0] = "where is my order number five"
    speak(room, speech(0.5, 11), clock)
    assert stream.drafting.reply is None
    now_cached = [p for p in stream.conversation.cached_ids if isinstance(p, AudioVector)]
    assert now_cached[: len(drafted)] == drafted and len(now_cached) > len(drafted)
    assert room.engine.runner.prefill.num_positions - fed <= 2 * (len(now_cached) - len(drafted)) + 2


def test_numbers_of_a_spoken_turn_are_known_by_its_words(checkpoint: Checkpoint) -> None:
    conversation = Conversation(checkpoint.text_tokenizer, 400)
    conversation.add("user", "order 45612", [AudioVector(torch.zeros(32))] * 3)
    conversation.retarget("assistant")
    assert "45612" in checkpoint.text_tokenizer.decode(conversation.text_ids())
    assert sum(isinstance(p, AudioVector) for p in conversation.target_ids) == 3


def test_a_voice_without_end_keeps_its_latest_part(checkpoint: Checkpoint) -> None:
    conversation = Conversation(checkpoint.text_tokenizer, 100)
    voice = [AudioVector(torch.zeros(32)) for _ in range(90)]
    conversation.retarget("user", voice)
    assert [p for p in conversation.target_ids if isinstance(p, AudioVector)] == voice[-50:]
