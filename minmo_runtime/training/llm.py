"""Stage 0g: nano's text LLM, from nothing, on calls with tool lines.

First only copying of every slot type on short texts, then whole calls with a fading share of copying; a part of the
callers' turns has silent positions between its words, so that the speech stages find a model that tolerates the audio
grid. Knows nothing of audio. Data: `dialogues`; loop: `loop`. Source of the recipe: design facts, recipes part 2 §A.

Scores are by whole turns under greedy decoding: a turn counts only if every token of it, the end token too, is the most
likely.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from minmo_runtime.model.backbone import Backbone
from minmo_runtime.model.dims import BackboneDims
from minmo_runtime.number_guide import NumberGuide
from minmo_runtime.text import TextTokenizer, chat_turn
from minmo_runtime.training.copy_tasks import copy_task
from minmo_runtime.training.dialogues import Turn, dialogue
from minmo_runtime.training.loop import LoopSettings, StepLoop
from minmo_runtime.training.resume import load_tensors, save_tensors
from minmo_runtime.training.stage import StageConfig, part_file
from minmo_runtime.training.text_tokenizer import TOKENIZER_FILE
from minmo_runtime.training.text_tokenizer import write as write_tokenizer

DECISION_WEIGHT = 3.0  # of a turn's first token in the loss: speak or call a tool, nearly all mistakes are made there
GAP = -1  # a position that holds a zero vector
POOL_BATCHES = 8  # batches cut from one pool sorted by length: little padding
SLOT_TOOLS = ("look_up_order", "opening_hours", "change_delivery")


@dataclass(frozen=True)
class Row:
    """One dialogue as numbers. ids: GAP is a silent position; gains scale the input vectors; target: to be learnt."""

    ids: list[int]
    gains: list[float]
    target: list[bool]
    spans: list[tuple[int, int, Turn]]  # the learnt turns: first and behind-last position


def encode_row(turns: Sequence[Turn], tokenizer: TextTokenizer, rng: random.Random | None = None) -> Row:
    """ChatML ids; with `rng`, the callers' turns are spread over the audio grid with silent positions between."""
    row = Row([], [], [], [])
    for turn in turns:
        opening = tokenizer.encode(chat_turn(turn.role, "", is_open=True)) if turn.role != "tool" else []
        whole = tokenizer.encode(chat_turn(turn.role, turn.text))
        content = whole[len(opening) :]
        _extend(row, opening, False)
        start = len(row.ids)
        if rng is not None and turn.role == "user":
            _extend_with_gaps(row, content[:-1], rng)
            _extend(row, content[-1:], False)
        else:
            _extend(row, content, turn.is_target)
        if turn.is_target:
            row.spans.append((start, len(row.ids), turn))
    return row


def _extend(row: Row, ids: Sequence[int], is_target: bool) -> None:
    row.ids.extend(ids)
    row.gains.extend([1.0] * len(ids))
    row.target.extend([is_target] * len(ids))


def _extend_with_gaps(row: Row, ids: Sequence[int], rng: random.Random) -> None:
    """12.5 positions a second, some three words a second: 0-4 silent ones between tokens, some doubled.

    Two equal tokens in a row always have silence between them, as behind CTC: one lasting longer is still one.
    """
    for previous, token in zip((None, None, *ids), (None, *ids), strict=False):
        if token is not None and token == previous and row.ids[-1] != GAP:
            row.ids.append(GAP)
            row.gains.append(0.0)
            row.target.append(False)
        if token is not None:
            repeats = [rng.uniform(0.5, 1.0)] + ([rng.uniform(0.3, 0.6)] if rng.random() < 0.2 else [])
            row.ids.extend([token] * len(repeats))
            row.gains.extend(repeats)
            row.target.extend([False] * len(repeats))
        gap = rng.randint(0, 4)
        row.ids.extend([GAP] * gap)
        row.gains.extend([0.0] * gap)
        row.target.extend([False] * gap)


