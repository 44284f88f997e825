"""Stage 0c: the voice tokenizer, cut out of the trained encoder, and the agent's speech as voice tokens.

Both halves start as copies of the encoder. The projection into the bottleneck starts as the best linear separation
(LDA) of the
free phoneme labels; the share of quantised frames grows from 0.2 to 1; a frame-wise KL to the encoder as teacher
keeps the
alignment that CTC alone would have to learn again. Afterwards the ids are frozen and their hash is kept.

Writes `ship/voice_tokenizer.safetensors` and, for stages 0f and 0h, `agent_codes.npz` with
`texts` [N], `codes` int16 [sum T], `code_starts` [N + 1], `waveforms` int16 at 24 kHz [sum S], `waveform_starts` [N +
1],
`held` bool [N] (sentences of the held-out split), `code_hash`. T tokens and S samples of an utterance agree: S = T *
960.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import soxr
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from minmo_runtime.features import fbank
from minmo_runtime.model.dims import EncoderDims, VoiceTokenizerDims
from minmo_runtime.model.encoder import VoiceEncoder, collapse
from minmo_runtime.model.voice_tokenizer import VoiceTokenizer, pad_features
from minmo_runtime.training import data, sentences, synthesis
from minmo_runtime.training.batches import Batch, Shard
from minmo_runtime.training.encoder import NUM_PHONEMES, held_out_sets, load_encoder, recognise, word_error_rate
from minmo_runtime.training.stage import StageConfig, part_file

OUTPUT_RATE_HZ = 24_000
SAMPLES_PER_TOKEN = OUTPUT_RATE_HZ // 25


def load_tokenizer(work_dir: Path) -> VoiceTokenizer:
    path = part_file(work_dir, "voice_tokenizer")
    stored = json.loads(path.with_suffix(".json").read_text())
    dims = VoiceTokenizerDims.from_dict(stored["voice_tokenizer"])
    tokenizer = VoiceTokenizer(EncoderDims.from_dict(stored["encoder"]), dims)
    tokenizer.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    return tokenizer.eval()


class TrainingHeads(nn.Module):
    """Only for training: phonemes and the log-mel spectrum from the quantised values."""

    def __init__(self, num_values: int, num_mel_bins: int) -> None:
        super().__init__()
        self.phoneme = nn.Sequential(nn.Linear(num_values, 192), nn.ReLU(), nn.Linear(192, NUM_PHONEMES))
        # Four fbank frames a token; the utterance's mean and deviation stand for voice and line.
        self.mel_in = nn.Linear(num_values + 2 * num_mel_bins, 192)
        self.mel_mix = nn.Conv1d(192, 192, 5, padding=2)
        self.mel_out = nn.Linear(192, 4 * num_mel_bins)

    def mel(self, values: Tensor, features: Tensor) -> Tensor:
        stats = torch.cat([features.mean(1), features.std(1)], dim=-1).unsqueeze(1).expand(-1, values.shape[1], -1)
        x = F.relu(self.mel_in(torch.cat([values, stats], dim=-1)))
        x = x + F.relu(self.mel_mix(x.transpose(1, 2)).transpose(1, 2))
        return self.mel_out(x).unflatten(-1, (4, -1)).flatten(1, 2)


@torch.no_grad()
def initialise_by_lda(tokenizer: VoiceTokenizer, shard: Shard, num_utterances: int = 600) -> None:
    """Set `project_down` to the directions that separate phonemes best, scaled so that all three levels are used."""
    rng = np.random.default_rng(0)
    picks = [int(i) for i in rng.permutation(len(shard))[:num_utterances]]
    hidden, labels = [], []
    for start in range(0, len(picks), 32):
        batch = shard.collate(picks[start : start + 32], lambda text: [])
        lower = tokenizer.lower(batch.features, batch.lengths)
        known = batch.phonemes[:, : lower.shape[1]] != data.UNKNOWN
        hidden.append(lower[known])
        labels.append(batch.phonemes[:, : lower.shape[1]][known])
    x, y = torch.cat(hidden).double(), torch.cat(labels)
    mean = x.mean(0)
    within = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    between = torch.zeros_like(within)
    for label in y.unique():
        rows = x[y == label]
        centred = rows - rows.mean(0)
        within += centred.T @ centred
        offset = (rows.mean(0) - mean).unsqueeze(1)
        between += len(rows) * offset @ offset.T
    within = within / len(x) + 1e-3 * torch.eye(x.shape[1], dtype=torch.float64)
    whiten = torch.linalg.inv(torch.linalg.cholesky(within))
    _, vectors = torch.linalg.eigh(whiten @ (between / len(x)) @ whiten.T)
    directions = vectors[:, -len(tokenizer.dims.levels) :].T @ whiten
    scale = 0.9 / (x @ directions.T).std(0)  # tanh(0.55) = 0.5 is the border between levels: about a third each
    weight = directions * scale.unsqueeze(1)
    tokenizer.quantizer.project_down.weight.copy_(weight.float())
    tokenizer.quantizer.project_down.bias.copy_((-weight @ mean).float())


def losses(
    tokenizer: VoiceTokenizer, heads: TrainingHeads, teacher: VoiceEncoder, batch: Batch, quantised: float
) -> dict[str, Tensor]:
    lower = tokenizer.lower(batch.features, batch.lengths)
    values, smooth = tokenizer.quantizer(lower)
    if quantised < 1:  # gradual insertion: some frames still pass unrounded
        values = torch.where(torch.rand(values.shape[:2]).unsqueeze(-1) < quantised, values, smooth)
    log_probs = tokenizer.upper(tokenizer.project_up(values), batch.lengths)
    with torch.no_grad():
        target = teacher.ctc_log_probs(teacher(batch.features, batch.lengths))
    valid = torch.arange(log_probs.shape[1]) < batch.lengths.unsqueeze(1)
    ctc = F.ctc_loss(
        log_probs.transpose(0, 1),
        batch.targets,
        batch.lengths,
        batch.target_lengths,
        reduction="sum",
        zero_infinity=True,
    )
    found = {
        "ctc": ctc / batch.target_lengths.sum().clamp(min=1),
        "kl": F.kl_div(log_probs[valid], target[valid], log_target=True, reduction="batchmean"),
    }
    frames = torch.arange(batch.features.shape[1]) < batch.frames.unsqueeze(1)
    mel = heads.mel(values, batch.features)[:, : batch.features.shape[1]]
    found["mel"] = (mel - batch.features)[frames].abs().mean()
    known = batch.phonemes[:, : values.shape[1]] != data.UNKNOWN
    if known.any():
        found["phoneme"] = F.cross_entropy(heads.phoneme(values[known]), batch.phonemes[:, : values.shape[1]][known])
    return found


@torch.no_grad()
def evaluate(tokenizer: VoiceTokenizer, ctc_tokenizer: Tokenizer, sets: dict[str, Shard]) -> dict[str, float]:
    """WER through the bottleneck and how many ids are in use."""
    tokenizer.eval()
    found: dict[str, float] = {}
    counts = torch.zeros(tokenizer.num_tokens)
    for name, shard in sets.items():
        references, hypotheses = [], []
        for batch in shard.batches(lambda text: ctc_tokenizer.encode(text).ids, 60, None):
            ids = tokenizer.tokenize(batch.features, batch.lengths)
            log_probs = tokenizer.ctc_from_tokens(ids, batch.lengths)
            for row, length in enumerate(batch.lengths.tolist()):
                counts += torch.bincount(ids[row, :length], minlength=tokenizer.num_tokens)
                references.append(batch.texts[row])
                hypotheses.append(ctc_tokenizer.decode(collapse(log_probs[row, :length].argmax(-1))).strip())
        found[f"wer_{name}"], found[f"words_{name}"] = word_error_rate(references, hypotheses)
    share = counts / counts.sum()
    found["ids_used"] = float((counts > 0).sum())
    found["perplexity"] = float(torch.exp(-(share * share.clamp(min=1e-12).log()).sum()))
    tokenizer.train()
    return found


def save(tokenizer: VoiceTokenizer, work_dir: Path) -> None:
    path = part_file(work_dir, "voice_tokenizer")
    # Rounded to bf16 before the hash is taken: what ships decides the ids.
    tensors = {key: value.to(torch.bfloat16).contiguous() for key, value in tokenizer.state_dict().items()}
    tokenizer.load_state_dict({key: value.float() for key, value in tensors.items()})
    save_file(tensors, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").rename(path)
    dims = {
        "encoder": tokenizer.encoder.dims.to_dict(),
        "voice_tokenizer": tokenizer.dims.to_dict(),
        "code_hash": tokenizer.code_hash(),
    }
    path.with_suffix(".json").write_text(json.dumps(dims, indent=1))


def run(stage: StageConfig, work_dir: Path, budget_s: float) -> dict[str, float]:
    """Train for `budget_s` seconds, then freeze the ids and write the agent's codes."""
    torch.set_num_threads(1)
    torch.manual_seed(stage.seed)
    settings = stage.settings
    speech_dir = Path(settings["speech_dir"]) if settings.get("speech_dir") else None
    teacher = load_encoder(work_dir)
    ctc_tokenizer = Tokenizer.from_file(str(work_dir / "ship" / "ctc_tokenizer.json"))
    sets = {
        name: shard
        for name, shard in held_out_sets(work_dir, speech_dir, settings["held_out_hours"]).items()
        if name != "human"
    }
    agent_set = work_dir / "shards" / "held_agent.npz"
    if not agent_set.exists():
        sentences = data.agent_sentences(77, work_dir, "held", own_voice_share=1.0)
        data.write_shard(agent_set, sentences, np.random.default_rng(77), 0.0, 0.3)
    sets["agent"] = Shard(agent_set)
    tokenizer = VoiceTokenizer(
        teacher.dims, VoiceTokenizerDims(settings["cut_layer"], tuple(settings["levels"]))
    ).train()
    tokenizer.encoder.load_state_dict(teacher.state_dict())
    shards = sorted(p for p in (work_dir / "shards").glob("train_*.npz") if ".tmp" not in p.name)
    initialise_by_lda(tokenizer, Shard(next(p for p in shards if "agent" in p.name)))
    heads = TrainingHeads(len(settings["levels"]), teacher.dims.num_mel_bins)
    optimiser = torch.optim.AdamW(
        [*tokenizer.parameters(), *heads.parameters()], lr=1e-3, betas=(0.9, 0.98), weight_decay=0.02
    )
    resume_path, step, spent = stage.folder(work_dir) / "resume.pt", 0, 0.0
    if resume_path.exists():
        stored = torch.load(resume_path, weights_only=True)
        tokenizer.load_state_dict(stored["tokenizer"])
        heads.load_state_dict(stored["heads"])
        optimiser.load_state_dict(stored["optimiser"])
        step, spent = stored["step"], stored["spent"]
    rng = np.random.default_rng(stage.seed + step)
    started, last_report, running = time.monotonic() - spent, time.monotonic(), {}  # type: ignore[var-annotated]
    weights = settings["weights"]
    while time.monotonic() - started < budget_s:
        # The agent's own voice is what the ids are for: its shards come every second time.
        pool = [p for p in shards if ("agent" in p.name) == (rng.random() < 0.5)] or shards
        for batch in Shard(pool[rng.integers(len(pool))]).batches(
            lambda text: ctc_tokenizer.encode(text).ids, settings["batch_s"], rng
        ):
            share = (time.monotonic() - started) / budget_s
            if share >= 1:
                break
            rate = settings["learning_rate"] * min(1.0, (step + 1) / 30) * max(0.05, 1 - share)
            for group in optimiser.param_groups:
                group["lr"] = rate
            found = losses(tokenizer, heads, teacher, batch, min(1.0, 0.2 + 0.8 * share / 0.3))
            loss = sum(weights[name] * value for name, value in found.items())
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(tokenizer.parameters(), 2.0)
            optimiser.step()
            step += 1
            for name, value in found.items():
                running[name] = 0.98 * running.get(name, float(value.detach())) + 0.02 * float(value.detach())
            if time.monotonic() - last_report > settings["report_s"]:
                scores = evaluate(tokenizer, ctc_tokenizer, sets)
                line = {"s": int(time.monotonic() - started), "step": step, **running, **scores}
                print(json.dumps({key: round(value, 4) for key, value in line.items()}), flush=True)
                state = {
                    "tokenizer": tokenizer.state_dict(),
                    "heads": heads.state_dict(),
                    "optimiser": optimiser.state_dict(),
                }
                torch.save({**state, "step": step, "spent": time.monotonic() - started}, resume_path)
                last_report = time.monotonic()
    save(tokenizer, work_dir)
    scores = evaluate(tokenizer, ctc_tokenizer, sets)
    for name, shard in sets.items():
        scores[f"wer_{name}_source"] = word_error_rate(*recognise(teacher, ctc_tokenizer, shard))[0]
    print(json.dumps({"final": True, **{key: round(value, 4) for key, value in scores.items()}}), flush=True)
    write_agent_codes(tokenizer.eval(), work_dir, settings["agent_utterances"], settings["agent_held_utterances"])
    return scores


