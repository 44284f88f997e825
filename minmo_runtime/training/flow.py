"""Stage 0f: voice tokens of the agent's speech → its mel. First the mean alone (L1), then the flow from that mean.

Phase "mean" trains embedding, encoder and `encoder_proj` by L1 on the mel, under the chunk masks of serving. Phase
"flow" freezes them and trains the estimator to go from mean + noise_scale * noise to the mel. Both count CPU seconds
and resume. Scored by re-synthesis through the vocoder of stage 0e: the words that our encoder hears in the source, in
the vocoder's copy of the true mel, in the mean, and in the flow. The flow ships with steps only if it adds no error
to the mean; else with
`n_timesteps = 0`, its weights included. Data: `agent_codes.npz` of stage 0c. Recipe: facts/recipes part 1, sections 4
and 5.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from minmo_runtime.mel import MelSpectrogram
from minmo_runtime.model.flow import Flow
from minmo_runtime.model.flow_dims import FlowDims
from minmo_runtime.model.flow_encoder import padding_mask
from minmo_runtime.model.flow_estimator import FlowEstimator
from minmo_runtime.model.vocoder import Vocoder, build_vocoder, load_vocoder
from minmo_runtime.training.listener import Listener
from minmo_runtime.training.loop import LoopSettings, StepLoop, freeze_except
from minmo_runtime.training.resume import load_tensors, save_tensors
from minmo_runtime.training.stage import StageConfig, part_file

PART = "flow"
_ESTIMATOR = "decoder."
CODES_FILE = "agent_codes.npz"


@dataclass(frozen=True)
class VoiceTokenSpeech:
    """Utterances as voice tokens, with their mel [M, 2N] (float16) and, where asked for, the waveform."""

    texts: list[str]
    tokens: list[np.ndarray]
    mels: list[np.ndarray]
    waveforms: list[np.ndarray]
    code_hash: str


def load_speech(path: Path, wants_held: bool, count: int, keeps_waveforms: bool) -> VoiceTokenSpeech:
    """The first `count` utterances of one split of `agent_codes.npz`; mels are made here."""
    mel = MelSpectrogram()
    with np.load(path) as stored:
        held, texts = stored["held"], stored["texts"]
        codes, code_starts = stored["codes"], stored["code_starts"]
        waves, wave_starts = stored["waveforms"], stored["waveform_starts"]
        code_hash = str(stored["code_hash"])
    chosen = np.flatnonzero(held == wants_held)[:count]
    speech = VoiceTokenSpeech([], [], [], [], code_hash)
    for index in chosen:
        tokens = codes[code_starts[index] : code_starts[index + 1]]
        wave = waves[wave_starts[index] : wave_starts[index + 1]].astype(np.float32) / 32768.0
        frames = mel(torch.from_numpy(wave)[None])[0]
        if frames.shape[1] != 2 * len(tokens):
            raise ValueError(
                f"{path.name}: utterance {index} has {len(tokens)} tokens and {frames.shape[1]} mel frames, not twice"
            )
        speech.texts.append(str(texts[index]))
        speech.tokens.append(tokens.astype(np.int64))
        speech.mels.append(frames.numpy().astype(np.float16))
        if keeps_waveforms:
            speech.waveforms.append(wave)
    return speech


class Batches:
    """Which utterances step n sees: a function of n alone. Neighbours in length go together."""

    def __init__(self, speech: VoiceTokenSpeech, tokens_per_batch: int, seed: int) -> None:
        self.speech, self.seed = speech, seed
        order = sorted(range(len(speech.tokens)), key=lambda i: len(speech.tokens[i]))
        self._groups: list[list[int]] = [[]]
        for index in order:  # the longest of a group comes last and sets its padded size
            if self._groups[-1] and (len(self._groups[-1]) + 1) * len(speech.tokens[index]) > tokens_per_batch:
                self._groups.append([])
            self._groups[-1].append(index)

    def at(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """tokens [B, N], lengths [B], mel [B, M, 2N]."""
        epoch, position = divmod(step, len(self._groups))
        group = self._groups[np.random.default_rng([self.seed, epoch]).permutation(len(self._groups))[position]]
        longest = max(len(self.speech.tokens[i]) for i in group)
        tokens = torch.zeros(len(group), longest, dtype=torch.long)
        mel = torch.zeros(len(group), self.speech.mels[group[0]].shape[0], 2 * longest)
        for row, index in enumerate(group):
            tokens[row, : len(self.speech.tokens[index])] = torch.from_numpy(self.speech.tokens[index])
            mel[row, :, : self.speech.mels[index].shape[1]] = torch.from_numpy(
                self.speech.mels[index].astype(np.float32)
            )
        return tokens, torch.tensor([len(self.speech.tokens[i]) for i in group]), mel


def mean_loss(flow: Flow, batches: Batches, step: int) -> Tensor:
    """L1 of the mean on the mel, padding left out."""
    tokens, lengths, mel = batches.at(step)
    mu, valid = flow.mean(tokens, lengths)
    weight = valid[:, None].float()
    return ((mu - mel).abs() * weight).sum() / (weight.sum() * mel.shape[1])


def matching_loss(flow: Flow, batches: Batches, step: int) -> Tensor:
    """Flow-matching loss from the frozen mean."""
    tokens, lengths, mel = batches.at(step)
    with torch.no_grad():
        mu, _ = flow.mean(tokens, lengths)
    generator = torch.Generator().manual_seed(step)
    noise = torch.randn(mel.shape, generator=generator)
    time = torch.rand(len(tokens), generator=generator)
    speaker = flow.speaker(torch.zeros(len(tokens), flow.dims.spk_embed_dim))
    valid = padding_mask(lengths * flow.dims.frames_per_token, mel.shape[-1])
    return flow.matching_loss(mel, mu, valid, speaker, torch.zeros_like(mel), time, noise)


@torch.inference_mode()
def make_mels(flow: Flow, speech: VoiceTokenSpeech, count: int, num_steps: int) -> list[Tensor]:
    """Mels of the first utterances with `num_steps` Euler steps, under the chunk masks of serving."""
    before = flow.dims
    flow.dims = replace(before, n_timesteps=num_steps)
    embedding = torch.zeros(1, before.spk_embed_dim)
    try:
        return [flow(torch.from_numpy(tokens)[None], embedding) for tokens in speech.tokens[:count]]
    finally:
        flow.dims = before


@torch.inference_mode()
def make_waves(vocoder: Vocoder, mels: list[Tensor]) -> list[Tensor]:
    return [vocoder.push(mel.float(), vocoder.new_state(), is_final=True)[0] for mel in mels]


def load_shipped_vocoder(work_dir: Path) -> Vocoder:
    path = part_file(work_dir, "vocoder")
    vocoder = build_vocoder(json.loads(path.with_suffix(".json").read_text()))
    return load_vocoder(vocoder, {key: value.float() for key, value in load_file(path).items()})


def evaluate(
    flow: Flow, vocoder: Vocoder, listener: Listener, speech: VoiceTokenSpeech, steps: list[int]
) -> dict[str, float]:
    """WER of the source, of the vocoder alone, of the mean, and of the flow for each number of steps."""
    count = len(speech.texts)
    true_mels = [torch.from_numpy(mel.astype(np.float32))[None] for mel in speech.mels]
    source = listener.score(speech.texts, speech.waveforms)
    metrics = {"wer_source": source.wer, "words": float(source.words)}
    metrics["wer_vocoder"] = listener.score(speech.texts, make_waves(vocoder, true_mels)).wer
    for number in [0, *steps]:
        mels = make_mels(flow, speech, count, number)
        name = f"flow_{number}" if number else "mean"
        metrics[f"wer_{name}"] = listener.score(speech.texts, make_waves(vocoder, mels)).wer
        errors = [float((made - true).abs().mean()) for made, true in zip(mels, true_mels, strict=True)]
        metrics[f"mel_l1_{name}"] = float(np.mean(errors))
        spread = [float(made.std(-1).mean() / true.std(-1).mean()) for made, true in zip(mels, true_mels, strict=True)]
        metrics[f"spread_{name}"] = float(np.mean(spread))
    return metrics


def ship(tensors: dict[str, Tensor], dims: FlowDims, code_hash: str, work_dir: Path) -> None:
    """Weights as bf16 and, beside them, the sizes and the hash of the voice tokens they understand."""
    path = part_file(work_dir, PART)
    save_tensors(path, {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()})
    table = {**dims.to_dict(), "encoder": dims.encoder.to_dict(), "estimator": dims.estimator.to_dict()}
    path.with_suffix(".json").write_text(json.dumps({**table, "code_hash": code_hash}, indent=1))


@torch.no_grad()
def _start(flow: Flow, speech: VoiceTokenSpeech, levels: list[int], work_dir: Path) -> None:
    """Where the first step begins: the shipped flow if it has our sizes, else good first guesses.

    A shipped flow of other voice tokens still knows how speech moves: only its token table is begun anew.
    """
    _start_from_scratch(flow, speech, levels)
    path = part_file(work_dir, PART)
    if not path.exists():
        return
    table, (weights, _) = json.loads(path.with_suffix(".json").read_text()), load_tensors(path)
    if table.get("code_hash") != speech.code_hash:
        weights.pop("input_embedding.weight")
    wanted = flow.state_dict()
    if all(name in wanted and wanted[name].shape == tensor.shape for name, tensor in weights.items()):
        flow.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, strict=False)
        print(
            f"0f: warm start from {path.name}, token table {'kept' if len(weights) == len(wanted) else 'new'}",
            flush=True,
        )


def _start_from_scratch(flow: Flow, speech: VoiceTokenSpeech, levels: list[int]) -> None:
    """The first mean is the average mel, the first direction is zero, and tokens with like FSQ digits are alike."""
    digits, rest = torch.zeros(flow.dims.vocab_size, len(levels)), torch.arange(flow.dims.vocab_size)
    for place, level in enumerate(levels):  # the id is a mixed-base number, first digit least significant
        digits[:, place] = rest % level - (level - 1) / 2
        rest = rest // level
    mixing = torch.randn(len(levels), flow.dims.encoder.output_size) / len(levels) ** 0.5
    flow.input_embedding.weight.mul_(0.1).add_(digits @ mixing)
    _open_path(flow.decoder.estimator, flow.dims.num_mel_bins)
    average = np.mean([mel.astype(np.float32).mean(1) for mel in speech.mels], axis=0)
    flow.encoder_proj.bias.copy_(torch.from_numpy(average))
    torch.nn.init.zeros_(flow.decoder.estimator.final_proj.weight)
    torch.nn.init.zeros_(flow.decoder.estimator.final_proj.bias)


def _open_path(estimator: FlowEstimator, bins: int) -> None:
    """Let x - mu run through the untrained estimator to its last layer.

    The noise to remove is small beside x and mu (log-mels of -11 .. 2), and a small network does not find their
    difference by itself: without this, 430 steps learnt next to nothing. So the residual convolutions begin as
    identities, of x - mu in the first one, with the rest turned down.
    """
    width = estimator.dims.channels
    stages = [*estimator.down_blocks, *estimator.mid_blocks, *estimator.up_blocks]
    for stage in stages:
        conv = stage[0].res_conv
        conv.weight.mul_(0.1)
        if conv.in_channels % width == 0:  # all but the first: pass on, up: the mean of path and skip
            for part in range(conv.in_channels // width):
                conv.weight[:, part * width : (part + 1) * width, 0] += torch.eye(width) * width / conv.in_channels
    first, shared = stages[0][0], min(bins, width)
    for conv in (first.res_conv, first.block1.block[0]):  # input channels: x, mu, speaker, condition
        conv.weight[:, :bins] = -conv.weight[:, bins : 2 * bins]
    for channel in range(shared):
        first.res_conv.weight[channel, channel, 0] += 2.0
        first.res_conv.weight[channel, bins + channel, 0] -= 2.0
    for conv in (estimator.down_blocks[0][2], estimator.up_blocks[0][2], estimator.final_block.block[0]):
        conv.weight.mul_(0.2)
        conv.weight[..., -1] += torch.eye(width)  # the last tap is the current frame


def _train(
    flow: Flow,
    phase: str,
    stage: StageConfig,
    folder: Path,
    budget_s: float,
    loss: Callable[[int], Tensor],
    save: Callable[[StepLoop], None],
) -> StepLoop:
    """One phase: its trainable half, its own folder and budget. The moving average is left in the model."""
    names = [name for name, _ in flow.named_parameters()]
    is_estimator = [name.startswith((_ESTIMATOR, "spk_embed")) for name in names]
    freeze_except(flow, [n for n, estimator in zip(names, is_estimator, strict=True) if estimator == (phase == "flow")])
    (folder / phase).mkdir(parents=True, exist_ok=True)
    settings = replace(LoopSettings.from_table(stage.settings), autocast_bf16=False)
    loop = StepLoop(flow, settings, folder / phase, budget_s, lambda name, p: False)
    if loop.progress < 1.0:
        loop.run(loss, lambda: save(loop), lambda line: print(f"0f {phase}: {line}", flush=True))
    flow.load_state_dict(loop.averaged_state())
    return loop


def run(stage: StageConfig, work_dir: Path, budget_s: float) -> dict[str, float]:
    """Both phases, then the scores and the choice of the number of steps."""
    torch.set_num_threads(1)
    torch.manual_seed(stage.seed)
    settings, folder = stage.settings, stage.folder(work_dir)
    dims = FlowDims.from_dict(settings["dims"])
    flow = Flow(dims)
    train = load_speech(work_dir / CODES_FILE, False, settings["num_train_utterances"], False)
    batches = Batches(train, settings["tokens_per_batch"], stage.seed)
    total = sum(len(tokens) for tokens in train.tokens) / dims.token_rate_hz
    size = sum(p.numel() for p in flow.parameters())
    print(f"0f: {len(train.texts)} utterances, {total / 60:.0f} min, {size} parameters", flush=True)
    mean_only = replace(dims, n_timesteps=0)
    _start(flow, train, settings["fsq_levels"], work_dir)

    def save(loop: StepLoop) -> None:  # an early reader gets the mean
        ship(loop.averaged_state(), mean_only, train.code_hash, work_dir)

    mean_s = budget_s * settings["mean_share"]
    _train(flow, "mean", stage, folder, mean_s, lambda step: mean_loss(flow, batches, step), save)
    _train(flow, "flow", stage, folder, budget_s - mean_s, lambda step: matching_loss(flow, batches, step), save)

    held = load_speech(work_dir / CODES_FILE, True, settings["num_test_utterances"], True)
    # Scored as shipped: rounded to bf16.
    flow.load_state_dict({name: tensor.to(torch.bfloat16).float() for name, tensor in flow.state_dict().items()})
    # Less noise than in training: the flow still moves from the mean, with less to undo.
    flow.dims = dims = replace(dims, noise_scale=settings["serving_noise_scale"])
    steps = [number for number in settings["steps_tried"] if number]
    metrics = evaluate(flow.eval(), load_shipped_vocoder(work_dir), Listener(work_dir), held, steps)
    best = min(steps, key=lambda number: metrics[f"wer_flow_{number}"])
    metrics["wer_flow"] = metrics[f"wer_flow_{best}"]
    adds_error = metrics["wer_flow"] > metrics["wer_mean"]
    metrics["steps_shipped"] = 0.0 if adds_error else float(best)
    metrics["wer_resynthesis"] = metrics["wer_mean"] if adds_error else metrics["wer_flow"]
    chosen = replace(dims, n_timesteps=int(metrics["steps_shipped"]))
    ship(flow.state_dict(), chosen, train.code_hash, work_dir)
    return metrics
