"""CosyVoice's ONNX files: right front ends and shapes, with small models of the same interface written by the test."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import soundfile
import torch
from onnx import TensorProto, helper

from minmo_runtime import prompt_voice
from minmo_runtime.prompt_voice import (
    PromptVoice,
    PromptVoiceError,
    SpeakerEncoderOnnx,
    SpeechTokenizer,
    prepare,
    read_prompt_voice,
    write_prompt_voice,
)
from minmo_runtime.whisper_mel import campplus_fbank, whisper_mel

RATE = 16_000


def save(folder: Path, name: str, nodes: list, inputs: list, output: tuple, initializers: list) -> Path:
    graph = helper.make_graph(nodes, name, inputs, [helper.make_tensor_value_info(*output)], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(folder / f"{name}.onnx"))
    return folder / f"{name}.onnx"


def tokenizer_file(folder: Path) -> Path:
    """feats [1, 128, T] and feats_length [1] -> ids [1, T / 4]: the sum over mels of every fourth frame, rounded."""
    nodes = [
        helper.make_node("ReduceSum", ["feats", "mels"], ["sums"], keepdims=0),
        helper.make_node("Slice", ["sums", "zero", "feats_length", "time", "four"], ["quarter"]),
        helper.make_node("Abs", ["quarter"], ["positive"]),
        helper.make_node("Cast", ["positive"], ["indices"], to=TensorProto.INT32),
    ]
    constants = [
        helper.make_tensor(name, kind, [1], [value])
        for name, kind, value in (
            ("mels", TensorProto.INT64, 1),
            ("zero", TensorProto.INT32, 0),
            ("time", TensorProto.INT32, 1),
            ("four", TensorProto.INT32, 4),
        )
    ]
    inputs = [
        helper.make_tensor_value_info("feats", TensorProto.FLOAT, [1, 128, "T"]),
        helper.make_tensor_value_info("feats_length", TensorProto.INT32, [1]),
    ]
    return save(folder, "speech_tokenizer_v2", nodes, inputs, ("indices", TensorProto.INT32, [1, "N"]), constants)


def speaker_file(folder: Path) -> Path:
    """input [B, T, 80] -> [B, 192]: the loudest value of each mel bin through a fixed matrix."""
    matrix = np.random.default_rng(0).normal(size=(80, 192)).astype(np.float32)
    nodes = [
        helper.make_node("ReduceMax", ["input"], ["peak"], axes=[1], keepdims=0),
        helper.make_node("MatMul", ["peak", "matrix"], ["output"]),
    ]
    constants = [helper.make_tensor("matrix", TensorProto.FLOAT, [80, 192], matrix.flatten().tolist())]
    inputs = [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["B", "T", 80])]
    return save(folder, "campplus", nodes, inputs, ("output", TensorProto.FLOAT, ["B", 192]), constants)


def speech(seconds: float = 2.0) -> torch.Tensor:
    time = torch.arange(round(seconds * RATE)) / RATE
    noise = torch.randn(len(time), generator=torch.Generator().manual_seed(0))
    return 0.3 * torch.sin(2 * torch.pi * 180 * time) + 0.01 * noise


def test_the_tokenizer_is_given_whisper_mels_and_their_length(tmp_path: Path) -> None:
    tokens = SpeechTokenizer(tokenizer_file(tmp_path)).tokenize(speech())
    assert len(tokens) == 50  # 25 a second
    expected = whisper_mel(speech()).sum(0)[::4].abs().to(torch.int32).tolist()
    assert max(abs(a - b) for a, b in zip(tokens, expected, strict=True)) <= 1


def test_the_speaker_encoder_is_given_kaldi_frames_without_their_mean(tmp_path: Path) -> None:
    vector = SpeakerEncoderOnnx(speaker_file(tmp_path)).embed(speech())
    assert vector.shape == (1, 192)
    fbank = campplus_fbank(speech())
    assert fbank.shape == (198, 80) and float(fbank.mean(0).abs().max()) < 1e-4
    matrix = torch.from_numpy(np.random.default_rng(0).normal(size=(80, 192)).astype(np.float32))
    torch.testing.assert_close(vector[0], fbank.max(0).values @ matrix, atol=1e-3, rtol=1e-4)


def test_a_sound_file_becomes_a_prompt_voice_with_two_mel_frames_per_token(tmp_path: Path) -> None:
    source = tmp_path / "models" / "cosyvoice2-0.5b"
    tokenizer_file(source)
    speaker_file(source)
    soundfile.write(tmp_path / "me.wav", np.stack([speech().numpy()] * 2, axis=1), RATE)
    path = prepare(tmp_path / "me.wav", " hello it is me ", "agent", tmp_path / "models")
    assert path == tmp_path / "models" / "prompt_voice" / "agent.safetensors"
    voice = read_prompt_voice(path)
    assert voice.text == "hello it is me" and voice.speaker.shape == (1, 192)
    assert len(voice.tokens) == 50 and voice.mel.shape == (1, 80, 100)


def test_a_prompt_voice_survives_its_file_and_a_crooked_one_is_refused(tmp_path: Path) -> None:
    voice = PromptVoice(torch.ones(1, 4), (3, 1, 2), torch.zeros(1, 80, 6), 'über "uns"')
    write_prompt_voice(voice, tmp_path / "v.safetensors")
    again = read_prompt_voice(tmp_path / "v.safetensors")
    assert again.tokens == voice.tokens and again.text == voice.text and torch.equal(again.mel, voice.mel)
    write_prompt_voice(PromptVoice(voice.speaker, (3, 1), voice.mel, ""), tmp_path / "w.safetensors")
    with pytest.raises(PromptVoiceError, match="6 mel frames for 2 tokens"):
        read_prompt_voice(tmp_path / "w.safetensors")


def test_what_cannot_be_a_prompt_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(PromptVoiceError, match=r"prompt speech of 0\.5 s: must be 1 to 30 s"):
        SpeechTokenizer(tokenizer_file(tmp_path)).tokenize(speech(0.5))
    with pytest.raises(PromptVoiceError, match=r"gone\.onnx: not there; `minmo models fetch` brings it"):
        SpeakerEncoderOnnx(tmp_path / "gone.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"no")
    with pytest.raises(PromptVoiceError, match=r"broken\.onnx"):
        SpeakerEncoderOnnx(tmp_path / "broken.onnx")
    tokenizer, speaker = SpeechTokenizer(tokenizer_file(tmp_path)), SpeakerEncoderOnnx(speaker_file(tmp_path))
    with pytest.raises(PromptVoiceError, match="what is said in the prompt must be given"):
        prompt_voice.make_prompt_voice(speech(), speech(), "  ", tokenizer, speaker)


def test_a_missing_onnxruntime_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(PromptVoiceError, match=r"onnxruntime is not installed: pip install 'minmo-agent\[public\]'"):
        SpeakerEncoderOnnx(speaker_file(tmp_path))
