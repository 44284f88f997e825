"""Caller and agent speech made on the spot for the connector stages: a sentence to features, with espeak-ng in this
process.

The same voices, lines and features as the encoder's shards. Knows nothing of models. Stages 0d, 1a-1c, 2a-3, 4.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soxr
import torch

from minmo_runtime.features import fbank
from minmo_runtime.model.voice_tokenizer import VoiceTokenizer, pad_features
from minmo_runtime.text import speak_digits
from minmo_runtime.training import channel, synthesis
from minmo_runtime.training.tokenizer import OUTPUT_RATE_HZ, SAMPLES_PER_TOKEN

RATE_HZ = 16_000
AGENT_LEVEL, NOISE_FLOOR = 0.6, 3e-4  # of the agent's speech, as in training/tokenizer.write_agent_codes
_AGENT_PACES_WPM = {"slow": 135, "normal": synthesis.AGENT_RATE_WPM, "fast": 200}


class Mouth:
    """espeak-ng with the random voices; one per process."""

    def __init__(self, work_dir: Path) -> None:
        self._espeak = synthesis.Espeak(synthesis.prepare_voice_folder(work_dir / "voices"))

    def waveform(self, text: str, voice: str, prosody: synthesis.Prosody) -> np.ndarray:
        """16 kHz, outer silence cut; empty if nothing was said."""
        raw, _ = self._espeak.synthesise(speak_digits(text), voice, prosody)
        if len(raw) < 2000:
            return np.zeros(0, np.float32)
        trimmed, _ = synthesis.trim_silence(raw, synthesis.ESPEAK_RATE_HZ)
        return soxr.resample(trimmed, synthesis.ESPEAK_RATE_HZ, RATE_HZ, quality="MQ").astype(np.float32)

    def caller(self, text: str, rng: np.random.Generator, held_out: bool, voice: str = "") -> np.ndarray:
        """A caller's sentence through a random line: features [F, 80] float16, with some outer silence."""
        return features(self.caller_waveform(text, rng, held_out, voice))

    def caller_waveform(self, text: str, rng: np.random.Generator, held_out: bool, voice: str = "") -> np.ndarray:
        """The same as 16 kHz samples in [-1, 1]."""
        voice = voice or synthesis.random_caller_voice(rng, held_out)
        wave = self.waveform(text, voice, synthesis.random_caller_prosody(rng))
        lead, tail = (np.zeros(int(rng.uniform(0.1, 0.6) * RATE_HZ), np.float32) for _ in range(2))
        return channel.degrade(np.concatenate([lead, wave, tail]), rng, bool(rng.random() < 0.6))

    def agent(self, text: str, tokenizer: VoiceTokenizer, rng: np.random.Generator, pace: str = "normal") -> np.ndarray:
        """The agent's sentence as voice tokens [T], exactly as stage 0c: another silence or level, other tokens."""
        prosody = synthesis.agent_voice_prosody()
        prosody = synthesis.Prosody(_AGENT_PACES_WPM[pace], prosody.pitch, prosody.pitch_range)
        raw, _ = self._espeak.synthesise(speak_digits(text), synthesis.AGENT_VOICE, prosody)
        raw, _ = synthesis.trim_silence(raw, synthesis.ESPEAK_RATE_HZ)
        wave = soxr.resample(raw, synthesis.ESPEAK_RATE_HZ, OUTPUT_RATE_HZ).astype(np.float32) * AGENT_LEVEL
        num_tokens = len(wave) // SAMPLES_PER_TOKEN + 1
        wave = np.pad(wave, (0, num_tokens * SAMPLES_PER_TOKEN - len(wave)))
        narrow = soxr.resample(wave, OUTPUT_RATE_HZ, RATE_HZ).astype(np.float32)
        narrow = np.pad(narrow, (0, RATE_HZ // 25)) + rng.standard_normal(len(narrow) + RATE_HZ // 25) * NOISE_FLOOR
        fbank_frames, lengths = pad_features([fbank(torch.from_numpy(narrow.astype(np.float32)))])
        return tokenizer.tokenize(fbank_frames, lengths)[0, :num_tokens].numpy()


def features(waveform: np.ndarray) -> np.ndarray:
    return fbank(torch.from_numpy(waveform)).numpy().astype(np.float16)


class Ragged:
    """Rows of different length in two arrays, so that they fit an npz: `rows[i]` is `flat[starts[i] : starts[i +
    1]]`.
    """

    def __init__(self, flat: np.ndarray, starts: np.ndarray) -> None:
        self.flat, self.starts = flat, starts

    @classmethod
    def of(cls, rows: list[np.ndarray]) -> Ragged:
        return cls(np.concatenate(rows), np.cumsum([0] + [len(row) for row in rows]))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.flat[self.starts[index] : self.starts[index + 1]]

    def save_into(self, arrays: dict[str, np.ndarray], name: str) -> None:
        arrays[name], arrays[f"{name}_starts"] = self.flat, self.starts

    @classmethod
    def load_from(cls, arrays: dict[str, np.ndarray], name: str) -> Ragged:
        return cls(arrays[name], arrays[f"{name}_starts"])


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as stored:
        return {name: stored[name] for name in stored.files}


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    temporary = path.with_suffix(".tmp.npz")
    np.savez(temporary, **arrays)
    temporary.replace(path)