@dataclass(frozen=True)
class Batch:
    ids: Tensor  # [B, T], gaps and padding as 0
    gains: Tensor  # [B, T], 0 at gaps
    target: Tensor  # [B, T] bool: position t is predicted from t - 1
    weight: Tensor  # [B, T], of the loss


def collate(rows: Sequence[Row]) -> Batch:
    width = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    gains = torch.zeros(len(rows), width)
    target = torch.zeros(len(rows), width, dtype=torch.bool)
    weight = torch.ones(len(rows), width)
    for index, row in enumerate(rows):
        size = len(row.ids)
        ids[index, :size] = torch.tensor([max(0, token) for token in row.ids])
        gains[index, :size] = torch.tensor(row.gains)
        target[index, :size] = torch.tensor(row.target)
        weight[index, [first for first, _, _ in row.spans]] = DECISION_WEIGHT
    return Batch(ids, gains, target, weight)


def predict(model: Backbone, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits [N, V] and wanted ids [N] of all learnt positions."""
    hidden = model(embeds=model.embed(batch.ids) * batch.gains[..., None])
    wanted = batch.target[:, 1:]
    return model.logits(hidden[:, :-1][wanted]), batch.ids[:, 1:][wanted]


def loss_of_batch(model: Backbone, batch: Batch) -> Tensor:
    """Cross entropy over the learnt positions by their weights."""
    logits, wanted = predict(model, batch)
    losses = torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="none")
    weights = batch.weight[:, 1:][batch.target[:, 1:]]
    return (losses * weights).sum() / weights.sum()


# ---------------------------------------------------------------- what a step learns from


@dataclass(frozen=True)
class Curriculum:
    """Shares by step number: [first step, share of copy tasks, tokens a step]; see the stage's TOML."""

    phases: tuple[tuple[int, float, int], ...]
    gap_share: float
    seed: int

    def at(self, step: int) -> tuple[float, int]:
        share, tokens = self.phases[0][1:]
        for first, next_share, next_tokens in self.phases:
            if step >= first:
                share, tokens = next_share, next_tokens
        return share, int(tokens)


class BatchSource:
    """The batch of a step number; the same for every run."""

    def __init__(self, tokenizer: TextTokenizer, curriculum: Curriculum) -> None:
        self._tokenizer, self._curriculum = tokenizer, curriculum
        self._pool = lru_cache(maxsize=2)(self._make_pool)

    def batch(self, step: int) -> Batch:
        return collate(self._pool(step // POOL_BATCHES)[step % POOL_BATCHES])

    def _make_pool(self, number: int) -> list[list[Row]]:
        rng = random.Random(f"0g/{self._curriculum.seed}/{number}")
        copy_share, tokens = self._curriculum.at(number * POOL_BATCHES)
        gap_share = self._curriculum.gap_share if copy_share < 0.5 else 0.0
        rows: list[Row] = []
        while sum(len(row.ids) for row in rows) < tokens * POOL_BATCHES:
            gap_rng = rng if rng.random() < gap_share else None
            # A share of tokens, not of texts: copy tasks are some six times shorter.
            if rng.random() < copy_share:
                rows += [encode_row(copy_task(rng, "train"), self._tokenizer, gap_rng) for _ in range(4)]
            else:
                turns = dialogue(f"{self._curriculum.seed}/{number}/{rng.random()}", "train")
                rows.append(encode_row(turns, self._tokenizer, gap_rng))
        rows.sort(key=lambda row: len(row.ids))
        batches = _cut(rows, POOL_BATCHES)
        rng.shuffle(batches)
        return batches


def _cut(rows: list[Row], num_parts: int) -> list[list[Row]]:
    """Parts of nearly equal token count, order kept, none empty."""
    total = sum(len(row.ids) for row in rows)
    parts: list[list[Row]] = [[] for _ in range(num_parts)]
    seen = 0
    for index, row in enumerate(rows):
        part = min(num_parts - 1, seen * num_parts // total)
        parts[max(part, num_parts - (len(rows) - index))].append(row)
        seen += len(row.ids)
    return parts


# ---------------------------------------------------------------- scores


@torch.no_grad()
def evaluate(
    model: Backbone,
    tokenizer: TextTokenizer,
    num_dialogues: int,
    noise: float | None = 0.0,
    split: str = "held",
    has_gaps: bool = False,
    errors: list[str] | None = None,
    is_guided: bool = True,
) -> dict[str, float]:
    """Shares of turns that are right, and their counts as n_*.

    slots: calls with values; calls: all calls; action: the right kind of turn; say: spoken turns; values: those with
    values. `errors` collects what was wrong, for reading; `is_guided`: numbers in calls are guided as in service.
    """
    rng = random.Random("gaps")
    rows = [
        encode_row(dialogue(f"evaluate/{number}", split, noise), tokenizer, rng if has_gaps else None)
        for number in range(num_dialogues)
    ]
    return score_rows(model, tokenizer, rows, errors, is_guided)


@torch.no_grad()
def score_rows(
    model: Backbone, tokenizer: TextTokenizer, rows: list[Row], errors: list[str] | None = None, is_guided: bool = True
) -> dict[str, float]:
    """The scores of `evaluate` over given dialogues."""
    hits: dict[str, list[bool]] = defaultdict(list)
    guide = NumberGuide(tokenizer) if is_guided else None
    rows = sorted(rows, key=lambda row: len(row.ids))
    for start in range(0, len(rows), 8):
        part = rows[start : start + 8]
        batch = collate(part)
        hidden = model(embeds=model.embed(batch.ids) * batch.gains[..., None])
        for index, row in enumerate(part):
            for first, end, turn in row.spans:
                scores = model.logits(hidden[index, first - 1 : end - 1])
                if guide is not None and turn.text.startswith("<tool_call>"):
                    _guide(scores, guide, row.ids, first)
                said = scores.argmax(-1).tolist()
                _score(hits, turn, row.ids[first:end], said)
                if errors is not None and said != row.ids[first:end]:
                    errors.append(_describe(tokenizer, row, first, turn, said))
    found = {name: sum(right) / len(right) for name, right in sorted(hits.items())}
    return found | {f"n_{name}": float(len(right)) for name, right in sorted(hits.items())}


def _guide(scores: Tensor, guide: NumberGuide, ids: Sequence[int], first: int) -> None:
    """Close, in place, what the guide closes at each position of a right tool line (a wrong one is wrong already)."""
    numbers = guide.numbers(ids[:first])
    for position in range(1, scores.shape[0] - 1):  # behind <tool_call>, up to </tool_call>
        scores[position] = guide.close(scores[position], ids[first + 1 : first + position], numbers)


def _score(hits: dict[str, list[bool]], turn: Turn, wanted: list[int], said: list[int]) -> None:
    is_right = said == wanted
    if turn.kind in SLOT_TOOLS:
        hits["slots"].append(is_right)
    if turn.text.startswith("<tool_call>"):
        hits["calls"].append(is_right)
        hits["action"].append(said[:2] == wanted[:2])  # the opening token and the tool's name
        hits[f"call_{turn.kind}"].append(is_right)
    else:
        hits["action"].append(said[:1] == wanted[:1])
        hits["say"].append(is_right)
        if turn.slots:
            hits["values"].append(is_right)


def _describe(tokenizer: TextTokenizer, row: Row, first: int, turn: Turn, said: list[int]) -> str:
    context = " ".join(tokenizer.token(token) for token in row.ids[max(0, first - 40) : first] if token >= 0)
    return f"{turn.kind}: ...{context}\n    wanted {turn.text}\n    said   {' '.join(tokenizer.token(t) for t in said)}"


def final_scores(model: Backbone, tokenizer: TextTokenizer, num_dialogues: int) -> dict[str, float]:
    """What the gates read: unseen phrasings and numbers, clean and misrecognised; known phrasings and gaps beside."""
    scores = evaluate(model, tokenizer, num_dialogues)
    for name, options in {
        "noisy": {"noise": 0.08},
        "train": {"split": "train"},
        "gaps": {"has_gaps": True},
        "unguided": {"is_guided": False},
    }.items():
        part = evaluate(model, tokenizer, max(20, num_dialogues // 2), **options)  # type: ignore[arg-type]
        keys = ("slots", "calls", "action", "say", "values", "n_slots", "n_calls", "n_action")
        scores |= {f"{key}_{name}": part[key] for key in keys if key in part}
    return scores


# ---------------------------------------------------------------- the stage


def is_muon_matrix(name: str, parameter: Tensor) -> bool:
    return "embed_tokens" not in name and "lm_head" not in name


def load_llm(work_dir: Path) -> tuple[Backbone, TextTokenizer]:
    """The shipped LLM in float32, for later stages and for scoring."""
    tensors, metadata = load_tensors(part_file(work_dir, "llm"))
    model = Backbone(BackboneDims.from_dict(json.loads(metadata["dims"])))
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return model.eval(), TextTokenizer.from_file(work_dir / "ship" / TOKENIZER_FILE)


def ship_llm(work_dir: Path, dims: BackboneDims, state: dict[str, Tensor]) -> None:
    """bfloat16, Qwen2's keys, sizes in the metadata."""
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in state.items()}
    save_tensors(part_file(work_dir, "llm"), tensors, {"dims": json.dumps(dims.to_dict())})


def run(stage: StageConfig, work_dir: Path, budget_s: float) -> dict[str, float]:
    """Train, shipping the moving average at every save. Starts from its own state, shipped weights, or nothing."""
    folder = stage.folder(work_dir)
    tokenizer_file = work_dir / "ship" / TOKENIZER_FILE
    if not tokenizer_file.exists():
        write_tokenizer(tokenizer_file)
    tokenizer = TextTokenizer.from_file(tokenizer_file)
    dims = BackboneDims.from_dict({**stage.settings["dims"], "vocab_size": tokenizer.vocab_size})
    model = Backbone(dims).init_weights(torch.Generator().manual_seed(stage.seed))
    settings = LoopSettings.from_table(stage.settings)
    is_warm = stage.settings.get("warm_start", True) and part_file(work_dir, "llm").exists()
    if is_warm and not (folder / "state.safetensors").exists():
        shipped, _ = load_llm(work_dir)
        model.load_state_dict(shipped.state_dict())
        _log(folder, f"warm start: {_short(evaluate(model, tokenizer, 20))}")
    phases = tuple(tuple(phase) for phase in stage.settings["phases"])
    curriculum = Curriculum(phases, stage.settings["gap_share"], stage.seed)  # type: ignore[arg-type]
    source = BatchSource(tokenizer, curriculum)
    loop = StepLoop(model, settings, folder, budget_s, is_muon_matrix)

    def loss_of(step: int) -> Tensor:
        return loss_of_batch(model, source.batch(step))

    def on_save() -> None:
        ship_llm(work_dir, dims, loop.averaged_state())
        shipped, _ = load_llm(work_dir)
        _log(folder, f"step {loop.steps} {loop.spent_s:.0f} s: {_short(evaluate(shipped, tokenizer, 60))}")

    result = loop.run(loss_of, on_save, lambda line: _log(folder, line))
    model, tokenizer = load_llm(work_dir)  # the score is of what is shipped, rounding and all
    scores = final_scores(model, tokenizer, stage.settings["num_test_dialogues"])
    scores |= {"steps": float(result.steps), "cpu_s": result.spent_s, "loss": result.loss}
    (work_dir / "ship" / "llm_eval.json").write_text(json.dumps(scores, indent=1))
    return scores


def _short(scores: dict[str, float]) -> str:
    shown = ("slots", "calls", "action", "say", "values", *(f"call_{tool}" for tool in SLOT_TOOLS))
    parts = [f"{name} {scores[name]:.3f}" for name in shown if name in scores]
    return " ".join([*parts, f"n {scores.get('n_slots', 0):.0f}"])


def _log(folder: Path, line: str) -> None:
    print(line, flush=True)
    with (folder / "log.txt").open("a", encoding="utf-8") as file:
        file.write(line + "\n")
