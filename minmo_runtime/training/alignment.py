"""Stages 1a, 1b, 1c: the LLM learns to hear. Caller turns of generated calls are spoken, encoded, projected, and
stand where their text stood; the loss is on the agent's turns. 1a trains the projector, 1b also the encoder, 1c also
the LLM through LoRA.

The projector starts from the CTC posteriors (each piece points at the LLM's own token for that word, a digit word at
the digit) with everything else at zero; the encoder's captions are kept alive by a CTC loss. Score: slots of held-out
calls (unseen voices, phrasings, numbers) from speech, beside the bridge (captions as text, same encoder) and beside
the true text.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from minmo_runtime.caption_search import CaptionReader
from minmo_runtime.model.backbone import Backbone
from minmo_runtime.model.encoder import VoiceEncoder
from minmo_runtime.model.lora import Lora, LoraDims
from minmo_runtime.model.projector import InputProjector, ProjectorDims
from minmo_runtime.model.voice_tokenizer import pad_features
from minmo_runtime.text import SPOKEN_DIGITS, TextTokenizer, chat_turn, normalise_spoken
from minmo_runtime.training.dialogues import Turn, dialogue
from minmo_runtime.training.evaluate import spoken_words
from minmo_runtime.training.freeze import only_trainable
from minmo_runtime.training.llm import SLOT_TOOLS, load_llm
from minmo_runtime.training.loop import LoopSettings, StepLoop
from minmo_runtime.training.ngram import NGRAM_FILE
from minmo_runtime.training.resume import load_tensors, save_tensors
from minmo_runtime.training.spoken import Mouth, Ragged, load_arrays, save_arrays
from minmo_runtime.training.stage import StageConfig, part_file
from minmo_runtime.training.tokenizer import load_encoder

AUDIO = -1  # a position that a projector vector fills


@dataclass(frozen=True)
class Call:
    """One call laid out for the LLM: ids with AUDIO positions, what is learnt, and its spoken turns' features in
    order.
    """

    turns: tuple[Turn, ...]
    features: list[np.ndarray]  # of the spoken caller turns
    ids: np.ndarray
    target: np.ndarray
    spans: list[tuple[int, int, Turn]]  # learnt turns: first and behind-last position


def is_spoken(turn: Turn) -> bool:
    """Keypad turns stay text, as in service."""
    return turn.role == "user" and not turn.text.startswith("keypad")


def lay_out(
    turns: tuple[Turn, ...], features: list[np.ndarray], tokenizer: TextTokenizer, captions: list[str] | None = None
) -> Call:
    """Positions of a call. With `captions`, spoken turns hold that text instead of audio positions (the bridge)."""
    ids: list[int] = []
    target: list[bool] = []
    spans: list[tuple[int, int, Turn]] = []
    number = 0
    for turn in turns:
        text = turn.text
        if is_spoken(turn):
            number += 1
            if captions is None:
                opening = tokenizer.encode(chat_turn("user", "", is_open=True))
                num_vectors = (len(features[number - 1]) + 3) // 4 // 2
                new = [*opening, *[AUDIO] * num_vectors, *tokenizer.encode("<|im_end|>")]
                ids, target = ids + new, target + [False] * len(new)
                continue
            text = captions[number - 1]
        opening = tokenizer.encode(chat_turn(turn.role, "", is_open=True)) if turn.role != "tool" else []
        whole = tokenizer.encode(chat_turn(turn.role, text))
        if turn.is_target:
            spans.append((len(ids) + len(opening), len(ids) + len(whole), turn))
        target += [False] * len(opening) + [turn.is_target] * (len(whole) - len(opening))
        ids += whole
    return Call(turns, features, np.array(ids), np.array(target), spans)


def make_calls(path: Path, work_dir: Path, seed: int, split: str, count: int) -> None:
    """Speak the callers of `count` calls: ragged features by turn; the calls themselves are made again from their
    seeds.
    """
    mouth, rng = Mouth(work_dir), np.random.default_rng([seed, split == "held"])
    rows, counts = [], []
    for number in range(count):
        spoken = [turn for turn in call_turns(seed, split, number) if is_spoken(turn)]
        voice = ""
        rows += [mouth.caller(turn.text, rng, split == "held", voice) for turn in spoken]
        counts.append(len(spoken))
    arrays = {"counts": np.array(counts)}
    Ragged.of(rows).save_into(arrays, "features")
    save_arrays(path, arrays)


def call_turns(seed: int, split: str, number: int) -> tuple[Turn, ...]:
    """Words as they are said: no recognition errors, the audio makes its own."""
    return tuple(dialogue(f"alignment/{seed}/{number}", split, 0.0))


def load_calls(path: Path, tokenizer: TextTokenizer, seed: int, split: str) -> list[Call]:
    arrays = load_arrays(path)
    features, first, calls = Ragged.load_from(arrays, "features"), 0, []
    for number, count in enumerate(arrays["counts"].tolist()):
        rows = [features[first + offset] for offset in range(count)]
        calls.append(lay_out(call_turns(seed, split, number), rows, tokenizer))
        first += count
    return calls


@torch.no_grad()
def piece_vectors(pieces: Tokenizer, tokenizer: TextTokenizer, table: Tensor) -> Tensor:
    """Start of the projector's piece table: a whole word points at its LLM token, a digit word at the digit."""
    vectors = torch.zeros(pieces.get_vocab_size(), table.shape[1])
    for piece, index in pieces.get_vocab().items():
        word = piece.removeprefix("▁")
        if index == 0 or not word:
            continue
        ids = tokenizer.encode(SPOKEN_DIGITS.get(word, word) if piece.startswith("▁") else word)
        vectors[index] = table[torch.tensor(ids)].mean(0)
    return vectors


