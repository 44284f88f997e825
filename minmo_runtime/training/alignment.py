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
from minmo_runtime.text import SPOKEN_DIGITS, TextTokenizer, normalise_spoken
from minmo_runtime.training.alignment_calls import AUDIO, Call, is_spoken, lay_out, load_calls, make_calls
from minmo_runtime.training.evaluate import spoken_words
from minmo_runtime.training.freeze import only_trainable, part_hash
from minmo_runtime.training.llm import SLOT_TOOLS, load_llm
from minmo_runtime.training.loop import LoopSettings, StepLoop
from minmo_runtime.training.ngram import NGRAM_FILE
from minmo_runtime.training.resume import load_tensors, save_tensors
from minmo_runtime.training.served_llm import LORA_PART, base_hash, hash_with, lora_metadata
from minmo_runtime.training.stage import StageConfig, part_file
from minmo_runtime.training.tokenizer import load_encoder


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
        projector = load_projector(path, base_hash(path.parent))
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


def load_projector(path: Path, base: str) -> InputProjector:
    """A projector of an earlier stage; what was trained with another LLM points nowhere in this one."""
    tensors, metadata = load_tensors(path)
    if (other := metadata.get("base_hash", base)) != base:
        raise ValueError(f"{path}: trained with the LLM {other}, here is {base}: run stage 1a first")
    projector = InputProjector(ProjectorDims.from_dict(json.loads(metadata["dims"])))
    projector.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return projector


def ship(stage: StageConfig, work_dir: Path, task: AlignmentTask, state: dict[str, Tensor]) -> None:
    """Write the stage's own parts; the encoder keeps the form stage 0b writes. The projector comes last: its file
    carries the hashes of the encoder and the LLM that it stands between."""
    own = {
        part: {name.removeprefix(f"{part}."): t for name, t in state.items() if name.startswith(f"{part}.")}
        for part in stage.parts
    }
    base = base_hash(part_file(work_dir, "llm").parent)
    heard_by = base
    if "encoder" in own:
        save_tensors(part_file(work_dir, "encoder"), own["encoder"])
    if LORA_PART in own:
        lora, path = task.llm_lora, part_file(work_dir, LORA_PART)
        assert lora is not None, f"stage {stage.name} trains {LORA_PART}"
        exported = {name: own[LORA_PART][f"tensors.{name.replace('.', '__')}"] for name in lora.export()}
        save_tensors(path, _rounded(exported), lora_metadata(lora.dims, base))
        heard_by = hash_with(base, path)
    metadata = {
        "dims": json.dumps(task.projector.dims.to_dict()),
        "encoder_hash": part_hash(part_file(work_dir, "encoder")),
        "llm_hash": heard_by,
        "base_hash": base,
    }
    save_tensors(part_file(work_dir, "projector"), _rounded(own["projector"]), metadata)


def _rounded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}


def run(stage: StageConfig, work_dir: Path, budget_s: float) -> dict[str, float]:
    torch.set_num_threads(1)
    settings, folder = stage.settings, stage.folder(work_dir)
    tokenizer = TextTokenizer.from_file(work_dir / "ship" / "text_tokenizer.json")
    pieces = Tokenizer.from_file(str(work_dir / "ship" / "ctc_tokenizer.json"))
    data: dict[str, list[Call]] = {}
    for split, count in (("train", settings["num_calls"]), ("held", settings["num_held_calls"])):
        # Shared by 1a, 1b and 1c: the same seed and sizes stand in their settings.
        path = work_dir / f"gated_calls_{split}_{settings['data_seed']}_{count}.npz"
        if not path.exists():
            chunk = load_encoder(work_dir).fbank_frames_per_chunk
            make_calls(path, work_dir, settings["data_seed"], split, count, chunk)
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