@torch.no_grad()
def write_agent_codes(tokenizer: VoiceTokenizer, work_dir: Path, num_train: int, num_held: int) -> None:
    """Speak agent sentences in the agent's voice and tokenize them."""
    espeak = synthesis.Espeak(synthesis.prepare_voice_folder(work_dir / "voices"))
    rng = np.random.default_rng(3)
    texts: list[str] = []
    codes: list[np.ndarray] = []
    waveforms: list[np.ndarray] = []
    held: list[bool] = []
    for split, count in (("train", num_train), ("held", num_held)):
        for text in sentences.agent_utterances(31, split, count):
            raw, _ = espeak.synthesise(text, synthesis.AGENT_VOICE, synthesis.agent_voice_prosody())
            raw, _ = synthesis.trim_silence(raw, synthesis.ESPEAK_RATE_HZ)
            wave = soxr.resample(raw, synthesis.ESPEAK_RATE_HZ, OUTPUT_RATE_HZ).astype(np.float32) * 0.6
            num_tokens = len(wave) // SAMPLES_PER_TOKEN + 1
            wave = np.pad(wave, (0, num_tokens * SAMPLES_PER_TOKEN - len(wave)))
            narrow = soxr.resample(wave, OUTPUT_RATE_HZ, 16_000).astype(np.float32)
            # A breath of noise floor: digital silence never occurs in the encoder's training.
            narrow = np.pad(narrow, (0, 640)) + rng.standard_normal(len(narrow) + 640).astype(np.float32) * 3e-4
            features, lengths = pad_features([fbank(torch.from_numpy(narrow.astype(np.float32)))])
            ids = tokenizer.tokenize(features, lengths)[0, :num_tokens].numpy()
            assert len(ids) == num_tokens, f"{len(ids)} ids for {num_tokens} tokens of audio"
            texts.append(text)
            codes.append(ids.astype(np.int16))
            waveforms.append((np.clip(wave, -1, 1) * 32767).astype(np.int16))
            held.append(split == "held")
    temporary = work_dir / "agent_codes.tmp.npz"
    np.savez(
        temporary,
        texts=np.array(texts),
        codes=np.concatenate(codes),
        code_starts=np.cumsum([0] + [len(c) for c in codes]),
        waveforms=np.concatenate(waveforms),
        waveform_starts=np.cumsum([0] + [len(w) for w in waveforms]),
        held=np.array(held),
        code_hash=np.array(tokenizer.code_hash()),
    )
    temporary.rename(work_dir / "agent_codes.npz")
