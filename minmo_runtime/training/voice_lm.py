"""Stage 0h: the voice LM learns to speak agent sentences from its own text table, one-shot and 5:15 interleaved mixed.

Data: `<work_dir>/agent_codes.npz`, the agent's sentences with their voice tokens (made from the frozen voice
tokenizer). Text is taken in written form (an order number is five digit tokens), because that is what the LLM will say.
A part of the examples has a prefix of zero vectors where stage 2 will put the caller's turn: a projector that starts at
zero then changes nothing. A share of the voice tokens is replaced by random ones on the input side, so that the model
recovers from its own slips.

What a batch holds depends on (seed, step) alone. Sizes and rates: facts/recipes part 2 §A by analogy.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minmo_runtime.model.interleave import IGNORED, Phase, RowKind, training_layout
from minmo_runtime.model.voice_lm import VoiceLm, VoiceLmDims
from minmo_runtime.sampling import SamplingRules
from minmo_runtime.text import DIGIT_WORDS, TextTokenizer
from minmo_runtime.training.evaluate import can_be_heard, wer_of_codes, wer_of_waves
from minmo_runtime.training.loop import LoopSettings, StepLoop
from minmo_runtime.training.resume import load_tensors, save_tensors
from minmo_runtime.training.stage import StageConfig, part_file

PART = "voice_lm"
CODES_FILE = "agent_codes.npz"
MIN_NUMBER_WORDS = 4  # shorter runs of digit words are words ("one moment", "one oh five"), longer ones an order number


@dataclass(frozen=True)
class SpokenText:
    """One agent sentence: written text, its ids, its voice tokens."""

    text: str
    ids: np.ndarray
    voice: np.ndarray


def written_form(spoken: str) -> str:
    """Order numbers back to digits: "order four five six one two." -> "order 45612."; other words stay."""
    word = "(?:" + "|".join(DIGIT_WORDS) + ")"
    run = re.compile(rf"\b{word}(?: {word}){{{MIN_NUMBER_WORDS - 1},}}\b")
    return run.sub(lambda match: "".join(str(DIGIT_WORDS.index(w)) for w in match[0].split()), spoken)


def load_spoken_texts(path: Path, tokenizer: TextTokenizer) -> tuple[list[SpokenText], list[SpokenText], str]:
    """Read `agent_codes.npz` (layout: training/tokenizer.py): training and held-out sentences, and the ids' hash."""
    with np.load(path) as arrays:
        texts, codes, starts = arrays["texts"].tolist(), arrays["codes"].astype(np.int64), arrays["code_starts"]
        held, code_hash = arrays["held"], str(arrays["code_hash"])
    spoken = []
    for index, text in enumerate(texts):
        written = written_form(text)
        ids = np.array(tokenizer.encode(written), np.int64)
        spoken.append(SpokenText(written, ids, codes[starts[index] : starts[index + 1]]))
    train = [item for item, is_held in zip(spoken, held, strict=True) if not is_held]
    return train, [item for item, is_held in zip(spoken, held, strict=True) if is_held], code_hash


