"""From scenes to the predictor's steps, through the gate of service: the same ear, chunks, moments and commands.

A scene is pushed through the ear twice: once for its segments, which are then encoded many at a time (streaming equals
offline), and once more in step with their captions, so that each moment sees the words that service would see. A test
replays a scene through the engine and finds the same steps. Knows nothing of losses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from minmo_runtime import features
from minmo_runtime.api import PushAudio
from minmo_runtime.caption_search import CaptionReader
from minmo_runtime.config import RuntimeConfig
from minmo_runtime.duplex_steps import facts, last_pieces, pool
from minmo_runtime.ear import Ear
from minmo_runtime.hearing import to_waveform
from minmo_runtime.model.duplex import CLASSES, WHILE_SILENT, WHILE_SPEAKING, DuplexDims
from minmo_runtime.model.encoder import VoiceEncoder
from minmo_runtime.rates import input_samples
from minmo_runtime.segment import Moment, Segment
from minmo_runtime.training.duplex_scenes import PACKET, Scene
from minmo_runtime.training.voicing import voiced_packets

IGNORED = -1
_SEGMENTS_PER_BATCH = 24


@dataclass
class Steps:
    """Inputs and labels of one scene: vectors [T, 2 D] float16, facts [T, F], pieces [T, W], speaks [T], labels [T];
    `samples` [T] on the input clock."""

    vectors: np.ndarray
    facts: np.ndarray
    pieces: np.ndarray
    speaks: np.ndarray
    labels: np.ndarray
    samples: np.ndarray


@dataclass
class EncodedSegment:
    """Encoder frames and CTC log-posteriors of one segment, in whole chunks."""

    frames: Tensor  # [n * chunk_frames, D]
    log_probs: np.ndarray  # [n * chunk_frames, V]


def whole_chunks(fbank: Tensor, chunk: int) -> Tensor:
    """The last chunk filled with its last frame, as service fills a closed segment."""
    missing = -len(fbank) % chunk
    return torch.cat([fbank, fbank[-1:].expand(missing, -1)]) if len(fbank) else fbank


def packets(scene: Scene) -> Iterator[tuple[int, bytes, bool, bool, list[str]]]:
    """(first sample, pcm, voiced, whether the agent speaks, commands that come before it) of each 20 ms."""
    pcm = (scene.waveform * 32767).round().clip(-32768, 32767).astype("<i2")
    flags = voiced_packets(pcm)
    ends = np.array([end for end, _, _ in scene.pieces])
    speaks = np.array([is_speaking for _, _, is_speaking in scene.pieces])
    commands = sorted(scene.commands)
    for index in range(min(len(flags), len(pcm) // PACKET)):
        start = index * PACKET
        due = []
        while commands and commands[0][0] <= start:
            due.append(commands.pop(0)[1])
        is_speaking = bool(speaks[min(len(speaks) - 1, int(np.searchsorted(ends, start, side="right")))])
        yield start, pcm[start : start + PACKET].tobytes(), bool(flags[index]), is_speaking, due


def command(ear: Ear, name: str) -> None:
    """What the agent's decision does to the ear (stream.py does the same). The turn's words go once they are heard."""
    if name == "take_turn":
        ear.adopt_overlap()
        ear.close_segment()
    elif name == "adopt":
        ear.adopt_overlap()
    elif name == "discard":
        ear.discard(overlap=True)
    else:
        raise ValueError(f"command {name!r}: must be take_turn, adopt or discard")


def segments_of(scene: Scene, config: RuntimeConfig, chunk: int) -> list[np.ndarray]:
    """The samples of each segment that the gate opens in this scene."""
    ear = Ear("scene", config, chunk)
    for start, pcm, voiced, is_speaking, due in packets(scene):
        for name in due:
            command(ear, name)
        ear.push(PushAudio(call_id="scene", pcm=pcm, start_sample=start, voiced=voiced), is_speaking)
    return [segment.take_pcm() for segment in ear.segments]


@torch.no_grad()
def encode(encoder: VoiceEncoder, segments: list[np.ndarray]) -> list[EncodedSegment]:
    """Many segments at once, those of similar length together."""
    chunk = encoder.fbank_frames_per_chunk
    # A turn that is taken may close a segment before its first window of samples: nothing of it is encoded.
    too_short = torch.zeros(0, encoder.dims.num_mel_bins)
    rows = [
        whole_chunks(features.fbank(to_waveform(pcm)), chunk) if features.num_frames(len(pcm)) else too_short
        for pcm in segments
    ]
    order = sorted((index for index, row in enumerate(rows) if len(row)), key=lambda index: len(rows[index]))
    width = encoder.dims.output_size
    done = [EncodedSegment(torch.zeros(0, width), np.zeros((0, 1), np.float32)) for _ in rows]
    for first in range(0, len(order), _SEGMENTS_PER_BATCH):
        chosen = order[first : first + _SEGMENTS_PER_BATCH]
        padded = torch.nn.utils.rnn.pad_sequence([rows[index] for index in chosen], batch_first=True)
        lengths = torch.tensor([len(rows[index]) // 4 for index in chosen])
        hidden = encoder(padded, lengths)
        log_probs = encoder.ctc_log_probs(hidden).numpy()
        for row, (index, length) in enumerate(zip(chosen, lengths.tolist(), strict=True)):
            done[index] = EncodedSegment(hidden[row, :length].clone(), log_probs[row, :length])
    return done


@dataclass
class StepWriter:
    """Walks one scene in step with its captions and collects the steps."""

    scene: Scene
    encoded: list[EncodedSegment]
    tokenizer: Tokenizer
    captions: CaptionReader
    dims: DuplexDims
    config: RuntimeConfig
    chunk_frames: int
    new_frames: list[Tensor] = field(default_factory=list)
    rows: list[tuple[Tensor, list[float], list[int], Moment]] = field(default_factory=list)
    numbers: dict[Segment, int] = field(default_factory=dict)  # which encoded segment is whose

    def write(self) -> Steps:
        ear = Ear("scene", self.config, 4 * self.chunk_frames, own_level=self.scene.level_before())
        waiting: list[Moment] = []
        leaving: list[Segment] | None = None  # segments of a turn that was taken: its words go when they are heard
        step = input_samples(self.dims.step_ms)
        next_sample = step
        for start, pcm, voiced, is_speaking, due in packets(self.scene):
            for name in due:
                command(ear, name)
                if name == "take_turn":
                    leaving = list(ear.segments)
            ear.push(PushAudio(call_id="scene", pcm=pcm, start_sample=start, voiced=voiced), is_speaking)
            while next_sample <= ear.clock:
                waiting.append(ear.moment(next_sample, is_speaking))
                next_sample += step
            self._settle(ear, waiting)
            if leaving is not None and all(segment.is_final for segment in leaving):
                ear.take_user_turn()
                leaving = None
        return self._steps()

    def _settle(self, ear: Ear, waiting: list[Moment]) -> None:
        """Answer what can be answered, encode what is there, in the scheduler's order."""
        while True:
            if waiting and waiting[0].num_chunks <= ear.num_chunks_encoded:
                self._answer(ear, waiting.pop(0))
            elif not self._encode_next(ear):
                return

    def _encode_next(self, ear: Ear) -> bool:
        if not ear.segments:
            return False
        segment = ear.segments[0]
        if segment not in self.numbers:
            self.numbers[segment], segment.ctc = len(self.numbers), self.captions.new()
        number = self.numbers[segment]
        if segment.is_spent:
            segment.is_final = True
            ear.take_text(segment, segment.text)
            return True
        chunk = 4 * self.chunk_frames
        if not (segment.is_closed or segment.num_frames_waiting() >= chunk):
            return False
        first = segment.num_frames_encoded // 4
        span = slice(first, first + self.chunk_frames)
        segment.num_frames_encoded += min(chunk, segment.num_frames_waiting())
        segment.is_final = segment.is_spent
        grown = segment.ctc.push(self.encoded[number].log_probs[span])
        ear.num_chunks_encoded += 1
        self.new_frames.append(self.encoded[number].frames[span])
        text = " ".join(self.tokenizer.decode(segment.ctc.tokens).split()) if grown else segment.text
        ear.take_text(segment, text)
        return True

    def _answer(self, ear: Ear, moment: Moment) -> None:
        view = ear.view(moment, self.scene.slot_digits)
        vector = pool(self.new_frames, self.dims.input_size // 2)
        self.new_frames = []
        heard = ear.heard_so_far(overlap=False)
        self.rows.append(
            (vector, facts(view), last_pieces(self.tokenizer, view, heard, self.dims.piece_window), moment)
        )

    def _steps(self) -> Steps:
        samples = np.array([moment.sample for *_, moment in self.rows], np.int64)
        ends = np.array([end for end, _, _ in self.scene.pieces])
        classes = np.array([label for _, label, _ in self.scene.pieces])
        labels = classes[np.searchsorted(ends, samples - 1, side="right").clip(max=len(classes) - 1)]
        speaks = np.array([moment.is_agent_speaking for *_, moment in self.rows])
        allowed = np.array([[name in names for name in CLASSES] for names in (WHILE_SILENT, WHILE_SPEAKING)])
        # Where the floor changes inside a packet the label may be one that the mask forbids.
        labels = np.where(allowed[speaks.astype(int), labels], labels, IGNORED)
        return Steps(
            torch.stack([vector for vector, *_ in self.rows]).numpy().astype(np.float16),
            np.array([values for _, values, *_ in self.rows], np.float32),
            np.array([ids for _, _, ids, _ in self.rows], np.int16),
            speaks,
            labels.astype(np.int8),
            samples,
        )


def steps_of(
    scenes: list[Scene],
    encoder: VoiceEncoder,
    tokenizer: Tokenizer,
    captions: CaptionReader,
    dims: DuplexDims,
    config: RuntimeConfig,
) -> list[Steps]:
    """Steps of several scenes; their segments are encoded together."""
    chunk, chunk_frames = encoder.fbank_frames_per_chunk, encoder.dims.chunk_frames
    segments = [segments_of(scene, config, chunk) for scene in scenes]
    encoded = encode(encoder, [pcm for found in segments for pcm in found])
    done, first = [], 0
    for scene, found in zip(scenes, segments, strict=True):
        rows = encoded[first : first + len(found)]
        done.append(StepWriter(scene, rows, tokenizer, captions, dims, config, chunk_frames).write())
        first += len(found)
    return done
