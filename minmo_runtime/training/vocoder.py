"""Stage 0e: the source-filter vocoder learns the agent's voice from (mel, F0) of synthetic speech. No adversary.

Loss: multi-resolution STFT + 2 x mel L1 + F0 (log2 L1 where voiced, voicing cross-entropy). Until `own_f0_from` of the
budget the filters see tracked F0, from then on half of the batches see the predictor's own, as serving does.
Time is CPU seconds of this process, so that a shared core changes how long it takes, not what comes out. Resumable: the
state is saved every `save_every_s`; what is shipped is the moving average of the weights.
Sizes and rates: facts/recipes part 1, section 3 and 5.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from minmo_runtime.mel import MelSpectrogram
from minmo_runtime.model.source_filter import SourceFilterDims, SourceFilterVocoder
from minmo_runtime.training.pitch import track_f0
from minmo_runtime.training.stage import StageConfig, part_file

PART = "vocoder"
_EDGE_SILENCE_S = 0.2
_LOUDNESS = 0.6  # of espeak-ng's own level, as in the agent's codes (stage 0c)


@dataclass(frozen=True)
class AgentSpeech:
    """The agent's voice as training data: one long int16 waveform per utterance, with its F0 track."""

    waveforms: list[np.ndarray]  # int16, 24 kHz
    f0_hz: list[np.ndarray]  # one per mel frame
    texts: list[str]

    @property
    def seconds(self) -> float:
        return sum(len(waveform) for waveform in self.waveforms) / 24_000


