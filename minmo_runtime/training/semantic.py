"""Stages 2a, 2b, 3: the output projector (2a), then with the voice LM (2b, 3), on the frozen LLM's own hidden states.

Data: replies of generated calls. For each, the LLM reads the call up to the reply and the reply itself; kept are the
hidden state that sampled each spoken token, and [embedding, hidden] of the caller's current turn (the query prefix).
The voice tokens come from the agent's voice speaking the reply. Stage 3 lets the system prompt's pace change how it is
spoken, so that the hidden states have something to carry. Tool-call bodies never reach the voice. A projector starts at
zero: 2a may not be worse than 0h.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minmo_runtime.model.backbone import Backbone
from minmo_runtime.model.interleave import IGNORED, RowKind, training_layout
from minmo_runtime.model.output_projector import OutputProjector, OutputProjectorDims
from minmo_runtime.model.voice_lm import VoiceLm
from minmo_runtime.text import TextTokenizer, chat_turn, digit_runs
from minmo_runtime.training.dialogues import Turn, dialogue
from minmo_runtime.training.evaluate import spoken_words, wer_of_codes
from minmo_runtime.training.freeze import only_trainable
from minmo_runtime.training.llm import encode_row
from minmo_runtime.training.loop import LoopSettings, StepLoop
from minmo_runtime.training.resume import load_tensors, save_tensors
from minmo_runtime.training.served_llm import llm_hash, load_served_llm
from minmo_runtime.training.spoken import Mouth, Ragged, load_arrays, save_arrays
from minmo_runtime.training.stage import StageConfig, part_file
from minmo_runtime.training.tokenizer import load_tokenizer
from minmo_runtime.training.voice_lm import batches_of_epoch, is_trunk_matrix, load_voice_lm, speak, voice_loss

PART = "output_projector"
TOOL_CALL = "<tool_call>"
PACES = ("slow", "normal", "fast")


@dataclass(frozen=True)
class Reply:
    """One spoken reply in its call: turns before it, the caller's current turn (index into them), and the pace asked
    for.
    """

    before: tuple[Turn, ...]
    caller: int
    text: str
    pace: str


def replies_of(turns: list[Turn]) -> list[Reply]:
    """Everything the agent speaks, its own fixed sentences too; what stands behind a tool call's opening is not
    spoken.
    """
    pace = next((name for name in PACES if turns[0].role == "system" and f"{name} pace" in turns[0].text), "normal")
    found, caller = [], -1
    for index, turn in enumerate(turns):
        if turn.role == "user":
            caller = index
        text = turn.text.split(TOOL_CALL)[0].strip()
        if turn.role == "assistant" and text:
            found.append(Reply(tuple(turns[:index]), caller if turn.is_target else -1, text, pace))
    return found


@torch.no_grad()
def read_reply(llm: Backbone, tokenizer: TextTokenizer, reply: Reply, max_query: int) -> dict[str, np.ndarray]:
    """Ids of the spoken tokens, the hidden states that sampled them, and the query's embeddings and hidden states."""
    before = encode_row(reply.before, tokenizer)
    opened = tokenizer.encode("<|im_start|>assistant\n")
    spoken = tokenizer.encode(reply.text)
    ids = torch.tensor([[*before.ids, *opened, *spoken]])
    embeds = llm.embed(ids)
    hidden = llm(embeds=embeds)[0]
    start = len(before.ids) + len(opened)
    query = caller_span(reply, tokenizer)
    query = slice(max(query.start, query.stop - max_query), query.stop)
    return {
        "ids": np.array(spoken, np.int32),
        "hidden": hidden[start - 1 : start - 1 + len(spoken)].numpy().astype(np.float16),
        "query_embedding": embeds[0, query].numpy().astype(np.float16),
        "query_hidden": hidden[query].numpy().astype(np.float16),
    }


def caller_span(reply: Reply, tokenizer: TextTokenizer) -> slice:
    """Positions of the caller's own words: without the turn's opening tokens and its end token."""
    if reply.caller < 0:
        return slice(0, 0)
    start = len(encode_row(reply.before[: reply.caller], tokenizer).ids)
    end = len(encode_row(reply.before[: reply.caller + 1], tokenizer).ids)
    return slice(start + len(tokenizer.encode(chat_turn("user", "", is_open=True))), end - 1)


