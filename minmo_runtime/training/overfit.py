"""`minmo train overfit`: twenty calls learnt by heart, from the caller's voice to the agent's turn, in minutes.

The smallest proof that data, features, encoder, tokenizers, layout and LLM fit each other: a set-up that cannot learn
twenty calls has a fault that hours of training would only hide. Fresh weights at the sizes of stages 0b and 0g; nothing
is shipped. The agent's voice has its own stages (0c, 0e, 0f, 0h) and is not part of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from minmo_runtime.caption_search import CaptionReader
from minmo_runtime.model.backbone import Backbone
from minmo_runtime.model.dims import BackboneDims
from minmo_runtime.model.encoder import VoiceEncoder
from minmo_runtime.model.voice_tokenizer import pad_features
from minmo_runtime.text import TextTokenizer, normalise_spoken
from minmo_runtime.training.dialogues import Turn, dialogue
from minmo_runtime.training.encoder import make_encoder, train_ctc_tokenizer, word_error_rate
from minmo_runtime.training.evaluate import spoken_words
from minmo_runtime.training.llm import collate, encode_row, is_muon_matrix, loss_of_batch, score_rows
from minmo_runtime.training.loop import LoopSettings, make_optimisers
from minmo_runtime.training.spoken import Mouth
from minmo_runtime.training.stage import StageConfig, load_stage
from minmo_runtime.training.text_tokenizer import TOKENIZER_FILE
from minmo_runtime.training.text_tokenizer import write as write_tokenizer


@dataclass
class SpokenCall:
    """One call: its turns, and for each caller turn (by its place) the features [F, 80] of it spoken."""

    turns: list[Turn]
    features: dict[int, np.ndarray]


def run(stage: StageConfig, work_dir: Path, budget_s: float) -> dict[str, float]:
    """Rates over the twenty calls; see the gates in overfit.toml."""
    torch.set_num_threads(1)
    torch.manual_seed(stage.seed)
    ship = work_dir / "ship"
    if not (ship / TOKENIZER_FILE).exists():
        write_tokenizer(ship / TOKENIZER_FILE)
    if not (ship / "ctc_tokenizer.json").exists():
        train_ctc_tokenizer(ship / "ctc_tokenizer.json", None, load_stage("0b").settings["vocab_size"])
    tokenizer = TextTokenizer.from_file(ship / TOKENIZER_FILE)
    pieces = Tokenizer.from_file(str(ship / "ctc_tokenizer.json"))
    calls = speak_calls(work_dir, stage.settings["num_calls"], stage.seed)

    encoder = make_encoder(load_stage(stage.settings["encoder_stage"]).settings, pieces.get_vocab_size())
    wer, num_words = learn_to_hear(encoder, pieces, calls, stage, budget_s / 2)
    dims = load_stage(stage.settings["llm_stage"]).settings["dims"]
    llm = Backbone(BackboneDims.from_dict({**dims, "vocab_size": tokenizer.vocab_size}))
    llm.init_weights(torch.Generator().manual_seed(stage.seed))
    learn_to_answer(llm, tokenizer, [call.turns for call in calls], stage, budget_s / 2)

    from_text = turns_right(llm, tokenizer, [call.turns for call in calls])
    from_speech = turns_right(llm, tokenizer, [heard_turns(encoder, pieces, call) for call in calls])
    num_turns = float(sum(turn.is_target for call in calls for turn in call.turns))
    return {
        "turns_from_text": from_text,
        "wer_captions": wer,
        "turns_from_speech": from_speech,
        "n_turns": num_turns,
        "words": float(num_words),
    }


def speak_calls(work_dir: Path, count: int, seed: int) -> list[SpokenCall]:
    """Training calls without recognition errors, their callers spoken by random voices through random lines."""
    mouth, rng = Mouth(work_dir), np.random.default_rng(seed)
    calls = []
    for number in range(count):
        turns = dialogue(f"overfit/{seed}/{number}", "train", 0.0)
        spoken = {place: turn for place, turn in enumerate(turns) if is_spoken(turn)}
        calls.append(SpokenCall(turns, {place: mouth.caller(turn.text, rng, False) for place, turn in spoken.items()}))
    return calls


def is_spoken(turn: Turn) -> bool:
    return turn.role == "user" and not turn.text.startswith("keypad") and bool(spoken_words(turn.text))


def learn_to_hear(
    encoder: VoiceEncoder, pieces: Tokenizer, calls: list[SpokenCall], stage: StageConfig, budget_s: float
) -> tuple[float, int]:
    """CTC until every caption is right; (WER, words) of the captions."""
    settings = stage.settings
    rows = [(call.features[place], spoken_words(call.turns[place].text)) for call in calls for place in call.features]
    stacked = np.concatenate([features for features, _ in rows]).astype(np.float32)
    encoder.cmvn_shift.copy_(torch.from_numpy(-stacked.mean(0)))
    encoder.cmvn_scale.copy_(torch.from_numpy(1.0 / stacked.std(0)))

    def loss_of(step: int) -> Tensor:
        chosen = np.random.default_rng([stage.seed, step]).permutation(len(rows))[: settings["turns_per_step"]]
        features, lengths = pad_features([torch.from_numpy(rows[i][0].astype(np.float32)) for i in chosen])
        targets = [pieces.encode(rows[i][1]).ids for i in chosen]
        log_probs = encoder.ctc_log_probs(encoder(features, lengths)).transpose(0, 1)
        sizes = torch.tensor([len(target) for target in targets])
        flat = torch.tensor([piece for target in targets for piece in target])
        loss = torch.nn.functional.ctc_loss(log_probs, flat, lengths, sizes, reduction="sum", zero_infinity=True)
        return loss / sizes.sum()

    def errors() -> tuple[float, int]:
        return word_error_rate([text for _, text in rows], [caption(encoder, pieces, row) for row, _ in rows])

    learning = LoopSettings(lr_other=settings["encoder_lr"], autocast_bf16=False)
    learn("encoder", encoder, learning, budget_s, settings["check_every_steps"], loss_of, lambda: errors()[0] == 0.0)
    return errors()


def learn_to_answer(
    llm: Backbone, tokenizer: TextTokenizer, calls: list[list[Turn]], stage: StageConfig, budget_s: float
) -> None:
    """Cross entropy on the agent's turns until each is right, word for word."""
    rows = [encode_row(turns, tokenizer) for turns in calls]

    def loss_of(step: int) -> Tensor:
        order = np.random.default_rng([stage.seed, step]).permutation(len(rows))
        return loss_of_batch(llm, collate([rows[i] for i in order[: stage.settings["calls_per_step"]]]))

    learning = LoopSettings(lr_matrix=stage.settings["llm_lr_matrix"], lr_other=stage.settings["llm_lr_other"])
    every = stage.settings["check_every_steps"]
    learn("llm", llm, learning, budget_s, every, loss_of, lambda: turns_right(llm, tokenizer, calls) == 1.0)