def batches_of_epoch(lengths: np.ndarray, rows_per_batch: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Indices of similar length together, padded size <= rows_per_batch, order drawn from (seed, epoch)."""
    rng = np.random.default_rng([seed, epoch])
    order = np.argsort(lengths * rng.uniform(0.9, 1.1, len(lengths)), kind="stable")
    batches: list[np.ndarray] = []
    current: list[int] = []
    longest = 0
    for index in order:
        grown = max(longest, int(lengths[index]))
        if current and grown * (len(current) + 1) > rows_per_batch:
            batches.append(np.array(current))
            current, grown = [], int(lengths[index])
        current.append(int(index))
        longest = grown
    if current:
        batches.append(np.array(current))
    rng.shuffle(batches)
    return batches


@dataclass
class Batch:
    """Padded rows: kinds, indices, targets [B, T]; text ids [B, N]."""

    kinds: Tensor
    indices: Tensor
    targets: Tensor
    text_ids: Tensor
    num_query: int


class VoiceTask:
    """Batches and loss of 0h for one model; no state besides the data."""

    def __init__(self, model: VoiceLm, spoken: list[SpokenText], settings: dict[str, Any], seed: int) -> None:
        self.model, self.spoken, self.settings, self.seed = model, spoken, settings, seed
        self.lengths = np.array([len(item.ids) + len(item.voice) * 16 // 15 + 2 for item in spoken])
        self._epoch, self._batches = -1, [np.array([], np.int64)]
        self._batch_counts: list[int] = []

    def batch(self, step: int) -> Batch:
        """The batch of this step; walks epochs in order."""
        epoch, offset = 0, step
        while True:
            while len(self._batch_counts) <= epoch:
                self._load_epoch(len(self._batch_counts))
                self._batch_counts.append(len(self._batches))
            if offset < self._batch_counts[epoch]:
                break
            offset -= self._batch_counts[epoch]
            epoch += 1
        self._load_epoch(epoch)
        return self.collate(self._batches[offset], np.random.default_rng([self.seed, 1, step]))

    def collate(self, chosen: np.ndarray, rng: np.random.Generator) -> Batch:
        """Lay out these utterances; order, query prefix and slips are drawn from `rng`."""
        settings, size = self.settings, self.model.dims.speech_token_size
        num_query = int(rng.integers(1, settings["max_query"] + 1)) if rng.random() < settings["query_share"] else 0
        rows, targets = [], []
        for index in chosen:
            rules = self.model.dims.rules(interleaved=bool(rng.random() < settings["interleaved_share"]))
            layout = training_layout(len(self.spoken[index].ids), self.spoken[index].voice.tolist(), rules, num_query)
            pairs = np.array([(row.kind.value, row.index) for row in layout.rows])
            slips = (pairs[:, 0] == RowKind.VOICE.value) & (rng.random(len(pairs)) < settings["slip_share"])
            pairs[slips, 1] = rng.integers(0, size, slips.sum())
            rows.append(torch.from_numpy(pairs))
            targets.append(torch.tensor(layout.targets))
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
        ids = [torch.from_numpy(self.spoken[index].ids) for index in chosen]
        return Batch(
            padded[..., 0],
            padded[..., 1].clamp_min(0),
            nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=IGNORED),
            nn.utils.rnn.pad_sequence(ids, batch_first=True),
            num_query,
        )

    def logits(self, batch: Batch) -> Tensor:
        semantic = self.model.text_vectors(batch.text_ids)
        query = semantic.new_zeros(len(semantic), batch.num_query, semantic.shape[2]) if batch.num_query else None
        return self.model(self.model.embed_layout(batch.kinds, batch.indices, semantic, query))

    def loss(self, step: int) -> Tensor:
        batch = self.batch(step)
        return voice_loss(self.logits(batch), batch.targets)

    def _load_epoch(self, epoch: int) -> None:
        if epoch != self._epoch:
            self._batches = batches_of_epoch(self.lengths, self.settings["tokens_per_step"], self.seed, epoch)
            self._epoch = epoch


def voice_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over the rows that have a target; only those go through the softmax."""
    chosen = targets != IGNORED
    return nn.functional.cross_entropy(logits[chosen].float(), targets[chosen])


@torch.no_grad()
def teacher_forced_scores(task: VoiceTask, chosen: list[int]) -> dict[str, float]:
    """Loss and accuracy on utterances, without slips or prefix, each row order once."""
    total = correct = nats = 0.0
    quiet = {**task.settings, "slip_share": 0.0, "query_share": 0.0}
    for share in (0.0, 1.0):
        plain = VoiceTask(task.model, task.spoken, {**quiet, "interleaved_share": share}, task.seed)
        for start in range(0, len(chosen), 16):
            batch = plain.collate(np.array(chosen[start : start + 16]), np.random.default_rng(0))
            logits, targets = plain.logits(batch), batch.targets
            mask = targets != IGNORED
            nats += float(nn.functional.cross_entropy(logits[mask].float(), targets[mask], reduction="sum"))
            correct += float((logits[mask].argmax(-1) == targets[mask]).sum())
            total += float(mask.sum())
    return {"loss": nats / total, "accuracy": correct / total}


def speak(
    model: VoiceLm,
    texts: list[Tensor],
    sampling: SamplingRules | None = None,
    interleaved: bool = True,
    seed: int = 0,
    batch_size: int = 16,
    queries: list[Tensor | None] | None = None,
) -> list[list[int]]:
    """Voice tokens for each list of semantic vectors [N, D], by the serving code, `batch_size` calls side by side.

    `sampling`: other than the checkpoint's own.
    """
    said: list[list[int]] = []
    rules = model.dims.rules(interleaved=interleaved)
    sampling = sampling or model.dims.sampling()
    for start in range(0, len(texts), batch_size):
        part = texts[start : start + batch_size]
        cache = model.new_cache(len(part), 1024)
        streams = []
        for slot, vectors in enumerate(part):
            query = queries[start + slot] if queries else None
            stream = model.new_stream(slot, seed + start + slot, rules, sampling, query)
            stream.push(vectors)
            stream.finish()
            streams.append(stream)
        while any(stream.turn.phase is not Phase.DONE for stream in streams):
            model.decode_step(streams, cache)
        said += [stream.turn.voice_tokens for stream in streams]
    return said


def is_trunk_matrix(name: str, parameter: Tensor) -> bool:
    """What Muon trains: the matrices inside the trunk's layers, not tables and heads."""
    return ".layers." in name and parameter.dim() == 2


def build(settings: dict[str, Any], text_vocab_size: int, seed: int) -> VoiceLm:
    """A model before training."""
    dims = VoiceLmDims.from_dict({**settings["dims"], "text_vocab_size": text_vocab_size})
    generator = torch.Generator().manual_seed(seed)
    model = VoiceLm(dims).init_weights(generator)
    start_from_digits(model, settings["fsq_levels"], generator)
    return model


@torch.no_grad()
def start_from_digits(model: VoiceLm, levels: list[int], generator: torch.Generator) -> None:
    """Rows of the table and of the head as sums over the FSQ digits: neighbours in sound start as neighbours."""
    ids = torch.arange(model.dims.speech_token_size)
    digits = torch.zeros(len(ids), len(levels))
    for place, level in enumerate(levels):
        digits[:, place] = ids % level - (level - 1) / 2
        ids = ids // level
    size = model.dims.hidden_size
    for weight, scale in ((model.speech_embedding.weight, 0.1), (model.llm_decoder.weight, 0.5 * size**-0.5)):
        mixing = torch.randn(len(levels), size, generator=generator) / len(levels) ** 0.5
        rows = weight[: len(digits)]
        rows.copy_(0.5 * rows + scale * (digits @ mixing))


def load_voice_lm(path: Path) -> VoiceLm:
    """From a part file; the sizes stand in its metadata."""
    tensors, metadata = load_tensors(path)
    model = VoiceLm(VoiceLmDims.from_dict(json.loads(metadata["dims"])))
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return model.eval()


def ship(path: Path, loop: StepLoop, model: VoiceLm, extra: dict[str, str]) -> None:
    """The averaged weights, half size, with dims and hashes beside them."""
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in loop.averaged_state().items()}
    save_tensors(path, tensors, {"dims": json.dumps(model.dims.to_dict()), "steps": str(loop.steps), **extra})