def make_data(path: Path, work_dir: Path, settings: dict[str, Any], seed: int, split: str, count: int) -> None:
    """`count` replies of calls from `split` with their voice tokens, as ragged rows in one npz."""
    llm, tokenizer = load_served_llm(work_dir)
    ids_of, mouth = load_tokenizer(work_dir), Mouth(work_dir)
    rows: dict[str, list[np.ndarray]] = {}
    texts: list[str] = []
    paces: list[str] = []
    rng, number = np.random.default_rng([seed, split == "held"]), 0
    while len(texts) < count:
        found = replies_of(dialogue(f"semantic/{seed}/{number}", split))
        number += 1
        # Two of a call: more calls, more different contexts. Numbers are what a small voice loses its place in.
        weights = np.array([settings["number_weight"] if digit_runs(reply.text) else 1.0 for reply in found])
        count_here = min(2, len(found))
        for index in rng.choice(len(found), count_here, replace=False, p=weights / weights.sum()) if found else ():
            reply = found[int(index)]
            voice = mouth.agent(reply.text, ids_of, rng, reply.pace if settings["uses_pace"] else "normal")
            row = read_reply(llm, tokenizer, reply, settings["projector"]["max_query"])
            for name, value in {**row, "voice": voice.astype(np.int16)}.items():
                rows.setdefault(name, []).append(value)
            texts.append(reply.text)
            paces.append(reply.pace)
    arrays = {"texts": np.array(texts), "paces": np.array(paces)}
    for name, values in rows.items():
        Ragged.of(values).save_into(arrays, name)
    save_arrays(path, arrays)


class SemanticTask(nn.Module):
    """Projector and voice LM together, over one file of replies."""

    def __init__(self, projector: OutputProjector, voice_lm: VoiceLm, table: Tensor, settings: dict[str, Any]) -> None:
        super().__init__()
        self.output_projector, self.voice_lm, self.settings = projector, voice_lm, settings
        self.register_buffer("table", table, persistent=False)  # the LLM's token table, frozen

    def vectors(self, data: Replies, index: int) -> tuple[Tensor, Tensor]:
        """Semantic vectors [N, D] and query vectors [Q, D] of one reply."""
        ids, hidden, query_embedding, query_hidden = data.tensors(index)
        semantic = self.output_projector(hidden, self.table[ids], self.voice_lm.text_vectors(ids))
        return semantic, self.output_projector.query(query_hidden, query_embedding)

    def loss(self, data: Replies, chosen: np.ndarray, rng: np.random.Generator, is_plain: bool = False) -> Tensor:
        """Cross-entropy of these replies; `is_plain`: the bridge instead (text table, no query), everything one
        order.
        """
        rows, targets, semantics, queries = [], [], [], []
        size = self.voice_lm.dims.speech_token_size
        for index in chosen:
            semantic, query = self.vectors(data, int(index))
            if is_plain:
                semantic, query = self.voice_lm.text_vectors(data.tensors(int(index))[0]), query[:0]
            rules = self.voice_lm.dims.rules(interleaved=bool(rng.random() < self.settings["interleaved_share"]))
            layout = training_layout(len(semantic), data.voice[int(index)].tolist(), rules, len(query))
            pairs = np.array([(row.kind.value, row.index) for row in layout.rows])
            slips = (pairs[:, 0] == RowKind.VOICE.value) & (rng.random(len(pairs)) < self.settings["slip_share"])
            pairs[slips, 1] = rng.integers(0, size, slips.sum())
            rows.append(torch.from_numpy(pairs))
            targets.append(torch.tensor(layout.targets))
            semantics.append(semantic)
            queries.append(query)
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
        pad = nn.utils.rnn.pad_sequence
        query_rows = pad(queries, batch_first=True) if max(map(len, queries)) else None
        embeds = self.voice_lm.embed_layout(
            padded[..., 0], padded[..., 1].clamp_min(0), pad(semantics, batch_first=True), query_rows
        )
        return voice_loss(self.voice_lm(embeds), pad(targets, batch_first=True, padding_value=IGNORED))


