"""Stage 4: the duplex predictor learns who should have the floor, from steps made by the gate of service.

Inputs are the frozen encoder's frames with turn facts and CTC pieces (duplex_steps.py); everything but the predictor is
frozen, so they are computed once. Behind the training its operating point is set: the biases of user_done, user_waits
and interrupt are moved so that 0.5, the threshold of the turn taking, is where half of the held-out scenes show the
fewest take-overs with delays no longer than the bridge's, and the fewest stops for backchannels and noise with no fewer
interruptions found. Score and gate: the other half, against the bridge (duplex_score.py). The pieces of a part of the
training scenes are hidden, so that it does not live on known phrases alone.

Where a predictor of this encoder is there already, it is the start: what it makes of facts that it did not know begins
at nothing.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minmo_runtime.duplex_steps import FACT_NAMES, NUM_FACTS
from minmo_runtime.model.duplex import DuplexDims, DuplexPredictor, StepInputs
from minmo_runtime.training.duplex_data import Scenes, made_from, make_data
from minmo_runtime.training.duplex_inputs import IGNORED
from minmo_runtime.training.duplex_scenes import LABEL
from minmo_runtime.training.duplex_score import Judged, bridge_chances, score, shifted
from minmo_runtime.training.freeze import only_trainable
from minmo_runtime.training.loop import LoopSettings, StepLoop
from minmo_runtime.training.resume import load_tensors, save_tensors
from minmo_runtime.training.stage import StageConfig, part_file
from minmo_runtime.training.tokenizer import load_encoder

PART = "duplex"
_ODDS = np.exp(np.linspace(-4.0, 4.0, 33))
DELAY_WEIGHT = 0.2  # a second of silence at p90 weighs as twenty points of pauses taken
MAX_UNANSWERED = 0.0  # on the scenes that choose the point; the gate allows 1 % on the others


@torch.no_grad()
def posteriors(predictor: DuplexPredictor, scenes: Scenes) -> list[np.ndarray]:
    """[T, 6] of every scene."""
    predictor.eval()
    found = [predictor(scenes.batch(np.array([index]))[0])[0].exp().numpy() for index in range(len(scenes))]
    predictor.train()
    return found


def operating_point(scenes: list[Judged], bridge: dict[str, float]) -> dict[str, float]:
    """Odds by which user_waits, user_done and interrupt are divided (see the module)."""

    def trial(**odds: float) -> dict[str, float]:
        moved = []
        for scene in scenes:
            chances = scene.chances
            for name, value in odds.items():
                chances = shifted(chances, name, value)
            moved.append(Judged(chances, scene.facts, scene.speaks, scene.samples, scene.marks, scene.is_answered))
        return score(moved)

    def is_answered(found: dict[str, float]) -> bool:
        is_no_later = all(found[name] <= bridge[name] for name in ("delay_p50_s", "delay_p90_s"))
        return is_no_later and found["ends_unanswered"] <= max(MAX_UNANSWERED, bridge["ends_unanswered"])

    # An end that is taken for "one moment" leaves the caller in silence: user_waits is only ever made less likely.
    best: tuple[float, float, float] = (2.0, 1.0, 1.0)
    for waits in _ODDS[_ODDS >= 1.0][::5]:
        for done in _ODDS:
            found = trial(user_waits=waits, user_done=done)
            if is_answered(found):
                late = DELAY_WEIGHT * found["delay_p90_s"]
                best = min(best, (found["takeover"] + found["takeover_waits"] / 4 + late, float(waits), float(done)))
    interrupt = 1.0
    for odds in _ODDS:  # as careful as it may be while no fewer interruptions are found
        found = trial(interrupt=odds)
        if found["interrupts_1s"] >= bridge["interrupts_1s"]:
            interrupt = float(odds)
    return {"user_waits": best[1], "user_done": best[2], "interrupt": interrupt}


def set_operating_point(predictor: DuplexPredictor, odds: dict[str, float]) -> None:
    with torch.no_grad():
        for name, value in odds.items():
            predictor.classify.bias[LABEL[name]] -= math.log(value)


def hide_pieces(steps: StepInputs, rng: np.random.Generator, share: float) -> StepInputs:
    """Whole scenes without words, and single words elsewhere."""
    assert steps.pieces is not None
    is_scene = torch.from_numpy(rng.random(len(steps.pieces)) < share / 2)
    is_word = torch.from_numpy(rng.random(steps.pieces.shape) < share / 2)
    pieces = steps.pieces.masked_fill(is_word | is_scene[:, None, None], 0)
    return StepInputs(steps.vectors, steps.agent_speaks, steps.facts, pieces)


def weighted_loss(log_probs: Tensor, steps: StepInputs, labels: Tensor, overlap_weight: float) -> Tensor:
    """Mean over the labelled steps; a voice over the agent is rare and weighs more."""
    assert steps.facts is not None
    mask = labels != IGNORED
    is_overlap = steps.agent_speaks & (steps.facts[..., FACT_NAMES.index("is_voiced")] > 0)
    weights = torch.where(is_overlap, overlap_weight, 1.0)[mask]
    losses = nn.functional.nll_loss(log_probs[mask].float(), labels[mask], reduction="none")
    return (losses * weights).sum() / weights.sum()


def predictor_before(stage: StageConfig, work_dir: Path, dims: DuplexDims) -> DuplexPredictor | None:
    """The one that was shipped before this stage ran, if its sizes are ours."""
    path = stage.folder(work_dir) / "before" / part_file(work_dir, PART).name
    if not path.exists():
        return None
    before = DuplexPredictor(dims)
    tensors = {name: tensor.float() for name, tensor in load_tensors(path)[0].items()}
    if dims.num_facts:  # it makes nothing of facts that were added since
        known = tensors["linear_facts.weight"]
        tensors["linear_facts.weight"] = nn.functional.pad(known, (0, dims.num_facts - known.shape[1]))
    before.load_state_dict(tensors)
    return before.eval()


def evaluate(predictor: DuplexPredictor, held: Scenes) -> dict[str, float]:
    """On the half of the held-out scenes that the operating point has not seen; the bridge's scores as `bridge_*`."""
    test = range(len(held) // 2, len(held))
    chances = posteriors(predictor, held)
    ours = score([held.judged(i, chances[i]) for i in test])
    theirs = score([held.judged(i, bridge_chances(held.rows["facts"][i])) for i in test])
    return ours | {f"bridge_{name}": value for name, value in theirs.items() if not name.startswith("n_")}


def ship(work_dir: Path, predictor: DuplexPredictor, encoder: str) -> None:
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in predictor.state_dict().items()}
    metadata = {"dims": json.dumps(predictor.dims.to_dict()), "encoder_hash": encoder}
    save_tensors(part_file(work_dir, PART), tensors, metadata)


