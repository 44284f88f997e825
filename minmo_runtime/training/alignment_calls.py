"""Calls for stages 1a-1c: who says what, the caller's turns as service would hear them, what stands where for the LLM.

A caller's sentence is spoken by a random voice through a random line and goes through service's own gate: the leg's
voice activity, the ear's pre-roll and hangover, dither, whole encoder chunks. So a training call replayed through the
engine gets the same positions and the same vectors (a test does it). Knows no weights and no losses.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from minmo_runtime import features as fbank_features
from minmo_runtime.api import PushAudio
from minmo_runtime.config import RuntimeConfig
from minmo_runtime.ear import Ear
from minmo_runtime.hearing import to_waveform
from minmo_runtime.rates import input_samples
from minmo_runtime.text import TURN_CLOSE, TextTokenizer, chat_turn
from minmo_runtime.training.dialogues import Turn, dialogue
from minmo_runtime.training.duplex_inputs import whole_chunks
from minmo_runtime.training.spoken import Mouth, Ragged, load_arrays, save_arrays
from minmo_runtime.training.voicing import PACKET_MS, voiced_packets

AUDIO = -1  # a position that a projector vector fills
FRAMES_PER_VECTOR = 8  # fbank frames: the encoder's front takes four, the projector two of those
_TRIES = 4  # a sentence that the gate does not hear as one stretch of speech is said again


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
                num_vectors = len(features[number - 1]) // FRAMES_PER_VECTOR
                new = [*opening, *[AUDIO] * num_vectors, *tokenizer.encode(TURN_CLOSE)]
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


def gated(waveform: NDArray[np.float32]) -> list[NDArray[np.int16]]:
    """16 kHz in [-1, 1] -> the samples of each segment that service would open; the last one ends with the waveform."""
    pcm = (waveform * 32767).round().clip(-32768, 32767).astype("<i2")
    ear, packet = Ear("training", RuntimeConfig()), input_samples(PACKET_MS)
    for index, voiced in enumerate(voiced_packets(pcm)):
        start = index * packet
        request = PushAudio(
            call_id="training", pcm=pcm[start : start + packet].tobytes(), start_sample=start, voiced=bool(voiced)
        )
        ear.push(request, is_agent_speaking=False)
    ear.close_segment()
    return [segment.take_pcm() for segment in ear.segments]


def served_features(pcm: NDArray[np.int16], chunk: int) -> NDArray[np.float16]:
    """A segment's features [F, 80] as service makes them, in whole encoder chunks of `chunk` frames."""
    return whole_chunks(fbank_features.fbank(to_waveform(pcm)), chunk).numpy().astype(np.float16)


def speak_turn(mouth: Mouth, text: str, rng: np.random.Generator, is_held: bool, chunk: int) -> NDArray[np.float16]:
    """One caller turn. What the gate never hears as one stretch stands as it was spoken."""
    for _ in range(_TRIES):
        waveform = mouth.caller_waveform(text, rng, is_held)
        segments = gated(waveform)
        if len(segments) == 1:
            return served_features(segments[0], chunk)
    return whole_chunks(fbank_features.fbank(torch.from_numpy(waveform)), chunk).numpy().astype(np.float16)


def make_calls(path: Path, work_dir: Path, seed: int, split: str, count: int, chunk: int) -> None:
    """Speak the callers of `count` calls: ragged features by turn; the calls themselves are made again from their
    seeds.
    """
    mouth, rng = Mouth(work_dir), np.random.default_rng([seed, split == "held"])
    rows, counts = [], []
    for number in range(count):
        spoken = [turn for turn in call_turns(seed, split, number) if is_spoken(turn)]
        rows += [speak_turn(mouth, turn.text, rng, split == "held", chunk) for turn in spoken]
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