def learn(
    part: str,
    model: nn.Module,
    settings: LoopSettings,
    budget_s: float,
    check_every: int,
    loss_of: Callable[[int], Tensor],
    is_known: Callable[[], bool],
) -> None:
    """Step until `is_known` or the CPU time is spent. No schedule and no average: nothing is kept."""
    optimisers = make_optimisers(model, settings, is_muon_matrix if part == "llm" else lambda name, tensor: False)
    started, step, loss = time.process_time(), 0, torch.zeros(())
    while time.process_time() - started < budget_s:
        model.train()
        for optimiser in optimisers:
            optimiser.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=settings.autocast_bf16):
            loss = loss_of(step)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        for optimiser in optimisers:
            optimiser.step()
        step += 1
        if step % check_every == 0:
            print(
                f"{part}: step {step} {time.process_time() - started:.0f} s loss {float(loss.detach()):.4f}", flush=True
            )
            if is_known():
                return


def turns_right(llm: Backbone, tokenizer: TextTokenizer, calls: list[list[Turn]]) -> float:
    """Share of the agent's turns of which every token is the most likely one."""
    scores = score_rows(llm.eval(), tokenizer, [encode_row(turns, tokenizer) for turns in calls])
    parts = [(scores.get(name, 0.0), scores.get(f"n_{name}", 0.0)) for name in ("calls", "say")]
    return sum(rate * count for rate, count in parts) / sum(count for _, count in parts)


@torch.no_grad()
def caption(encoder: VoiceEncoder, pieces: Tokenizer, row: np.ndarray) -> str:
    """Best path of one turn's features [F, 80]."""
    features, lengths = pad_features([torch.from_numpy(row.astype(np.float32))])
    search = CaptionReader().new()
    search.push(encoder.eval().ctc_log_probs(encoder(features, lengths))[0, : int(lengths[0])].numpy())
    return pieces.decode(search.tokens).strip()


def heard_turns(encoder: VoiceEncoder, pieces: Tokenizer, call: SpokenCall) -> list[Turn]:
    """The call with captions in place of the spoken turns' words: what the bridge hands to the LLM."""
    return [
        Turn(turn.role, normalise_spoken(caption(encoder, pieces, call.features[place])))
        if place in call.features
        else turn
        for place, turn in enumerate(call.turns)
    ]