def load_predictor(path: Path) -> DuplexPredictor:
    tensors, metadata = load_tensors(path)
    predictor = DuplexPredictor(DuplexDims.from_dict(json.loads(metadata["dims"])))
    predictor.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return predictor


def prepare(stage: StageConfig, work_dir: Path, dims: DuplexDims) -> tuple[Scenes, Scenes]:
    """Training and held-out scenes; made anew when they were made from anything else."""
    folder, found = stage.folder(work_dir), []
    speech_dir = Path(stage.settings["speech_dir"]) if stage.settings.get("speech_dir") else None
    for split, count in (("train", stage.settings["num_scenes"]), ("held", stage.settings["num_held_scenes"])):
        path = folder / f"{split}.npz"
        if not path.exists() or Scenes(path).made_from != made_from(work_dir, stage.seed, split, count, speech_dir):
            make_data(path, work_dir, dims, stage.seed, split, count, speech_dir)
        found.append(Scenes(path))
    return found[0], found[1]


def run(stage: StageConfig, work_dir: Path, budget_s: float) -> dict[str, float]:
    """`budget_s` is the training alone; the scenes are made before it."""
    torch.set_num_threads(1)
    settings: dict[str, Any] = stage.settings
    encoder = load_encoder(work_dir)
    dims = DuplexDims(
        2 * encoder.dims.output_size, input="encoder", num_facts=NUM_FACTS, num_pieces=encoder.dims.vocab_size,
        **settings["dims"],
    )  # fmt: skip
    scenes, held = prepare(stage, work_dir, dims)
    torch.manual_seed(stage.seed)
    predictor = DuplexPredictor(dims)
    if (before := predictor_before(stage, work_dir, dims)) is not None:
        predictor.load_state_dict(before.state_dict())
    with only_trainable(stage, {PART: predictor}):
        loop = StepLoop(
            predictor, LoopSettings.from_table(settings), stage.folder(work_dir), budget_s, lambda n, p: False
        )

        def loss_of(step: int) -> Tensor:
            rng = np.random.default_rng([stage.seed, step])
            steps, labels = scenes.batch(rng.integers(0, len(scenes), settings["batch_size"]))
            log_probs = predictor(hide_pieces(steps, rng, settings["hidden_pieces_share"]))
            return weighted_loss(log_probs, steps, labels, settings["overlap_weight"])

        loop.run(loss_of, lambda: None, lambda line: print(line, flush=True))
    predictor.load_state_dict(loop.averaged_state())
    choosing = range(len(held) // 2)
    chances = posteriors(predictor, held)
    bridge = score([held.judged(i, bridge_chances(held.rows["facts"][i])) for i in choosing])
    odds = operating_point([held.judged(i, chances[i]) for i in choosing], bridge)
    set_operating_point(predictor, odds)
    ship(work_dir, predictor, held.encoder_hash)
    scores = evaluate(load_predictor(part_file(work_dir, PART)), held)
    return {**scores, **{f"odds_{name}": value for name, value in odds.items()}, "steps": float(loop.steps)}
