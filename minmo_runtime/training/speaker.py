"""Stage 0d: the speaker encoder learns to tell training voices apart, and is judged on voices it never heard.

Additive-margin softmax over voice names (arXiv 1801.05599); crops of random length, random lines. Score: equal error
rate over all pairs of held-out utterances. The classifier is thrown away. Crops of a step depend on (seed, step) alone.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from minmo_runtime.model.speaker import SpeakerDims, SpeakerEncoder
from minmo_runtime.training import sentences, synthesis
from minmo_runtime.training.loop import LoopSettings, StepLoop
from minmo_runtime.training.resume import save_tensors
from minmo_runtime.training.spoken import Mouth, Ragged, load_arrays, save_arrays
from minmo_runtime.training.stage import StageConfig, part_file

PART = "speaker"


def make_data(path: Path, work_dir: Path, settings: dict[str, int], seed: int, held_out: bool) -> None:
    """Utterances of many voices: `features` rows and `labels` (index of the voice)."""
    rng = np.random.default_rng([seed, held_out])
    mouth = Mouth(work_dir)
    texts = sentences.caller_utterances(seed, "held" if held_out else "train", 3000)
    names: list[str] = []
    while len(names) < settings["num_held_voices" if held_out else "num_voices"]:
        name = synthesis.random_caller_voice(rng, held_out)
        if name not in names:
            names.append(name)
    rows, labels = [], []
    for label, voice in enumerate(names):
        for _ in range(settings["utterances_per_voice"]):
            rows.append(mouth.caller(texts[rng.integers(len(texts))], rng, held_out, voice))
            labels.append(label)
    arrays = {"labels": np.array(labels)}
    Ragged.of(rows).save_into(arrays, "features")
    save_arrays(path, arrays)


class SpeakerTask(nn.Module):
    """Encoder and its throw-away classifier."""

    def __init__(self, dims: SpeakerDims, num_voices: int) -> None:
        super().__init__()
        self.encoder = SpeakerEncoder(dims)
        self.voices = nn.Parameter(torch.randn(num_voices, dims.embedding_size))

    def loss(self, fbank: Tensor, lengths: Tensor, labels: Tensor, scale: float, margin: float) -> Tensor:
        cosine = self.encoder(fbank, lengths).float() @ nn.functional.normalize(self.voices.float(), dim=1).T
        cosine = cosine - margin * nn.functional.one_hot(labels, len(self.voices))
        return nn.functional.cross_entropy(scale * cosine, labels)


def crops(features: Ragged, chosen: np.ndarray, rng: np.random.Generator, longest: int) -> tuple[Tensor, Tensor]:
    """Random pieces [B, T, M] of 0.6 s up to `longest` frames, and their lengths."""
    pieces = []
    for index in chosen:
        row = features[index]
        size = min(len(row), int(rng.integers(60, longest + 1)))
        start = int(rng.integers(0, len(row) - size + 1))
        pieces.append(torch.from_numpy(row[start : start + size].astype(np.float32)))
    lengths = torch.tensor([len(piece) for piece in pieces])
    return nn.utils.rnn.pad_sequence(pieces, batch_first=True), lengths


def equal_error_rate(scores: np.ndarray, is_same: np.ndarray) -> float:
    """Where as many pairs of one voice are refused as pairs of two voices are accepted."""
    order = np.argsort(-scores)
    same = is_same[order]
    refused = 1.0 - np.cumsum(same) / same.sum()
    accepted = np.cumsum(~same) / (~same).sum()
    at = int(np.argmin(np.abs(refused - accepted)))
    return float((refused[at] + accepted[at]) / 2)


@torch.no_grad()
def evaluate(encoder: SpeakerEncoder, arrays: dict[str, np.ndarray]) -> dict[str, float]:
    """EER over all pairs of whole utterances; pairs of one voice count as `pairs_same`."""
    encoder.eval()
    features, labels = Ragged.load_from(arrays, "features"), arrays["labels"]
    vectors = torch.cat([encoder(torch.from_numpy(features[i].astype(np.float32))[None]) for i in range(len(features))])
    encoder.train()
    first, second = np.triu_indices(len(labels), 1)
    scores = (vectors @ vectors.T).numpy()[first, second]
    same = labels[first] == labels[second]
    return {"eer": equal_error_rate(scores, same), "pairs": float(len(same)), "pairs_same": float(same.sum())}


def run(stage: StageConfig, work_dir: Path, budget_s: float) -> dict[str, float]:
    torch.set_num_threads(1)
    folder, settings = stage.folder(work_dir), stage.settings
    for name, held_out in (("train", False), ("held", True)):
        if not (folder / f"{name}.npz").exists():
            make_data(folder / f"{name}.npz", work_dir, settings, stage.seed, held_out)
    arrays, held = load_arrays(folder / "train.npz"), load_arrays(folder / "held.npz")
    features, labels = Ragged.load_from(arrays, "features"), arrays["labels"]
    torch.manual_seed(stage.seed)
    dims = SpeakerDims.from_dict(settings["dims"])
    task = SpeakerTask(dims, int(labels.max()) + 1)
    loop = StepLoop(task, LoopSettings.from_table(settings), folder, budget_s, lambda name, p: False)

    def loss_of(step: int) -> Tensor:
        rng = np.random.default_rng([stage.seed, step])
        chosen = rng.integers(0, len(labels), settings["batch_size"])
        fbank, lengths = crops(features, chosen, rng, settings["longest_crop"])
        # The margin comes in over the first steps: with all of it at once the start diverges.
        margin = settings["margin"] * min(1.0, step / settings["margin_steps"])
        return task.loss(fbank, lengths, torch.from_numpy(labels[chosen]), settings["scale"], margin)

    def averaged() -> SpeakerEncoder:
        encoder = SpeakerEncoder(dims)
        state = {name: t for name, t in loop.averaged_state().items() if name.startswith("encoder.")}
        encoder.load_state_dict({name.removeprefix("encoder."): tensor for name, tensor in state.items()})
        return encoder

    def on_save() -> None:
        encoder = averaged()
        tensors = {name: tensor.to(torch.bfloat16) for name, tensor in encoder.state_dict().items()}
        save_tensors(part_file(work_dir, PART), tensors, {"dims": json.dumps(dims.to_dict())})
        print(f"0d step {loop.steps}: {evaluate(encoder, held)}", flush=True)

    loop.run(loss_of, on_save, lambda line: print(line, flush=True))
    return {**evaluate(averaged(), held), "steps": float(loop.steps), "num_voices": float(labels.max() + 1)}