def make_agent_speech(texts: list[str], dims: SourceFilterDims) -> AgentSpeech:
    """Synthesise `texts` with the agent's voice; whole mel frames, some silence at both ends."""
    from minmo_runtime.training import synthesis  # espeak-ng is needed only here

    espeak = synthesis.Espeak()
    edge = np.zeros(int(_EDGE_SILENCE_S * dims.sample_rate_hz), np.float32)
    waveforms, tracks = [], []
    for text in texts:
        spoken, _ = espeak.synthesise(text, synthesis.AGENT_VOICE, synthesis.agent_voice_prosody())
        spoken = synthesis.to_rate(spoken, dims.sample_rate_hz)
        spoken, _ = synthesis.trim_silence(spoken * _LOUDNESS, dims.sample_rate_hz)
        waveform = np.concatenate((edge, spoken, edge))
        waveform = waveform[: len(waveform) // dims.samples_per_frame * dims.samples_per_frame]
        waveforms.append((waveform * 32767).clip(-32768, 32767).astype(np.int16))
        tracks.append(track_f0(waveform, dims.sample_rate_hz, dims.samples_per_frame, dims.f0_min_hz, dims.f0_max_hz))
    return AgentSpeech(waveforms, tracks, texts)


class ReconstructionLoss(nn.Module):
    """Multi-resolution STFT loss (spectral convergence + log magnitude, arXiv 1910.11480) and mel L1."""

    def __init__(self, resolutions: tuple[int, ...] = (2048, 1024, 512)) -> None:
        super().__init__()
        self.mel = MelSpectrogram()
        self.resolutions = resolutions
        for size in resolutions:
            self.register_buffer(f"window_{size}", torch.hann_window(size), persistent=False)

    def magnitude(self, waveform: Tensor, size: int) -> Tensor:
        window = self.get_buffer(f"window_{size}")
        spectrum = torch.stft(waveform, size, size // 4, window=window, return_complex=True)
        return torch.sqrt(spectrum.real.square() + spectrum.imag.square() + 1e-8)

    def forward(self, made: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
        """(multi-resolution STFT, mel L1 in nats), each a mean."""
        stft = made.new_zeros(())
        for size in self.resolutions:
            a, b = self.magnitude(made, size), self.magnitude(true, size)
            convergence = torch.linalg.norm(b - a) / torch.linalg.norm(b).clamp_min(1e-5)
            stft = stft + convergence + (b.clamp_min(1e-3).log() - a.clamp_min(1e-3).log()).abs().mean()
        return stft / len(self.resolutions), (self.mel(made) - self.mel(true)).abs().mean()


def f0_loss(prediction: Tensor, f0_hz: Tensor, dims: SourceFilterDims) -> Tensor:
    """prediction [B, 2, T], f0_hz [B, T] with 0 = unvoiced."""
    voiced = (f0_hz > 0).float()
    octaves = torch.log2(f0_hz.clamp_min(dims.f0_min_hz) / dims.f0_min_hz)
    pitch = ((prediction[:, 0] - octaves).abs() * voiced).sum() / voiced.sum().clamp_min(1.0)
    return 4.0 * pitch + nn.functional.binary_cross_entropy_with_logits(prediction[:, 1], voiced)


class VocoderTrainer:
    """One run of stage 0e; owner of the model, its average, the optimiser and the clock."""

    def __init__(self, settings: dict[str, Any], seed: int, budget_s: float) -> None:
        self.settings, self.budget_s = settings, budget_s
        self.dims = SourceFilterDims.from_dict(settings.get("dims", {}))
        torch.manual_seed(seed)
        self.model = SourceFilterVocoder(self.dims)
        self.average = SourceFilterVocoder(self.dims).requires_grad_(False)
        self.average.load_state_dict(self.model.state_dict())
        self.loss = ReconstructionLoss()
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(), lr=settings["learning_rate"], betas=(0.8, 0.98), weight_decay=0.01
        )
        self.rng = np.random.default_rng(seed)
        self.steps, self.spent_s = 0, 0.0

    def batch(self, data: AgentSpeech) -> tuple[Tensor, Tensor, Tensor]:
        """Random pieces: waveform [B, S], mel [B, M, T], F0 [B, T]."""
        frames, n = self.settings["segment_frames"], self.dims.samples_per_frame
        lengths = np.array([len(track) for track in data.f0_hz], np.float64)
        chosen = self.rng.choice(len(lengths), self.settings["batch_size"], p=lengths / lengths.sum())
        pieces, tracks = [], []
        for index in chosen:
            start = int(self.rng.integers(0, max(1, len(data.f0_hz[index]) - frames)))
            piece = data.waveforms[index][start * n : (start + frames) * n].astype(np.float32) / 32768.0
            piece *= self.rng.uniform(0.7, 1.4)
            track = data.f0_hz[index][start : start + frames]
            pieces.append(np.pad(piece, (0, frames * n - len(piece))))
            tracks.append(np.pad(track, (0, frames - len(track))))
        waveform = torch.from_numpy(np.stack(pieces))
        return waveform, self.loss.mel(waveform), torch.from_numpy(np.stack(tracks))

    def step(self, data: AgentSpeech) -> dict[str, float]:
        """One optimiser step on one random batch."""
        begun = time.process_time()
        progress = min(1.0, self.spent_s / self.budget_s)
        warmup = min(1.0, (self.steps + 1) / self.settings["warmup_steps"])
        for group in self.optimiser.param_groups:
            group["lr"] = self.settings["learning_rate"] * warmup * (1.0 - 0.95 * progress)
        waveform, mel, f0_hz = self.batch(data)
        dims = self.dims
        ahead = torch.cat((mel, mel[..., -1:]), dim=-1)
        prediction = self.model.f0_predictor.step((ahead - dims.mel_mean) / dims.mel_std, {})
        used_hz = f0_hz
        if progress > self.settings["own_f0_from"] and self.rng.random() < 0.5:
            used_hz = self.model.f0_predictor.to_hz(prediction.detach())
        stft, mel_l1 = self.loss(self.model(mel, f0_hz=used_hz), waveform)
        pitch = f0_loss(prediction, f0_hz, dims)
        self.optimiser.zero_grad(set_to_none=True)
        (stft + 2.0 * mel_l1 + pitch).backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
        if torch.isfinite(norm):
            self.optimiser.step()
        decay = min(0.999, (self.steps + 1) / (self.steps + 10))
        with torch.no_grad():
            for kept, new in zip(self.average.parameters(), self.model.parameters(), strict=True):
                kept.lerp_(new, 1.0 - decay)
        self.steps += 1
        self.spent_s += time.process_time() - begun
        return {"stft": float(stft.detach()), "mel": float(mel_l1.detach()), "f0": float(pitch.detach())}

    def save(self, folder: Path, work_dir: Path) -> None:
        """Resume state into the stage's folder, the average as the part's weights; each file whole or not at all."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "steps": self.steps,
            "spent_s": self.spent_s,
        }
        torch.save(state, folder / "state.tmp")
        (folder / "state.tmp").replace(folder / "state.pt")
        target = part_file(work_dir, PART)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".tmp")
        save_file({key: value.to(torch.bfloat16) for key, value in self.average.state_dict().items()}, partial)
        partial.replace(target)
        table = {"kind": "source_filter", **self.dims.to_dict()}
        target.with_suffix(".json").write_text(json.dumps(table, indent=1))

    def resume(self, folder: Path) -> bool:
        """Go on from the stage's folder; False if there is nothing."""
        path = folder / "state.pt"
        if not path.exists():
            return False
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.steps, self.spent_s = state["steps"], state["spent_s"]
        self.rng = np.random.default_rng(self.steps)
        return True


@torch.inference_mode()
def evaluate(model: SourceFilterVocoder, data: AgentSpeech) -> dict[str, float]:
    """Resynthesis of whole utterances with the model's own F0."""
    loss = ReconstructionLoss()
    totals = np.zeros(2)
    for waveform in data.waveforms:
        true = torch.from_numpy(waveform.astype(np.float32) / 32768.0)[None]
        stft, mel_l1 = loss(model(loss.mel(true)), true)
        totals += len(waveform) * np.array([float(stft), float(mel_l1)])
    totals /= sum(len(waveform) for waveform in data.waveforms)
    return {"mr_stft": float(totals[0]), "mel_l1": float(totals[1]), "test_seconds": data.seconds}


def run(stage: StageConfig, work_dir: Path, budget_s: float) -> dict[str, float]:
    """Train until `budget_s` CPU seconds in all are spent, then score on held-out sentences."""
    from minmo_runtime.training.sentences import agent_utterances

    torch.set_num_threads(1)
    settings, folder = stage.settings, stage.folder(work_dir)
    trainer = VocoderTrainer(settings, stage.seed, budget_s)
    trainer.resume(folder)
    held_out = make_agent_speech(agent_utterances(stage.seed, "held")[: settings["num_test_utterances"]], trainer.dims)
    if trainer.spent_s < budget_s:
        texts = agent_utterances(stage.seed, "train")[: settings["num_train_utterances"]]
        data = make_agent_speech(texts, trainer.dims)
        print(f"0e: {len(texts)} utterances, {data.seconds / 60:.1f} min, from step {trainer.steps}", flush=True)
        _train(trainer, data, held_out, folder, work_dir)
    metrics = evaluate(trainer.average, held_out)
    return metrics | {"steps": float(trainer.steps), "cpu_seconds": trainer.spent_s}


def _train(trainer: VocoderTrainer, data: AgentSpeech, held_out: AgentSpeech, folder: Path, work_dir: Path) -> None:
    saved_at = logged_at = trainer.spent_s
    seen: list[dict[str, float]] = []
    scores = folder / "scores.jsonl"
    while trainer.spent_s < trainer.budget_s:
        seen.append(trainer.step(data))
        if trainer.spent_s - logged_at > 20:
            means = {key: float(np.mean([row[key] for row in seen])) for key in seen[0]}
            print(f"0e: {trainer.spent_s:.0f} s, step {trainer.steps}, {json.dumps(means)}", flush=True)
            seen, logged_at = [], trainer.spent_s
        if trainer.spent_s - saved_at > trainer.settings["save_every_s"]:
            trainer.save(folder, work_dir)
            saved_at = trainer.spent_s
            line = {"cpu_s": trainer.spent_s, "steps": trainer.steps, **evaluate(trainer.average, held_out)}
            with scores.open("a") as stream:
                stream.write(json.dumps(line) + "\n")
            print(f"0e: held out {json.dumps(line)}", flush=True)
    trainer.save(folder, work_dir)
