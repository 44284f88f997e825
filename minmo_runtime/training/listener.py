"""The judge of made speech: our own encoder writes down what it hears; WER against the text. Training and evaluation
only.

It is a friendly judge, as it learnt the same voices and sentences: its scores compare ways of making speech, no more.
The source recordings are always scored beside.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import jiwer
import numpy as np
import soxr
import torch
from tokenizers import Tokenizer
from torch import Tensor

from minmo_runtime.features import fbank
from minmo_runtime.model.encoder import VoiceEncoder, collapse
from minmo_runtime.model.voice_tokenizer import pad_features
from minmo_runtime.training.data import plain_words
from minmo_runtime.training.tokenizer import load_encoder

_ENCODER_RATE_HZ = 16_000
_NOISE_FLOOR = 3e-4  # digital silence never occurs in the encoder's training


@dataclass(frozen=True)
class Heard:
    """Word error rate over `words` reference words."""

    wer: float
    words: int


class Listener:
    """Loads `ship/encoder` and its CTC tokenizer from the work folder."""

    def __init__(self, work_dir: Path) -> None:
        self._encoder: VoiceEncoder = load_encoder(work_dir)
        self._tokenizer = Tokenizer.from_file(str(work_dir / "ship" / "ctc_tokenizer.json"))

    @torch.inference_mode()
    def transcribe(self, waveform: np.ndarray | Tensor, sample_rate_hz: int = 24_000) -> str:
        """One utterance in [-1, 1] → lower-case words."""
        wave = np.asarray(waveform, np.float32).reshape(-1)
        narrow = soxr.resample(wave, sample_rate_hz, _ENCODER_RATE_HZ)
        narrow = np.pad(narrow, (0, 640))
        narrow = narrow + np.random.default_rng(0).standard_normal(len(narrow)) * _NOISE_FLOOR
        features, lengths = pad_features([fbank(torch.from_numpy(narrow.astype(np.float32)))])
        best = self._encoder.ctc_log_probs(self._encoder(features, lengths))[0, : int(lengths[0])].argmax(-1)
        return str(self._tokenizer.decode(collapse(best))).strip()

    def score(self, texts: list[str], waveforms: list[np.ndarray] | list[Tensor]) -> Heard:
        """WER of many utterances; texts with digits or symbols are left out, as their reading is unknown."""
        pairs = [(plain_words(text), wave) for text, wave in zip(texts, waveforms, strict=True)]
        pairs = [(text, wave) for text, wave in pairs if text]
        references = [text for text, _ in pairs]
        wer = jiwer.wer(references, [self.transcribe(wave) for _, wave in pairs])
        return Heard(float(wer), sum(len(text.split()) for text in references))
