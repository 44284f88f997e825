"""Stage 0b: the voice encoder by CTC on word pieces, with phoneme, language, emotion and event losses beside it.

Recipe: word pieces, 20 s batches, causal conv front, light augmentation first, warm-up then constant rate then decay;
human clips
in the shards from the start. Reads `<work_dir>/shards/train_*.npz` (training.data keeps making fresh ones) and the
held-out sets
it builds itself; writes `ship/encoder.safetensors`, `ship/encoder.json` (dims) and `ship/ctc_tokenizer.json`.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import jiwer
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from minmo_runtime.caption_search import CaptionReader, PieceNgram
from minmo_runtime.model.dims import EncoderDims
from minmo_runtime.model.encoder import TAG_GROUPS, VoiceEncoder
from minmo_runtime.training import data, sentences
from minmo_runtime.training.batches import Batch, Shard
from minmo_runtime.training.ngram import NGRAM_FILE, write_for_callers
from minmo_runtime.training.stage import StageConfig, part_file

BLANK = "<blank>"
NUM_PHONEMES = 96  # room for every label espeak has shown


def train_ctc_tokenizer(path: Path, speech_dir: Path | None, vocab_size: int) -> Tokenizer:
    """Word pieces over everything a caller may say; id 0 is the CTC blank; `▁` begins a word."""
    texts = sentences.caller_utterances(7, "train", 20_000) + sentences.agent_utterances(7, "train", 4_000)
    if speech_dir:
        texts += [clip.text for clip in data.human_clips(speech_dir)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    alphabet = list("abcdefghijklmnopqrstuvwxyz'")
    tokenizer.train_from_iterator(
        [data.plain_words(text) for text in texts],
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[BLANK], initial_alphabet=alphabet, show_progress=False
        ),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    return tokenizer


class AuxiliaryHeads(nn.Module):
    """Training-only: phoneme classifier on a middle layer."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.phoneme = nn.Sequential(nn.LayerNorm(size), nn.Linear(size, NUM_PHONEMES))


