"""The data of stage 4: scenes walked through the gate of service, kept as ragged steps with their marks.

Everything but the predictor is frozen, so its inputs are computed once, in as many processes as there are cores.
"""

from __future__ import annotations

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from minmo_runtime.caption_search import CaptionReader
from minmo_runtime.config import RuntimeConfig
from minmo_runtime.duplex_steps import FACT_NAMES
from minmo_runtime.model.duplex import DuplexDims, StepInputs
from minmo_runtime.training import synthesis
from minmo_runtime.training.data import HumanUtterances, human_clips
from minmo_runtime.training.duplex_inputs import IGNORED, Steps, steps_of
from minmo_runtime.training.duplex_scenes import Mark, Scene, SceneWriter
from minmo_runtime.training.duplex_score import Judged
from minmo_runtime.training.encoder import load_encoder
from minmo_runtime.training.freeze import part_hash
from minmo_runtime.training.ngram import NGRAM_FILE
from minmo_runtime.training.spoken import Mouth, Ragged, load_arrays, save_arrays
from minmo_runtime.training.stage import part_file

_SCENES_AT_ONCE = 32
_MARK_KINDS = (
    "pause_digits", "pause_number", "pause_opener", "pause_words", "end", "waits", "backchannel", "interrupt", "noise",
    "person",
)  # fmt: skip


@dataclass
class SceneMaker:
    """Blocks of scenes as steps, each from its own seed. Not the same to the sample: espeak-ng carries something over
    from one sentence to the next, and the blocks are made in several processes."""

    work_dir: Path
    dims: DuplexDims
    seed: int
    split: str
    speech_dir: Path | None

    def __post_init__(self) -> None:
        torch.set_num_threads(1)
        self.encoder = load_encoder(self.work_dir)
        self.tokenizer = Tokenizer.from_file(str(self.work_dir / "ship" / "ctc_tokenizer.json"))
        self.captions = CaptionReader.from_table({"ngram": NGRAM_FILE}, self.work_dir / "ship")
        self.mouth = Mouth(self.work_dir)
        clips = human_clips(self.speech_dir, self.split == "held") if self.speech_dir else []
        self.people = HumanUtterances(clips) if clips else None

    def block(self, number: int, count: int) -> list[tuple[Scene, Steps]]:
        rng = np.random.default_rng([self.seed, self.split == "held", number])
        scenes = [SceneWriter(self.mouth, rng, self.split, self.people).write() for _ in range(count)]
        steps = steps_of(scenes, self.encoder, self.tokenizer, self.captions, self.dims, RuntimeConfig())
        return [(scene.without_sound(), found) for scene, found in zip(scenes, steps, strict=True)]


_makers: list[SceneMaker] = []  # of a worker process


def _start_maker(*arguments: Any) -> None:
    _makers[:] = [SceneMaker(*arguments)]


def _make_block(number: int, count: int) -> list[tuple[Scene, Steps]]:
    return _makers[0].block(number, count)


def make_data(
    path: Path, work_dir: Path, dims: DuplexDims, seed: int, split: str, count: int, speech_dir: Path | None = None
) -> None:
    """`count` scenes as ragged steps in one npz, with their marks, on all cores. `speech_dir`: recordings of people."""
    rows: dict[str, list[np.ndarray]] = {}
    answered: list[bool] = []
    marks: list[tuple[int, int, int, int]] = []
    sizes = [min(_SCENES_AT_ONCE, count - first) for first in range(0, count, _SCENES_AT_ONCE)]
    synthesis.prepare_voice_folder(work_dir / "voices")  # before several processes want it
    arguments = (work_dir, dims, seed, split, speech_dir)
    spawn = multiprocessing.get_context("spawn")  # a fork would share torch's and espeak's state
    with ProcessPoolExecutor(mp_context=spawn, initializer=_start_maker, initargs=arguments) as pool:
        for number, block in enumerate(pool.map(_make_block, range(len(sizes)), sizes)):
            for scene, steps in block:
                marks += [(len(answered), _MARK_KINDS.index(m.kind), m.start, m.end) for m in scene.marks]
                answered.append(any(name == "take_turn" for _, name in scene.commands))
                for name, values in vars(steps).items():
                    rows.setdefault(name, []).append(values)
            if number % 20 == 0:
                print(f"4: {split} scenes {len(answered)} of {count}", flush=True)
    arrays = {
        "answered": np.array(answered),
        "marks": np.array(marks),
        "encoder_hash": np.array(encoder_hash(work_dir)),
        "made_from": np.array(made_from(work_dir, seed, split, count, speech_dir)),
    }
    for name, values in rows.items():
        Ragged.of(values).save_into(arrays, name)
    save_arrays(path, arrays)


def encoder_hash(work_dir: Path) -> str:
    return part_hash(part_file(work_dir, "encoder"))


def made_from(work_dir: Path, seed: int, split: str, count: int, speech_dir: Path | None) -> str:
    """What scenes depend on that may change from one run to the next."""
    has_people = bool(speech_dir and human_clips(speech_dir, split == "held"))
    return json.dumps([encoder_hash(work_dir), FACT_NAMES, seed, split, count, has_people])


class Scenes:
    """One npz of `make_data`."""

    def __init__(self, path: Path) -> None:
        arrays = load_arrays(path)
        names = ("vectors", "facts", "pieces", "speaks", "labels", "samples")
        self.rows = {name: Ragged.load_from(arrays, name) for name in names}
        self.answered, self.marks = arrays["answered"], arrays["marks"]
        self.encoder_hash, self.made_from = str(arrays["encoder_hash"]), str(arrays.get("made_from", ""))

    def __len__(self) -> int:
        return len(self.answered)

    def batch(self, chosen: np.ndarray) -> tuple[StepInputs, Tensor]:
        """Steps [B, T, ...] and labels [B, T] (IGNORED where padded)."""

        def padded(name: str, kind: type, padding: int = 0) -> Tensor:
            found = [torch.from_numpy(self.rows[name][int(i)].astype(kind)) for i in chosen]
            return nn.utils.rnn.pad_sequence(found, batch_first=True, padding_value=padding)

        steps = StepInputs(
            padded("vectors", np.float32), padded("speaks", bool), padded("facts", np.float32),
            padded("pieces", np.int64),
        )  # fmt: skip
        return steps, padded("labels", np.int64, IGNORED)

    def judged(self, index: int, chances: np.ndarray) -> Judged:
        marks = [
            Mark(_MARK_KINDS[kind], start, end) for scene, kind, start, end in self.marks.tolist() if scene == index
        ]
        facts, speaks, samples = (self.rows[name][index] for name in ("facts", "speaks", "samples"))
        return Judged(chances, facts, speaks, samples, marks, bool(self.answered[index]))