class Replies:
    """One npz of `make_data`."""

    def __init__(self, path: Path) -> None:
        arrays = load_arrays(path)
        self.texts, self.paces = arrays["texts"].tolist(), arrays["paces"].tolist()
        names = ("ids", "hidden", "query_embedding", "query_hidden", "voice")
        self._rows = {name: Ragged.load_from(arrays, name) for name in names}
        self.voice = self._rows["voice"]
        sizes = [len(self.voice[i]) * 16 // 15 + len(self._rows["ids"][i]) for i in range(len(self.texts))]
        self.lengths = np.array([size + len(self._rows["query_hidden"][i]) + 2 for i, size in enumerate(sizes)])

    def __len__(self) -> int:
        return len(self.texts)

    def tensors(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ids = torch.from_numpy(self._rows["ids"][index].astype(np.int64))
        names = ("hidden", "query_embedding", "query_hidden")
        hidden, embedding, query = (torch.from_numpy(self._rows[name][index].astype(np.float32)) for name in names)
        return ids, hidden, embedding, query


@torch.no_grad()
def evaluate(task: SemanticTask, data: Replies, work_dir: Path, num_spoken: int) -> dict[str, float]:
    """Through the projector against the bridge: loss over all replies, words of `num_spoken` of them."""
    scores: dict[str, float] = {}
    chunks = np.array_split(np.arange(len(data)), max(1, len(data) // 16))
    for name, is_plain in (("semantic", False), ("bridge", True)):
        quiet = {**task.settings, "slip_share": 0.0}
        task.settings, loud = quiet, task.settings
        losses = [float(task.loss(data, part, np.random.default_rng(0), is_plain)) for part in chunks]
        task.settings = loud
        scores[f"loss_{name}"] = float(np.mean(losses))
        if num_spoken:
            semantic, queries = zip(*(task.vectors(data, i) for i in range(num_spoken)), strict=True)
            if is_plain:
                semantic = tuple(task.voice_lm.text_vectors(data.tensors(i)[0]) for i in range(num_spoken))
                queries = (None,) * num_spoken
            codes = speak(task.voice_lm, list(semantic), queries=list(queries))
            scores[f"wer_codes_{name}"], words = wer_of_codes(work_dir, data.texts[:num_spoken], codes)
            scores["words"] = float(words)
            if not is_plain and task.settings["uses_pace"]:
                scores["pace_fast_over_slow"] = _pace(data, codes, "fast") / _pace(data, codes, "slow")
    return scores


def _pace(data: Replies, codes: Sequence[Sequence[int]], pace: str) -> float:
    """Words per voice token of the replies that were to be spoken at this pace."""
    chosen = [i for i in range(len(codes)) if data.paces[i] == pace]
    num_words = sum(len(spoken_words(data.texts[i]).split()) for i in chosen)
    return num_words / max(1, sum(len(codes[i]) for i in chosen))


def ship_projector(work_dir: Path, projector: OutputProjector, state: dict[str, Tensor]) -> None:
    """With the LLM's hash beside it: on another LLM's hidden states the projector is worth nothing."""
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in state.items()}
    metadata = {"dims": json.dumps(projector.dims.to_dict()), "llm_hash": llm_hash(work_dir / "ship")}
    save_tensors(part_file(work_dir, PART), tensors, metadata)


def load_projector(path: Path) -> OutputProjector:
    tensors, metadata = load_tensors(path)
    projector = OutputProjector(OutputProjectorDims.from_dict(json.loads(metadata["dims"])))
    projector.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return projector


def build_task(stage: StageConfig, work_dir: Path) -> SemanticTask:
    """Shipped voice LM, shipped projector or a fresh one, and the LLM's table."""
    llm, _ = load_served_llm(work_dir)
    voice_lm = load_voice_lm(part_file(work_dir, "voice_lm"))
    path = part_file(work_dir, PART)
    if path.exists() and not stage.settings["starts_fresh"]:
        projector = load_projector(path)
    else:
        projector = OutputProjector(
            OutputProjectorDims(llm.dims.hidden_size, voice_lm.dims.hidden_size, **stage.settings["projector"])
        )
    return SemanticTask(projector, voice_lm, llm.model.embed_tokens.weight.detach(), stage.settings)


def run(stage: StageConfig, work_dir: Path, budget_s: float) -> dict[str, float]:
    torch.set_num_threads(1)
    settings, folder = stage.settings, stage.folder(work_dir)
    for split, count in (("train", settings["num_replies"]), ("held", settings["num_held_replies"])):
        if not (folder / f"{split}.npz").exists():
            make_data(folder / f"{split}.npz", work_dir, settings, stage.seed, split, count)
    data, held = Replies(folder / "train.npz"), Replies(folder / "held.npz")
    task = build_task(stage, work_dir)
    voice_extra = load_tensors(part_file(work_dir, "voice_lm"))[1]
    modules = {"output_projector": task.output_projector, "voice_lm": task.voice_lm}
    with only_trainable(stage, modules):
        loop = StepLoop(task, LoopSettings.from_table(settings), folder, budget_s, is_trunk_matrix)
        epoch_of: dict[int, list[np.ndarray]] = {}

        def loss_of(step: int) -> Tensor:
            # Every epoch has about as many batches; walking them by number keeps a resumed run equal.
            first, epoch = 0, 0
            while True:
                if epoch not in epoch_of:
                    epoch_of[epoch] = batches_of_epoch(data.lengths, settings["tokens_per_step"], stage.seed, epoch)
                if step < first + len(epoch_of[epoch]):
                    return task.loss(data, epoch_of[epoch][step - first], np.random.default_rng([stage.seed, step]))
                first, epoch = first + len(epoch_of[epoch]), epoch + 1

        def on_save() -> None:
            state = loop.averaged_state()
            for part in stage.parts:
                own = {name.removeprefix(f"{part}."): t for name, t in state.items() if name.startswith(f"{part}.")}
                if part == PART:
                    ship_projector(work_dir, task.output_projector, own)
                else:
                    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in own.items()}
                    save_tensors(part_file(work_dir, part), tensors, voice_extra)

        loop.run(loss_of, on_save, lambda line: print(line, flush=True))
    # The score is of what is shipped, rounding and all.
    shipped = build_task_from_ship(task, work_dir)
    return {**evaluate(shipped, held, work_dir, settings["num_spoken"]), "steps": float(loop.steps)}


def build_task_from_ship(task: SemanticTask, work_dir: Path) -> SemanticTask:
    return SemanticTask(
        load_projector(part_file(work_dir, PART)),
        load_voice_lm(part_file(work_dir, "voice_lm")),
        task.table,
        task.settings,
    ).eval()