class AlignmentTask(nn.Module):
    """Encoder, projector, LLM and its LoRA under their part names."""

    def __init__(
        self, encoder: VoiceEncoder, projector: InputProjector, llm: Backbone, lora: Lora | None, ctc_weight: float
    ) -> None:
        super().__init__()
        self.encoder, self.projector, self.llm = encoder, projector, llm
        self.llm_lora = lora
        self.ctc_weight = ctc_weight
        if lora is not None:
            lora.attach(llm)

    def parts(self) -> dict[str, nn.Module]:
        found: dict[str, nn.Module] = {"encoder": self.encoder, "projector": self.projector, "llm": self.llm}
        return found if self.llm_lora is None else {**found, "llm_lora": self.llm_lora}

    def hear(self, features: list[np.ndarray]) -> tuple[Tensor, Tensor, Tensor]:
        """Turns -> projector vectors [R, n, D], CTC log-probabilities [R, T, V], lengths [R] in encoder frames."""
        padded, lengths = pad_features([torch.from_numpy(row.astype(np.float32)) for row in features])
        with torch.set_grad_enabled(
            torch.is_grad_enabled() and any(p.requires_grad for p in self.encoder.parameters())
        ):
            hidden = self.encoder(padded, lengths)
            log_probs = self.encoder.ctc_log_probs(hidden)
        # The posteriors point at words; the projector's own gradient does not go back through them.
        return self.projector(hidden, log_probs.detach().exp()), log_probs, lengths

    def embed(self, calls: list[Call]) -> tuple[Tensor, Tensor, Tensor]:
        """Input vectors [B, L, D] of laid-out calls; CTC log-probabilities and lengths of their spoken turns."""
        features = [row for call in calls for row in call.features]
        vectors, log_probs, lengths = self.hear(features)
        width = max(len(call.ids) for call in calls)
        ids = torch.zeros(len(calls), width, dtype=torch.long)
        is_audio = torch.zeros(len(calls), width, dtype=torch.bool)
        for row, call in enumerate(calls):
            ids[row, : len(call.ids)] = torch.from_numpy(call.ids).clamp_min(0)
            is_audio[row, : len(call.ids)] = torch.from_numpy(call.ids == AUDIO)
        embeds = self.llm.embed(ids)
        heard = torch.cat([vectors[turn, : int(length) // 2] for turn, length in enumerate(lengths)])
        spread = torch.zeros_like(embeds)
        spread[is_audio] = heard.to(embeds.dtype)
        return torch.where(is_audio[..., None], spread, embeds), log_probs, lengths

    def loss(self, calls: list[Call], ctc_targets: list[list[int]]) -> Tensor:
        embeds, log_probs, lengths = self.embed(calls)
        hidden = self.llm(embeds=embeds)
        places, wanted = [], []
        for row, call in enumerate(calls):
            learnt = np.flatnonzero(call.target)
            places += [row * embeds.shape[1] + int(position) - 1 for position in learnt]
            wanted += call.ids[learnt].tolist()
        logits = self.llm.logits(hidden.flatten(0, 1)[torch.tensor(places)])
        loss = nn.functional.cross_entropy(logits.float(), torch.tensor(wanted))
        if not self.ctc_weight:
            return loss
        sizes = torch.tensor([len(target) for target in ctc_targets])
        flat = torch.tensor([token for target in ctc_targets for token in target])
        ctc = nn.functional.ctc_loss(
            log_probs.float().transpose(0, 1), flat, lengths, sizes, reduction="sum", zero_infinity=True
        )
        return loss + self.ctc_weight * ctc / sizes.sum()


@torch.no_grad()
def captions_of(task: AlignmentTask, pieces: Tokenizer, call: Call, reader: CaptionReader) -> list[str]:
    """The caller's words as they are served: what the bridge hands to the LLM."""
    out = []
    for row in call.features:
        _, log_probs, lengths = task.hear([row])
        search = reader.new()
        search.push(log_probs[0, : int(lengths[0])].numpy())
        out.append(normalise_spoken(pieces.decode(search.tokens).strip()))
    return out


@torch.no_grad()
def evaluate(
    task: AlignmentTask, pieces: Tokenizer, tokenizer: TextTokenizer, calls: list[Call], reader: CaptionReader
) -> dict[str, float]:
    """Exact turns (teacher-forced, every token the most likely) by input: speech, bridge, true text."""
    task.eval()
    hits: dict[str, list[bool]] = {}
    for call in calls:
        texts = [turn.text for turn in call.turns if is_spoken(turn)]
        bridge = lay_out(call.turns, call.features, tokenizer, captions_of(task, pieces, call, reader))
        forms = {
            "speech": (call, task.embed([call])[0]),
            "bridge": (bridge, task.llm.embed(torch.from_numpy(bridge.ids)[None])),
        }
        text = lay_out(call.turns, call.features, tokenizer, texts)
        forms["text"] = (text, task.llm.embed(torch.from_numpy(text.ids)[None]))
        for name, (laid_out, embeds) in forms.items():
            hidden = task.llm(embeds=embeds)[0]
            for first, end, turn in laid_out.spans:
                said = task.llm.logits(hidden[first - 1 : end - 1]).argmax(-1).tolist()
                is_right = said == laid_out.ids[first:end].tolist()
                if turn.kind in SLOT_TOOLS:
                    hits.setdefault(f"slots_{name}", []).append(is_right)
                if turn.text.startswith("<tool_call>"):
                    hits.setdefault(f"calls_{name}", []).append(is_right)
    task.train()
    scores = {name: float(np.mean(found)) for name, found in sorted(hits.items())}
    return scores | {f"n_{name}": float(len(found)) for name, found in sorted(hits.items())}


def build(stage: StageConfig, work_dir: Path, pieces: Tokenizer, tokenizer: TextTokenizer) -> AlignmentTask:
    """Shipped encoder, LLM and (if any) projector; a fresh projector points at words by the posteriors."""
    llm, _ = load_llm(work_dir)
    encoder = load_encoder(work_dir)
    path = part_file(work_dir, "projector")
    if path.exists() and not stage.settings["starts_fresh"]:
        projector = load_projector(path)
    else:
        torch.manual_seed(stage.seed)
        dims = ProjectorDims(
            encoder.dims.output_size,
            llm.dims.hidden_size,
            num_pieces=encoder.dims.vocab_size,
            **stage.settings["projector"],
        )
        projector = InputProjector(dims)
        nn.init.zeros_(projector.conv.weight)
        nn.init.zeros_(projector.conv.bias)
        projector.piece_table.data.copy_(piece_vectors(pieces, tokenizer, llm.model.embed_tokens.weight))
    lora = None
    if "llm_lora" in stage.parts:
        lora = Lora(llm, LoraDims.from_dict(stage.settings["lora"]), torch.Generator().manual_seed(stage.seed))
    return AlignmentTask(encoder, projector, llm, lora, stage.settings["ctc_weight"])


def load_projector(path: Path) -> InputProjector:
    tensors, metadata = load_tensors(path)
    projector = InputProjector(ProjectorDims.from_dict(json.loads(metadata["dims"])))
    projector.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return projector


def ship(stage: StageConfig, work_dir: Path, task: AlignmentTask, state: dict[str, Tensor]) -> None:
    """Write the stage's own parts; the encoder keeps the form stage 0b writes."""
    for part in stage.parts:
        own = {name.removeprefix(f"{part}."): t for name, t in state.items() if name.startswith(f"{part}.")}
        if part == "encoder":
            save_tensors(part_file(work_dir, part), own)
        elif part == "llm_lora":
            lora = task.llm_lora
            assert lora is not None
            exported = {name: own[f"tensors.{name.replace('.', '__')}"].to(torch.bfloat16) for name in lora.export()}
            save_tensors(part_file(work_dir, part), exported, {"dims": json.dumps(lora.dims.to_dict())})
        else:
            tensors = {name: tensor.to(torch.bfloat16) for name, tensor in own.items()}
            save_tensors(part_file(work_dir, part), tensors, {"dims": json.dumps(task.projector.dims.to_dict())})


def run(stage: StageConfig, work_dir: Path, budget_s: float) -> dict[str, float]:
    torch.set_num_threads(1)
    settings, folder = stage.settings, stage.folder(work_dir)
    tokenizer = TextTokenizer.from_file(work_dir / "ship" / "text_tokenizer.json")
    pieces = Tokenizer.from_file(str(work_dir / "ship" / "ctc_tokenizer.json"))
    data: dict[str, list[Call]] = {}
    for split, count in (("train", settings["num_calls"]), ("held", settings["num_held_calls"])):
        # Shared by 1a, 1b and 1c: the same seed and sizes stand in their settings.
        path = work_dir / f"alignment_{split}_{settings['data_seed']}_{count}.npz"
        if not path.exists():
            make_calls(path, work_dir, settings["data_seed"], split, count)
        data[split] = load_calls(path, tokenizer, settings["data_seed"], split)
    calls = [call for call in data["train"] if call.features and len(call.ids) <= settings["longest_call"]]
    words = [[spoken_words(turn.text) for turn in call.turns if is_spoken(turn)] for call in calls]
    targets = [[pieces.encode(text).ids for text in texts] for texts in words]
    task = build(stage, work_dir, pieces, tokenizer)
    held = [call for call in data["held"] if call.features]
    reader = CaptionReader.from_table({"ngram": NGRAM_FILE}, work_dir / "ship")
    print(
        f"{stage.name}: {len(calls)} calls; before: {_short(evaluate(task, pieces, tokenizer, held[:40], reader))}",
        flush=True,
    )
    with only_trainable(stage, task.parts()):
        loop = StepLoop(task, LoopSettings.from_table(settings), folder, budget_s, is_llm_matrix)

        def loss_of(step: int) -> Tensor:
            rng = np.random.default_rng([stage.seed, step])
            chosen = rng.integers(0, len(calls), settings["calls_per_step"])
            return task.loss([calls[i] for i in chosen], [target for i in chosen for target in targets[i]])

        loop.run(
            loss_of,
            lambda: ship(stage, work_dir, task, loop.averaged_state()),
            lambda line: print(line, flush=True),
        )
    with torch.no_grad():
        for name, parameter in task.named_parameters():
            parameter.copy_(loop.average.get(name, parameter))
    scores = evaluate(task, pieces, tokenizer, held, reader)
    print(f"{stage.name}: {_short(scores)}", flush=True)
    return {**scores, "steps": float(loop.steps)}


def is_llm_matrix(name: str, parameter: Tensor) -> bool:
    """Nothing goes to Muon here: what is aligned moves a little, and the encoder was trained by AdamW."""
    return False


def _short(scores: dict[str, float]) -> str:
    return " ".join(f"{name} {value:.3f}" for name, value in scores.items() if not name.startswith("n_"))
