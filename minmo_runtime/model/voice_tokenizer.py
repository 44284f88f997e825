"""Voice tokenizer: the voice encoder cut in the middle by finite scalar quantization (FSQ). 25 voice tokens a second.

As in CosyVoice 2's supervised tokenizer (arXiv 2412.10117), lower blocks -> linear -> tanh -> round -> one id per
frame; the
upper blocks and the CTC head only teach it (and measure it). Ids are frozen after training: their hash travels in the
voice LM and the flow, which are useless with other ids. Used for training targets and for a campaign's prompt voice.

Letters: B batch, T encoder frames (25 Hz), D width, K FSQ dimensions.
"""

from __future__ import annotations

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minmo_runtime.model.dims import EncoderDims, VoiceTokenizerDims
from minmo_runtime.model.encoder import VoiceEncoder


class FiniteScalarQuantizer(nn.Module):
    """Odd levels per dimension: level 3 gives {-1, 0, 1}. The id is a mixed-base number, first dimension least
    significant.

    Worked example, levels (3, 3): values (1, -1) -> digits (2, 0) -> id 2 + 0 * 3 = 2.
    """

    def __init__(self, size: int, levels: tuple[int, ...]) -> None:
        super().__init__()
        if any(level < 3 or level % 2 == 0 for level in levels):
            raise ValueError(f"voice_tokenizer.levels = {levels}: every level must be odd and at least 3")
        self.project_down = nn.Linear(size, len(levels))
        half = torch.tensor([(level - 1) // 2 for level in levels], dtype=torch.float32)
        bases = torch.cumprod(torch.tensor([1, *levels[:-1]]), 0)
        self.register_buffer("half_levels", half, persistent=False)
        self.register_buffer("bases", bases, persistent=False)

    def bounded(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, K], each in (-half, half)."""
        return torch.tanh(self.project_down(x)) * 0.999 * self.half_levels

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(quantised values scaled to [-1, 1] with straight-through gradient, the unquantised ones)."""
        z = self.bounded(x)
        rounded = z + (z.round() - z).detach()
        return rounded / self.half_levels, z / self.half_levels

    def ids(self, values: Tensor) -> Tensor:
        """Scaled values in [-1, 1] -> ids. [B, T, K] -> [B, T]"""
        digits = (values * self.half_levels).round().long() + self.half_levels.long()
        return (digits * self.bases).sum(-1)

    def values(self, ids: Tensor) -> Tensor:
        """Ids -> scaled values in [-1, 1]. [B, T] -> [B, T, K]"""
        levels = 2 * self.half_levels.long() + 1
        digits = ids.unsqueeze(-1) // self.bases % levels
        return (digits - self.half_levels.long()).float() / self.half_levels


class VoiceTokenizer(nn.Module):
    """`encoder` with a bottleneck after `cut_layer` blocks."""

    def __init__(self, encoder_dims: EncoderDims, dims: VoiceTokenizerDims) -> None:
        super().__init__()
        self.dims = dims
        self.encoder = VoiceEncoder(encoder_dims)
        size = encoder_dims.output_size
        self.norm = nn.LayerNorm(size)
        self.quantizer = FiniteScalarQuantizer(size, dims.levels)
        self.project_up = nn.Sequential(nn.Linear(len(dims.levels), size), nn.ReLU(), nn.Linear(size, size))

    @property
    def num_tokens(self) -> int:
        product = 1
        for level in self.dims.levels:
            product *= level
        return product

    def lower(self, features: Tensor, lengths: Tensor) -> Tensor:
        """Normalised hidden state at the cut. [B, F, M] -> [B, T, D]"""
        stack = self.encoder.encoder
        x = stack.embed(self.encoder.normalise(features))
        mask, valid = self._masks(x, lengths)
        for block in stack.blocks()[: self.dims.cut_layer]:
            x = block(x, mask, valid)
        return self.norm(x)

    def upper(self, x: Tensor, lengths: Tensor) -> Tensor:
        """From the bottleneck's output to CTC log-probabilities. [B, T, D] -> [B, T, V]"""
        stack = self.encoder.encoder
        mask, valid = self._masks(x, lengths)
        for block in stack.blocks()[self.dims.cut_layer :]:
            x = block(x, mask, valid)
        return self.encoder.ctc_log_probs(stack.after_norm(x))

    def _masks(self, x: Tensor, lengths: Tensor) -> tuple[Tensor | None, Tensor]:
        valid = (torch.arange(x.shape[1]) < lengths.unsqueeze(1)).unsqueeze(2).to(x.dtype)
        return self.encoder.encoder.attention_mask(x.shape[1], lengths), valid

    @torch.no_grad()
    def tokenize(self, features: Tensor, lengths: Tensor) -> Tensor:
        """Fbank features [B, F, M], `lengths` [B] in encoder frames (ceil(F / 4)) -> voice tokens [B, T]."""
        values, _ = self.quantizer(self.lower(features, lengths))
        return self.quantizer.ids(values)

    def ctc_from_tokens(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """How the ids alone are understood: log-probabilities [B, T, V] (gate 0c)."""
        return self.upper(self.project_up(self.quantizer.values(ids)), lengths)

    def code_hash(self) -> str:
        """Hash of everything that decides an id; voice LM and flow carry it."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            if not name.startswith(("project_up", "encoder.ctc", "encoder.tags")):
                digest.update(name.encode() + tensor.to(torch.bfloat16).view(torch.int16).numpy().tobytes())
        return digest.hexdigest()[:16]


def frame_lengths(num_fbank_frames: Tensor) -> Tensor:
    """Encoder frames of a stream of fbank frames through the conv front: ceil(F / 4)."""
    return (num_fbank_frames + 3) // 4


def pad_features(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Feature rows [F_i, M] as one padded batch and their lengths in encoder frames."""
    frames = torch.tensor([len(row) for row in rows])
    padded = torch.stack([F.pad(row, (0, 0, 0, int(frames.max()) - len(row))) for row in rows])
    return padded, frame_lengths(frames)
