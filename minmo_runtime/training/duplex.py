"""Stage 4: the duplex predictor learns who should have the floor, from the frozen LLM's hidden states ++ the
projector's vectors.

Simulated streams at the LLM's audio rate. Agent silent: a caller's turn with pauses put between its words (the turn
goes on), its true end, or "one moment" and silence. Agent speaking: nothing, a backchannel, or an interruption.
Labels change with the audio, not with words. Everything but the predictor is frozen, so inputs are computed once.
Score: what a threshold would do.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minmo_runtime.model.duplex import CLASSES, DuplexDims, DuplexPredictor
from minmo_runtime.text import TextTokenizer, chat_turn
from minmo_runtime.training import channel, corpus, synthesis
from minmo_runtime.training.alignment import AlignmentTask, load_projector
from minmo_runtime.training.dialogues import Turn, dialogue
from minmo_runtime.training.freeze import only_trainable
from minmo_runtime.training.llm import encode_row, load_llm
from minmo_runtime.training.loop import LoopSettings, StepLoop
from minmo_runtime.training.resume import save_tensors
from minmo_runtime.training.spoken import RATE_HZ, Mouth, Ragged, features, load_arrays, save_arrays
from minmo_runtime.training.stage import StageConfig, part_file
from minmo_runtime.training.tokenizer import load_encoder

PART = "duplex"
IGNORED = -1
LABEL = {name: index for index, name in enumerate(CLASSES)}
FRAME_S = 0.08  # one LLM audio position of this checkpoint: 25 Hz halved
BACKCHANNELS = {
    "train": ("uh huh", "okay", "right", "yes", "yeah", "i see", "sure", "got it", "oh", "good", "ah okay", "hm"),
    "held": ("alright", "yeah okay", "oh i see", "fine"),
}
TRUE_END_S = 2.4  # silence behind a turn


@dataclass
class Stretch:
    """A piece of one stream: waveform (16 kHz) and the class it belongs to."""

    waveform: np.ndarray
    label: str


def silence(seconds: float) -> np.ndarray:
    return np.zeros(int(seconds * RATE_HZ), np.float32)


def caller_turn(mouth: Mouth, text: str, rng: np.random.Generator, voice: str, ends: str) -> list[Stretch]:
    """A turn in one to three parts with pauses of 0.3-2 s between words; behind it `ends` (user_done or user_waits)."""
    words = text.split()
    num_pauses = min(int(rng.choice([0, 1, 2], p=[0.4, 0.4, 0.2])), max(0, len(words) - 1))
    cuts = sorted(rng.choice(np.arange(1, len(words)), num_pauses, replace=False).tolist()) if num_pauses else []
    prosody, parts = synthesis.random_caller_prosody(rng), [Stretch(silence(rng.uniform(0.2, 0.6)), "idle")]
    for start, end in zip([0, *cuts], [*cuts, len(words)], strict=True):
        if start:
            parts.append(Stretch(silence(rng.uniform(0.3, 2.0)), "user_continues"))
        parts.append(Stretch(mouth.waveform(" ".join(words[start:end]), voice, prosody), "user_continues"))
    return [*parts, Stretch(silence(TRUE_END_S), ends)]


def overlap(mouth: Mouth, rng: np.random.Generator, voice: str, split: str) -> list[Stretch]:
    """While the agent speaks: nothing, a backchannel, or an interruption."""
    parts = [Stretch(silence(rng.uniform(0.5, 2.0)), "idle")]
    kind = str(rng.choice(["idle", "backchannel", "interrupt"], p=[0.2, 0.4, 0.4]))
    if kind != "idle":
        texts = BACKCHANNELS[split] if kind == "backchannel" else None
        if texts is None:
            text = corpus.caller_utterances(int(rng.integers(1 << 30)), split, 1)[0]
        else:
            text = str(rng.choice(texts))
        parts.append(Stretch(mouth.waveform(text, voice, synthesis.random_caller_prosody(rng)), kind))
    return [*parts, Stretch(silence(rng.uniform(0.5, 1.0)), "idle")]


def labels_of(parts: list[Stretch], num_frames: int) -> np.ndarray:
    """Class of each LLM audio frame, by its last sample."""
    ends = np.cumsum([len(part.waveform) for part in parts]) / RATE_HZ
    classes = np.array([LABEL[part.label] for part in parts])
    times = (np.arange(num_frames) + 1) * FRAME_S - 1e-3
    return classes[np.searchsorted(ends, times).clip(max=len(parts) - 1)]


@torch.no_grad()
def stream_inputs(task: AlignmentTask, tokenizer: TextTokenizer, before: list[Turn], fbank: np.ndarray) -> np.ndarray:
    """[T, D_llm + D_llm]: hidden states of an open caller's turn behind `before`, ++ the projector's vectors."""
    vectors = task.hear([fbank])[0][0]
    ids = [*encode_row(before, tokenizer).ids, *tokenizer.encode(chat_turn("user", "", is_open=True))]
    embeds = torch.cat([task.llm.embed(torch.tensor(ids)), vectors])[None]
    hidden = task.llm(embeds=embeds)[0, len(ids) :]
    return torch.cat([hidden, vectors], 1).numpy().astype(np.float16)


def make_data(path: Path, work_dir: Path, task: AlignmentTask, seed: int, split: str, count: int) -> None:
    """`count` streams: inputs, labels, and whether the agent speaks."""
    tokenizer = TextTokenizer.from_file(work_dir / "ship" / "text_tokenizer.json")
    mouth, rng = Mouth(work_dir), np.random.default_rng([seed, split == "held"])
    rows: dict[str, list[np.ndarray]] = {"inputs": [], "labels": []}
    speaks = []
    for number in range(count):
        turns = dialogue(f"duplex/{seed}/{number}", split, 0.0)
        users = [i for i, turn in enumerate(turns) if turn.role == "user" and not turn.text.startswith("keypad")]
        if not users:
            continue
        at, voice = int(rng.choice(users)), synthesis.random_caller_voice(rng, split == "held")
        is_speaking = bool(rng.random() < 0.28)
        if is_speaking:
            parts = overlap(mouth, rng, voice, split)
        else:
            waits = rng.random() < 0.1
            text = corpus.phrase("wait", split, np_random(rng)) if waits else turns[at].text
            parts = caller_turn(mouth, text, rng, voice, "user_waits" if waits else "user_done")
        wave = channel.degrade(np.concatenate([part.waveform for part in parts]), rng, bool(rng.random() < 0.6))
        inputs = stream_inputs(task, tokenizer, turns[:at], features(wave))
        rows["inputs"].append(inputs)
        rows["labels"].append(labels_of(parts, len(inputs)))
        speaks.append(is_speaking)
    arrays = {"speaks": np.array(speaks)}
    for name, values in rows.items():
        Ragged.of(values).save_into(arrays, name)
    save_arrays(path, arrays)


def np_random(rng: np.random.Generator) -> random.Random:
    """The kind of generator that `corpus` takes."""
    return random.Random(int(rng.integers(1 << 60)))


class Streams:
    """One npz of `make_data`."""

    def __init__(self, path: Path) -> None:
        arrays = load_arrays(path)
        self.inputs, self.labels = Ragged.load_from(arrays, "inputs"), Ragged.load_from(arrays, "labels")
        self.speaks = arrays["speaks"]

    def __len__(self) -> int:
        return len(self.speaks)

    def batch(self, chosen: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """inputs [B, T, D], speaks [B, T], labels [B, T] (IGNORED where padded)."""
        pad = nn.utils.rnn.pad_sequence
        inputs = pad([torch.from_numpy(self.inputs[i].astype(np.float32)) for i in chosen], batch_first=True)
        labels = [torch.from_numpy(self.labels[i].astype(np.int64)) for i in chosen]
        speaks = torch.from_numpy(self.speaks[chosen])[:, None].expand(-1, inputs.shape[1])
        return inputs, speaks, pad(labels, batch_first=True, padding_value=IGNORED)


@torch.no_grad()
def evaluate(predictor: DuplexPredictor, streams: Streams, threshold: float) -> dict[str, float]:
    """With a decision wherever P > threshold: pauses taken over, delay behind true ends, missed ends, cut-ins,
    interruptions.
    """
    predictor.eval()
    taken: list[bool] = []
    delays: list[float] = []
    found: list[bool] = []
    false_stops: list[bool] = []
    for index in range(len(streams)):
        inputs, speaks, labels = streams.batch(np.array([index]))
        chances = predictor(inputs, speaks)[0].exp()
        names = labels[0]
        if bool(streams.speaks[index]):
            fires = chances[:, LABEL["interrupt"]] > threshold
            if bool((names == LABEL["interrupt"]).any()):
                onset = int((names == LABEL["interrupt"]).nonzero()[0])
                found.append(bool(fires[onset : onset + round(0.64 / FRAME_S)].any()))
            elif bool((names == LABEL["backchannel"]).any()):
                false_stops.append(bool(fires.any()))
            continue
        fires = chances[:, LABEL["user_done"]] > threshold
        ends = (names == LABEL["user_done"]).nonzero()
        first = int(ends[0]) if len(ends) else len(names)
        if bool((names == LABEL["user_continues"]).any()):
            taken.append(bool(fires[:first].any()))
        if len(ends):
            late = fires[first:].nonzero()
            delays.append(float(late[0]) * FRAME_S if len(late) else float("inf"))
    predictor.train()
    heard = [delay for delay in delays if np.isfinite(delay)]
    return {
        "takeover_before_end": float(np.mean(taken)),
        "n_turns": float(len(taken)),
        "delay_p50_s": float(np.median(heard)) if heard else float("inf"),
        "missed_ends": 1.0 - len(heard) / len(delays),
        "interrupts_found_640ms": float(np.mean(found)),
        "n_interrupts": float(len(found)),
        "backchannels_stopped": float(np.mean(false_stops)),
        "n_backchannels": float(len(false_stops)),
    }


def run(stage: StageConfig, work_dir: Path, budget_s: float) -> dict[str, float]:
    torch.set_num_threads(1)
    settings: dict[str, Any] = stage.settings
    folder = stage.folder(work_dir)
    if not part_file(work_dir, "projector").exists():
        raise ValueError(
            "stage 4: no trained projector (1a-1c); a predictor without one is refused, the endpointer stays"
        )
    llm, _ = load_llm(work_dir)
    frozen = AlignmentTask(
        load_encoder(work_dir), load_projector(part_file(work_dir, "projector")), llm, None, 0.0
    ).eval()
    for split, count in (("train", settings["num_streams"]), ("held", settings["num_held_streams"])):
        if not (folder / f"{split}.npz").exists():
            make_data(folder / f"{split}.npz", work_dir, frozen, stage.seed, split, count)
    streams, held = Streams(folder / "train.npz"), Streams(folder / "held.npz")
    torch.manual_seed(stage.seed)
    dims = DuplexDims(streams.inputs.flat.shape[1], **settings["dims"])
    predictor = DuplexPredictor(dims)
    with only_trainable(stage, {PART: predictor}):
        loop = StepLoop(predictor, LoopSettings.from_table(settings), folder, budget_s, lambda name, p: False)

        def loss_of(step: int) -> Tensor:
            rng = np.random.default_rng([stage.seed, step])
            inputs, speaks, labels = streams.batch(rng.integers(0, len(streams), settings["batch_size"]))
            log_probs = predictor(inputs, speaks)
            mask = labels != IGNORED
            return nn.functional.nll_loss(log_probs[mask].float(), labels[mask])

        def on_save() -> None:
            state = {name: tensor.to(torch.bfloat16) for name, tensor in loop.averaged_state().items()}
            save_tensors(part_file(work_dir, PART), state, {"dims": json.dumps(dims.to_dict())})

        loop.run(loss_of, on_save, lambda line: print(line, flush=True))
    predictor.load_state_dict(loop.averaged_state())
    return {**evaluate(predictor, held, settings["threshold"]), "steps": float(loop.steps)}
