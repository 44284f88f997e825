"""Shards as batches of padded tensors, about the same number of seconds each, sorted by length inside a window."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minmo_runtime.training.data import UNKNOWN

FBANK_FRAMES_PER_S = 100


@dataclass
class Batch:
    """features [B, F, M] (0 padded), frames [B] fbank frames, targets flat + target_lengths, phonemes [B, T]
    (-100), tags [B, 3]."""

    features: Tensor
    frames: Tensor
    lengths: Tensor  # encoder frames at 25 Hz
    targets: Tensor
    target_lengths: Tensor
    phonemes: Tensor
    tags: Tensor
    texts: list[str]
    is_human: Tensor


class Shard:
    """One npz of `training.data` in memory."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as stored:
            self.features, self.starts = stored["features"], stored["starts"]
            self.phonemes, self.phoneme_starts = stored["phonemes"], stored["phoneme_starts"]
            self.texts, self.tags, self.human = stored["texts"].tolist(), stored["tags"], stored["human"]

    def __len__(self) -> int:
        return len(self.texts)

    def batches(
        self,
        encode: Callable[[str], list[int]],
        batch_s: float,
        rng: np.random.Generator | None,
        keep: Callable[[str], float] | None = None,
    ) -> Iterator[Batch]:
        """Shuffled when `rng` is given, else in order of length. `keep`: probability that an utterance of
        this text is used."""
        frames = np.diff(self.starts)
        order = rng.permutation(len(self)) if rng is not None else np.arange(len(self))
        if keep is not None and rng is not None:
            order = np.array([i for i in order if rng.random() < keep(self.texts[i])])
        groups: list[list[int]] = []
        for window in range(0, len(order), 1024):
            part = sorted(order[window : window + 1024], key=lambda i: frames[i])
            group: list[int] = []
            for index in part:
                if group and (len(group) + 1) * frames[index] > batch_s * FBANK_FRAMES_PER_S:
                    groups.append(group)
                    group = []
                group.append(int(index))
            groups.append(group)
        if rng is not None:
            rng.shuffle(groups)
        for group in groups:
            yield self.collate(group, encode)

    def collate(self, group: list[int], encode: Callable[[str], list[int]]) -> Batch:
        frames = torch.tensor([int(self.starts[i + 1] - self.starts[i]) for i in group])
        lengths = (frames + 3) // 4
        features = torch.zeros(len(group), int(frames.max()), self.features.shape[1])
        phonemes = torch.full((len(group), int(lengths.max())), UNKNOWN, dtype=torch.long)
        for row, i in enumerate(group):
            features[row, : frames[row]] = torch.from_numpy(
                self.features[self.starts[i] : self.starts[i + 1]].astype(np.float32)
            )
            labels = self.phonemes[self.phoneme_starts[i] : self.phoneme_starts[i + 1]]
            phonemes[row, : len(labels)] = torch.from_numpy(labels.astype(np.int64))
        texts = [self.texts[i] for i in group]
        ids = [encode(text) for text in texts]
        return Batch(
            features,
            frames,
            lengths,
            torch.tensor([token for row in ids for token in row], dtype=torch.long),
            torch.tensor([len(row) for row in ids]),
            phonemes,
            torch.from_numpy(self.tags[group].astype(np.int64)),
            texts,
            torch.from_numpy(self.human[group]),
        )
