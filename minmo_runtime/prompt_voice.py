"""A voice from a few seconds of speech: what CosyVoice 2 is given so that it speaks like that person.

    speaker [1, 192]   campplus.onnx on Kaldi fbank [1, T, 80] without its mean over time
    tokens  [N]        speech_tokenizer_v2.onnx on Whisper's log-mel [1, 128, T], 25 a second
    mel     [1, 80, 2 N]  of the 24 kHz speech; both are cut to exactly two mel frames per token
    text               what is said in it: the voice LM reads it in front of the reply

The result is one safetensors file that a checkpoint names as its `prompt_voice`; the ONNX files run through
onnxruntime (optional), and only here. Whose voice it is and that they agreed is asked by the command line, not here.
Used when a voice is prepared and when training targets are made; not in the walk.
Sources: CosyVoice `cosyvoice/cli/frontend.py`, S3Tokenizer; facts/minmo.md 2.4.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import soundfile
import soxr
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from minmo_runtime.mel import MelConfig, MelSpectrogram
from minmo_runtime.whisper_mel import campplus_fbank, whisper_mel

MAX_SPEECH_S = 30.0  # the tokenizer takes no more in one run
MIN_SPEECH_S = 1.0
MEL_FRAMES_PER_TOKEN = 2
SPEECH_RATE_HZ = 16_000


class PromptVoiceError(Exception):
    """A prompt voice that cannot be made or read; the message says why."""


@dataclass(frozen=True)
class PromptVoice:
    speaker: Tensor  # [1, D]
    tokens: tuple[int, ...]
    mel: Tensor  # [1, M, 2 * len(tokens)]
    text: str


def read_prompt_voice(path: Path) -> PromptVoice:
    with safe_open(str(path), "pt") as file:
        if missing := sorted({"speaker", "tokens", "mel"} - set(file.keys())):
            raise PromptVoiceError(f"{path}: has no {', '.join(missing)}")
        text = json.loads((file.metadata() or {}).get("text", '""'))
        voice = PromptVoice(
            file.get_tensor("speaker").float().view(1, -1),
            tuple(file.get_tensor("tokens").long().tolist()),
            file.get_tensor("mel").float(),
            text,
        )
    if voice.mel.shape[-1] != MEL_FRAMES_PER_TOKEN * len(voice.tokens):
        raise PromptVoiceError(f"{path}: {voice.mel.shape[-1]} mel frames for {len(voice.tokens)} tokens")
    return voice


def write_prompt_voice(voice: PromptVoice, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        "speaker": voice.speaker.contiguous(),
        "tokens": torch.tensor(voice.tokens, dtype=torch.int32),
        "mel": voice.mel.contiguous(),
    }
    save_file(tensors, str(path), metadata={"text": json.dumps(voice.text)})


class OnnxFile:
    """One ONNX file of the parents, on the CPU. The names of its inputs are read from it, never assumed."""

    def __init__(self, path: Path) -> None:
        try:
            import onnxruntime as runtime
        except ImportError as error:
            raise PromptVoiceError("onnxruntime is not installed: pip install 'minmo-agent[public]'") from error
        if not path.is_file():
            raise PromptVoiceError(f"{path}: not there; `minmo models fetch` brings it")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = 1
        try:
            self._session: Any = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own untyped errors for a broken file
            raise PromptVoiceError(f"{path}: {error}") from error
        self.path = path
        self.inputs = [entry.name for entry in self._session.get_inputs()]

    def run(self, *arrays: Any) -> Any:
        """The first output for these inputs, in the file's order."""
        if len(arrays) != len(self.inputs):
            raise PromptVoiceError(f"{self.path}: takes {', '.join(self.inputs)}; got {len(arrays)} inputs")
        return self._session.run(None, dict(zip(self.inputs, arrays, strict=True)))[0]


class SpeechTokenizer:
    """speech_tokenizer_v2.onnx: 16 kHz speech to voice tokens."""

    def __init__(self, path: Path) -> None:
        self._file = OnnxFile(path)

    def tokenize(self, waveform: Tensor) -> list[int]:
        """[S] in [-1, 1], at most 30 s."""
        _check_length(waveform)
        mel = whisper_mel(waveform)[None]
        length = torch.tensor([mel.shape[-1]], dtype=torch.int32)
        tokens = self._file.run(mel.numpy(), length.numpy())
        return [int(token) for token in tokens.reshape(-1)]


class SpeakerEncoderOnnx:
    """campplus.onnx: 16 kHz speech to one vector."""

    def __init__(self, path: Path) -> None:
        self._file = OnnxFile(path)

    def embed(self, waveform: Tensor) -> Tensor:
        """[S] -> [1, 192]"""
        fbank = campplus_fbank(waveform)[None]
        return torch.from_numpy(self._file.run(fbank.numpy())).float().view(1, -1)


def prepare(speech: Path, text: str, name: str, models: Path) -> Path:
    """A sound file and its words -> models/prompt_voice/<name>.safetensors, through the fetched ONNX files."""
    waveform, rate = soundfile.read(str(speech), dtype="float32", always_2d=True)
    mono = waveform.mean(axis=1)
    at = {hz: torch.from_numpy(soxr.resample(mono, rate, hz)).float() for hz in (SPEECH_RATE_HZ, 24_000)}
    source = models / "cosyvoice2-0.5b"
    tokenizer = SpeechTokenizer(source / "speech_tokenizer_v2.onnx")
    speaker = SpeakerEncoderOnnx(source / "campplus.onnx")
    path = models / "prompt_voice" / f"{name}.safetensors"
    write_prompt_voice(make_prompt_voice(at[SPEECH_RATE_HZ], at[24_000], text, tokenizer, speaker), path)
    return path


def make_prompt_voice(
    waveform_16k: Tensor, waveform_24k: Tensor, text: str, tokenizer: SpeechTokenizer, speaker: SpeakerEncoderOnnx
) -> PromptVoice:
    """The same speech at both rates and its words -> everything the parents' voice needs."""
    _check_length(waveform_16k)
    if not text.strip():
        raise PromptVoiceError("what is said in the prompt must be given: the voice LM reads it")
    tokens = tokenizer.tokenize(waveform_16k)
    mel = MelSpectrogram(MelConfig())(waveform_24k[None])
    count = min(len(tokens), mel.shape[-1] // MEL_FRAMES_PER_TOKEN)
    mel = mel[..., : MEL_FRAMES_PER_TOKEN * count]
    return PromptVoice(speaker.embed(waveform_16k), tuple(tokens[:count]), mel, text.strip())


def _check_length(waveform: Tensor) -> None:
    seconds = len(waveform) / SPEECH_RATE_HZ
    if not MIN_SPEECH_S <= seconds <= MAX_SPEECH_S:
        raise PromptVoiceError(f"prompt speech of {seconds:.1f} s: must be {MIN_SPEECH_S:g} to {MAX_SPEECH_S:g} s")