def run(stage: StageConfig, work_dir: Path, budget_s: float) -> dict[str, float]:
    """Train (or go on); returns the stage's metrics."""
    torch.set_num_threads(1)
    settings = stage.settings
    tokenizer = TextTokenizer.from_file(work_dir / "ship" / "text_tokenizer.json")
    spoken, held_out, code_hash = load_spoken_texts(work_dir / CODES_FILE, tokenizer)
    model = build(settings, tokenizer.vocab_size, stage.seed)
    if part_file(work_dir, PART).exists() and not (stage.folder(work_dir) / "state.safetensors").exists():
        # A warm start; even from other voice tokens the trunk knows how text and speech go together.
        model.load_state_dict(load_voice_lm(part_file(work_dir, PART)).state_dict())
    task = VoiceTask(model, spoken, settings, stage.seed)
    held = VoiceTask(model, held_out, settings, stage.seed)
    loop = StepLoop(model, LoopSettings.from_table(settings), stage.folder(work_dir), budget_s, is_trunk_matrix)
    hours = sum(len(item.voice) for item in spoken) / 25 / 3600
    print(f"0h: {len(spoken)} sentences, {hours:.2f} h, {len(held_out)} held out, from step {loop.steps}", flush=True)
    print(f"before: {teacher_forced_scores(held, list(range(min(48, len(held_out)))))}", flush=True)
    extra = {"voice_tokenizer_hash": code_hash}

    def on_save() -> None:
        ship(part_file(work_dir, PART), loop, model, extra)
        started = time.monotonic()
        kept = {name: p.detach().clone() for name, p in model.named_parameters()}
        model.load_state_dict(loop.averaged_state())
        scores = teacher_forced_scores(held, list(range(min(48, len(held_out)))))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(kept[name])
        print(
            f"held-out loss {scores['loss']:.4f} accuracy {scores['accuracy']:.4f} "
            f"({time.monotonic() - started:.0f} s to measure)",
            flush=True,
        )

    loop.run(task.loss, on_save, lambda line: print(line, flush=True))
    shipped = load_voice_lm(part_file(work_dir, PART))  # the score is of what is shipped, rounding and all
    held = VoiceTask(shipped, held_out, settings, stage.seed)
    scores = teacher_forced_scores(held, list(range(len(held_out))))
    return {
        "steps": float(loop.steps),
        "hours": hours,
        **scores,
        **spoken_scores(shipped, held_out, settings, work_dir),
    }


def spoken_scores(
    model: VoiceLm, sentences: list[SpokenText], settings: dict[str, Any], work_dir: Path
) -> dict[str, float]:
    """Words of what the voice LM says, interleaved as in service, beside those of the true voice tokens."""
    chosen = sentences[: settings["num_spoken"]]
    if not chosen:
        return {}
    texts = [item.text for item in chosen]
    with torch.no_grad():
        semantic = [model.text_vectors(torch.from_numpy(item.ids)) for item in chosen]
    said = speak(model, semantic)
    wer, words = wer_of_codes(work_dir, texts, said)
    lengths = sum(map(len, said)) / sum(len(item.voice) for item in chosen)
    true = [item.voice.tolist() for item in chosen]
    scores = {
        "wer_codes_voice_lm": wer,
        "wer_codes_true": wer_of_codes(work_dir, texts, true)[0],
        "words": float(words),
        "length_ratio": lengths,
    }
    if can_be_heard(work_dir):
        scores["wer_voice_lm"] = wer_of_waves(work_dir, texts, said)[0]
        scores["wer_resynthesis"] = wer_of_waves(work_dir, texts, true)[0]
    return scores