def hidden_at(encoder: VoiceEncoder, features: Tensor, lengths: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Output after `layer` blocks and the final output, in one pass."""
    stack = encoder.encoder
    x = stack.embed(encoder.normalise(features))
    mask = stack.attention_mask(x.shape[1], lengths)
    valid = (torch.arange(x.shape[1]) < lengths.unsqueeze(1)).unsqueeze(2).to(x.dtype)
    middle = x
    for index, block in enumerate(stack.blocks()):
        x = block(x, mask, valid)
        if index + 1 == layer:
            middle = x
    return middle, stack.after_norm(x)


def losses(encoder: VoiceEncoder, heads: AuxiliaryHeads, batch: Batch, layer: int) -> dict[str, Tensor]:
    middle, hidden = hidden_at(encoder, batch.features, batch.lengths, layer)
    log_probs = encoder.ctc_log_probs(hidden).transpose(0, 1)
    ctc = F.ctc_loss(log_probs, batch.targets, batch.lengths, batch.target_lengths, reduction="sum", zero_infinity=True)
    found = {"ctc": ctc / batch.target_lengths.sum().clamp(min=1)}
    known = batch.phonemes != data.UNKNOWN
    if known.any():
        found["phoneme"] = F.cross_entropy(
            heads.phoneme(middle[:, : batch.phonemes.shape[1]][known]), batch.phonemes[known]
        )
    logits = encoder.tag_logits(hidden, batch.lengths)
    for column, group in enumerate(TAG_GROUPS):
        rows = batch.tags[:, column] >= 0
        if rows.any():
            found[group] = F.cross_entropy(logits[group][rows], batch.tags[rows, column])
    return found


def spec_augment(features: Tensor, generator: torch.Generator, is_full: bool) -> Tensor:
    """Two frequency masks; with `is_full` also a time mask of up to 0.3 s. Filled with the batch mean."""
    fill = features.mean()
    for _ in range(2):
        width = int(torch.randint(0, 11, (1,), generator=generator))
        start = int(torch.randint(0, features.shape[2] - width, (1,), generator=generator))
        features[:, :, start : start + width] = fill
    if is_full and features.shape[1] > 120:
        width = int(torch.randint(0, 30, (1,), generator=generator))
        start = int(torch.randint(0, features.shape[1] - width, (1,), generator=generator))
        features[:, start : start + width] = fill
    return features


@torch.no_grad()
def recognise(
    encoder: VoiceEncoder, tokenizer: Tokenizer, shard: Shard, captions: CaptionReader = CaptionReader()
) -> tuple[list[str], list[str]]:
    """(references, hypotheses) of a shard; the best path unless `captions` has an n-gram."""
    references, hypotheses = [], []
    for batch in shard.batches(lambda text: tokenizer.encode(text).ids, 60, None):
        log_probs = encoder.ctc_log_probs(encoder(batch.features, batch.lengths))
        for row, length in enumerate(batch.lengths.tolist()):
            references.append(batch.texts[row])
            search = captions.new()
            search.push(log_probs[row, :length].numpy())
            hypotheses.append(tokenizer.decode(search.tokens).strip())
    return references, hypotheses


def word_error_rate(references: list[str], hypotheses: list[str]) -> tuple[float, int]:
    """(WER, number of reference words), empty references left out."""
    pairs = [(r, h) for r, h in zip(references, hypotheses, strict=True) if r]
    return jiwer.wer([r for r, _ in pairs], [h for _, h in pairs]), sum(len(r.split()) for r, _ in pairs)


def held_out_sets(work_dir: Path, speech_dir: Path | None, hours: float) -> dict[str, Shard]:
    """Unseen voices and phrasings, clean and telephone, and people never trained on; built once."""
    folder = work_dir / "shards"
    folder.mkdir(parents=True, exist_ok=True)
    for name, share in (("clean", 0.0), ("telephone", 1.0)):
        path = folder / f"held_{name}.npz"
        if not path.exists():
            data.build_shard(path, 5, hours, work_dir, None, True, 0.0, share)
    path = folder / "held_human.npz"
    if speech_dir and not path.exists() and data.human_clips(speech_dir, True):
        data.build_human_shard(path, speech_dir, work_dir, 400)
    names = ("clean", "telephone", "human")
    return {name: Shard(folder / f"held_{name}.npz") for name in names if (folder / f"held_{name}.npz").exists()}


def evaluate(
    encoder: VoiceEncoder, tokenizer: Tokenizer, sets: dict[str, Shard], captions: CaptionReader = CaptionReader()
) -> dict[str, float]:
    """WER per set over callers' sentences; `_open` = everything else (random words, general sentences), of
    people: digits apart."""
    encoder.eval()
    is_domain, found = data.domain_keep(0.0), {}
    for name, shard in sets.items():
        pairs = list(zip(*recognise(encoder, tokenizer, shard, captions), strict=True))
        inside = {
            reference for reference, _ in pairs if is_domain(reference) and (name != "human" or is_digits(reference))
        }
        for label, chosen in (("", True), ("_open", False)):
            part = [pair for pair in pairs if (pair[0] in inside) == chosen and pair[0]]
            if part:
                rate, words = word_error_rate([r for r, _ in part], [h for _, h in part])
                found[f"wer_{name}{label}"], found[f"words_{name}{label}"] = rate, words
    encoder.train()
    return found


def is_digits(text: str) -> bool:
    return set(text.split()) <= set("zero one two three four five six seven eight nine".split())


def learning_rate(share: float, peak: float, decay_from: float, step: int, warmup: int) -> float:
    """Warm-up by steps, then flat, then linear to 3 % by share of the time budget."""
    rate = peak * min(1.0, (step + 1) / warmup)
    return rate * (1.0 if share < decay_from else max(0.03, 1 - 0.97 * (share - decay_from) / (1 - decay_from)))


def save(encoder: VoiceEncoder, work_dir: Path, part: str = "encoder") -> None:
    path = part_file(work_dir, part)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file({key: value.contiguous() for key, value in encoder.state_dict().items()}, temporary)
    temporary.rename(path)
    path.with_suffix(".json").write_text(json.dumps(encoder.dims.to_dict(), indent=1))


def load_encoder(work_dir: Path) -> VoiceEncoder:
    """The current encoder of the work folder, in evaluation mode."""
    path = part_file(work_dir, "encoder")
    encoder = VoiceEncoder(EncoderDims.from_dict(json.loads(path.with_suffix(".json").read_text())))
    encoder.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    return encoder.eval()


def measure_cmvn(encoder: VoiceEncoder, shard: Shard) -> None:
    features = torch.from_numpy(shard.features[:: max(1, len(shard.features) // 200_000)].astype(np.float32))
    encoder.cmvn_shift.copy_(-features.mean(0))
    encoder.cmvn_scale.copy_(1.0 / features.std(0))


def make_encoder(settings: dict[str, object], vocab_size: int) -> VoiceEncoder:
    table = dict(settings["dims"], vocab_size=vocab_size, has_cmvn=True)  # type: ignore[call-overload]
    table.update(languages=list(data.LANGUAGES), emotions=list(data.EMOTIONS), events=list(data.EVENTS))
    return VoiceEncoder(EncoderDims.from_dict(table))


def run(stage: StageConfig, work_dir: Path, budget_s: float) -> dict[str, float]:
    """Train for `budget_s` seconds of wall time, resuming from the stage folder; returns WERs of the held-out sets."""
    torch.set_num_threads(1)
    settings = stage.settings
    speech_dir = Path(settings["speech_dir"]) if settings.get("speech_dir") else None
    tokenizer_path = work_dir / "ship" / "ctc_tokenizer.json"
    if tokenizer_path.exists():
        tokenizer = Tokenizer.from_file(str(tokenizer_path))
    else:
        tokenizer = train_ctc_tokenizer(tokenizer_path, speech_dir, settings["vocab_size"])
    torch.manual_seed(stage.seed)
    encoder = make_encoder(settings, tokenizer.get_vocab_size()).train()
    heads = AuxiliaryHeads(encoder.dims.output_size)
    optimiser = torch.optim.AdamW(
        [*encoder.parameters(), *heads.parameters()], lr=1e-3, betas=(0.9, 0.98), weight_decay=0.02
    )
    resume_path, step, spent = stage.folder(work_dir) / "resume.pt", 0, 0.0
    if resume_path.exists():
        stored = torch.load(resume_path, weights_only=True)
        encoder.load_state_dict(stored["encoder"])
        heads.load_state_dict(stored["heads"])
        optimiser.load_state_dict(stored["optimiser"])
        step, spent = stored["step"], stored["spent"]
    elif part_file(work_dir, "encoder").exists():  # warm start from shipped weights
        encoder.load_state_dict(load_encoder(work_dir).state_dict())
        if (stage.folder(work_dir) / "heads.pt").exists():
            heads.load_state_dict(torch.load(stage.folder(work_dir) / "heads.pt", weights_only=True))
    else:
        measure_cmvn(encoder, Shard(_wait_for_shards(work_dir)[0]))
    encode = lambda text: tokenizer.encode(text).ids  # noqa: E731
    rng, generator = np.random.default_rng(stage.seed + step), torch.Generator().manual_seed(stage.seed + step)
    sets = held_out_sets(work_dir, speech_dir, settings["held_out_hours"])
    keep = data.domain_keep(settings["open_share"])
    uses: dict[Path, int] = {}
    running: dict[str, float] = {}
    started, last_report = time.monotonic() - spent, time.monotonic()
    while time.monotonic() - started < budget_s:
        path = min(
            _wait_for_shards(work_dir), key=lambda p: (uses.get(p, 0), -p.stat().st_mtime)
        )  # the least used, newest first
        uses[path] = uses.get(path, 0) + 1
        for batch in Shard(path).batches(encode, settings["batch_s"], rng, keep):
            share = (time.monotonic() - started) / budget_s
            if share >= 1:
                break
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(
                    share, settings["learning_rate"], settings["decay_from"], step, settings["warmup_steps"]
                )
            if rng.random() < settings["mask_share"]:
                batch.features = spec_augment(batch.features, generator, share > settings["time_mask_from"])
            found = losses(encoder, heads, batch, settings["phoneme_layer"])
            weights = {"ctc": 1.0, "phoneme": 1.0 if share < 0.3 else 0.2}
            loss = sum(weights.get(name, 0.1) * value for name, value in found.items())
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(encoder.parameters(), 2.0)
            optimiser.step()
            step += 1
            for name, value in found.items():
                running[name] = 0.98 * running.get(name, float(value.detach())) + 0.02 * float(value.detach())
            if time.monotonic() - last_report > settings["report_s"]:
                scores = evaluate(encoder, tokenizer, sets)
                print(
                    json.dumps({"s": int(time.monotonic() - started), "step": step, **_rounded({**running, **scores})}),
                    flush=True,
                )
                save(encoder, work_dir)
                state = {
                    "encoder": encoder.state_dict(),
                    "heads": heads.state_dict(),
                    "optimiser": optimiser.state_dict(),
                }
                torch.save({**state, "step": step, "spent": time.monotonic() - started}, resume_path)
                last_report = time.monotonic()
    save(encoder, work_dir)
    scores = final_scores(encoder, tokenizer, sets, work_dir)
    print(json.dumps({"final": True, "step": step, **_rounded(scores)}), flush=True)
    return scores


def final_scores(
    encoder: VoiceEncoder, tokenizer: Tokenizer, sets: dict[str, Shard], work_dir: Path
) -> dict[str, float]:
    """As served: searched with the n-gram of callers' sentences; the best path alone beside it as `_greedy`."""
    path = work_dir / "ship" / NGRAM_FILE
    if not path.exists():
        write_for_callers(path, tokenizer)
    served = evaluate(encoder, tokenizer, sets, CaptionReader(PieceNgram.from_file(path)))
    greedy = evaluate(encoder, tokenizer, sets)
    return served | {f"{name}_greedy": value for name, value in greedy.items() if name.startswith("wer")}


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in values.items()}


def _wait_for_shards(work_dir: Path) -> list[Path]:
    while not (paths := sorted((work_dir / "shards").glob("train_*.npz"))) or ".tmp" in paths[0].name:
        time.sleep(2)
    return [path for path in paths if ".tmp" not in path.name]
