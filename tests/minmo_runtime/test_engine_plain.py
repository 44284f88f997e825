"""The engine against its plain twin: token for token and sample for sample, alone and in company; a poisoned row or
one without memory ends alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from minmo_runtime import plain
from minmo_runtime.api import (
    AudioDelta,
    Caption,
    CloseStream,
    OpenStream,
    PushAudio,
    PushText,
    ReplyFinished,
    RuntimeEvent,
    Say,
    StartReply,
    StreamFailed,
    ToolCallRequested,
)
from minmo_runtime.config import RuntimeConfig
from minmo_runtime.engine import Engine
from minmo_runtime.random_checkpoint import write_random_checkpoint
from minmo_runtime.scheduler import JobKind
from minmo_runtime.weights import Checkpoint, load_checkpoint

CONFIG = RuntimeConfig(max_streams=4, max_reply_tokens=11, max_voice_tokens=60, sound_rows=4, prefill_chunk_tokens=24)
SYSTEM = "you are a test."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def checkpoint(folder: Path) -> Checkpoint:
    return load_checkpoint(folder)


class Room:
    """An engine, its events, and what each turn's voice tokens were."""

    def __init__(self, checkpoint: Checkpoint, config: RuntimeConfig = CONFIG) -> None:
        self.engine = Engine(checkpoint, config, timer=lambda: 0.0)
        self.events: list[RuntimeEvent] = []
        self.voice_tokens: dict[str, list[int]] = {}
        self.now = 0.0

    def send(self, *requests: object) -> None:
        for request in requests:
            self.events += self.engine.receive(request, self.now)

    def ask(self, call_id: str, text: str, seed: int) -> None:
        self.send(OpenStream(call_id=call_id, system_prompt=SYSTEM, seed=seed), PushText(call_id=call_id, text=text))
        self.send(StartReply(call_id=call_id, turn_id="r"))

    def step(self) -> bool:
        self.events += self.engine.step(self.now)
        for call_id, stream in self.engine.streams.items():
            for reply in stream.replies:
                if reply.voice is not None:
                    self.voice_tokens[call_id] = list(reply.voice.turn.voice_tokens)
        if self.engine.has_work(self.now):
            return True
        self.now += 0.5
        return self.engine.has_replies

    def run(self, steps: int = 20_000) -> None:
        for _ in range(steps):
            if not self.step():
                return

    def of(self, kind: type, call_id: str) -> list:
        return [event for event in self.events if isinstance(event, kind) and event.call_id == call_id]

    def pcm(self, call_id: str) -> np.ndarray:
        return np.frombuffer(b"".join(event.pcm for event in self.of(AudioDelta, call_id)), "<i2")

    def rows(self, kind: JobKind) -> int:
        return max(rows for made, rows, _ in self.engine.job_times if made is kind)


def assert_same(room: Room, call_id: str, wanted: plain.PlainReply) -> None:
    (finished,) = room.of(ReplyFinished, call_id)
    assert finished.text == wanted.text
    assert room.voice_tokens[call_id] == wanted.voice_tokens
    made = room.pcm(call_id)
    assert len(made) == len(wanted.pcm) > 0
    assert np.abs(made.astype(int) - wanted.pcm).max() <= 2  # of 32768: other shapes round differently


@pytest.fixture(scope="module")
def questions(folder: Path) -> list[str]:
    """Some to which random weights answer with words, not with a tool."""
    words = ["how are you", "where is my order", "what are your hours", "can i pay by card", "good morning", "hello"]
    found = []
    for text in words:
        room = Room(load_checkpoint(folder))
        room.ask("c", text, 1)
        while not room.of(ToolCallRequested, "c") and not room.voice_tokens.get("c") and room.step():
            pass
        if room.voice_tokens.get("c"):
            found.append(text)
        if len(found) == 3:
            break
    return found


def test_calls_that_join_stall_and_leave_speak_as_their_plain_twins(
    checkpoint: Checkpoint, questions: list[str]
) -> None:
    texts = questions
    assert len(texts) == 3
    room = Room(checkpoint)
    room.ask("a", texts[0], seed=1)
    room.ask("gone", texts[1], seed=9)
    room.run(steps=30)
    room.send(Say(call_id="gone", turn_id="s", text="never heard"))
    room.ask("b", texts[1], seed=2)
    room.run(steps=60)
    room.send(CloseStream(call_id="gone"))
    room.ask("c", texts[2], seed=3)
    sentence = "this is the shop."
    room.send(OpenStream(call_id="d", system_prompt=SYSTEM), Say(call_id="d", turn_id="s", text=sentence))
    room.run()
    for call_id, text, seed in (("a", texts[0], 1), ("b", texts[1], 2), ("c", texts[2], 3)):
        wanted = plain.answer(checkpoint, [("system", SYSTEM), ("user", text)], seed, CONFIG)
        assert_same(room, call_id, wanted)
    assert_same(room, "d", plain.say(checkpoint, [("system", SYSTEM)], sentence, CONFIG))
    assert min(room.rows(kind) for kind in (JobKind.PREFILL, JobKind.DECODE, JobKind.VOICE, JobKind.FLOW)) > 1


def test_two_callers_are_heard_as_by_the_plain_twin(checkpoint: Checkpoint) -> None:
    room = Room(checkpoint)
    rng = np.random.default_rng(0)
    speech = {name: rng.normal(0, 3000, 16_000 + 4800 * i).astype(np.int16) for i, name in enumerate(("a", "b"))}
    silence = np.zeros(16_000, np.int16)
    for name, pcm in speech.items():
        room.send(OpenStream(call_id=name, system_prompt=SYSTEM))
        room.send(PushAudio(call_id=name, pcm=pcm.tobytes(), start_sample=0, voiced=True))
        for at in range(0, len(silence), 320):
            piece = silence[at : at + 320].tobytes()
            room.send(PushAudio(call_id=name, pcm=piece, start_sample=len(pcm) + at, voiced=False))
    room.run()
    for name, pcm in speech.items():
        (final,) = [caption for caption in room.of(Caption, name) if caption.is_final]
        segment = np.concatenate([pcm, silence[: 640 * 16]])
        assert final.text == plain.hear(checkpoint, segment)
    assert room.rows(JobKind.ENCODE) == 2


# ------------------------------------------------------------------ a row that fails


def poison_prefill(room: Room) -> None:
    room.engine.runner.llm_cache.values[0][room.engine.streams["bad"].slot] = torch.nan


def poison_decode(room: Room) -> None:
    room.engine.streams["bad"].replies[0].hidden = torch.full((32,), torch.nan)


def poison_voice(room: Room) -> None:
    room.engine.runner.sound.voice_cache.values[0][room.engine.streams["bad"].slot] = torch.nan


def poison_flow(room: Room) -> None:
    reply = room.engine.streams["bad"].replies[0]
    reply.flow.speaker = torch.full_like(reply.flow.speaker, torch.nan)


def poison_vocoder(room: Room) -> None:
    state = room.engine.streams["bad"].replies[0].vocoder_state
    state.source = None if state.source is None else torch.full_like(state.source, torch.nan)


def when(room: Room, phase: str) -> bool:
    """Whether the call "bad" is where that poison bites."""
    replies = room.engine.streams["bad"].replies
    if phase == "prefill":
        return bool(room.engine.streams["bad"].conversation.cached_ids)
    reply = replies[0]
    return {
        "decode": reply.hidden is not None,
        "voice": reply.voice is not None and len(reply.voice.turn.voice_tokens) > 2,
        "flow": reply.voice is not None and len(reply.voice.turn.voice_tokens) > 2,
        "vocoder": reply.is_sounding,
    }[phase]


POISONS = {
    "prefill": poison_prefill,
    "decode": poison_decode,
    "voice": poison_voice,
    "flow": poison_flow,
    "vocoder": poison_vocoder,
}


@pytest.mark.parametrize("place", POISONS)
def test_nan_in_one_row_ends_that_call_and_no_sample_of_the_others_changes(
    checkpoint: Checkpoint, questions: list[str], place: str
) -> None:
    text = questions[0]
    room = Room(checkpoint)
    room.ask("good", text, seed=1)
    room.ask("bad", text, seed=2)
    while not when(room, place):
        assert room.step()
    POISONS[place](room)
    room.run()
    assert [event.call_id for event in room.events if isinstance(event, StreamFailed)] == ["bad"]
    assert_same(room, "good", plain.answer(checkpoint, [("system", SYSTEM), ("user", text)], 1, CONFIG))
    room.ask("next", text, seed=1)  # gets the slot of the failed one
    room.run()
    assert np.abs(room.pcm("next").astype(int) - room.pcm("good")).max() <= 2


@pytest.mark.parametrize("kind", [JobKind.PREFILL, JobKind.DECODE, JobKind.VOICE, JobKind.FLOW, JobKind.ENCODE])
def test_out_of_memory_in_one_row_ends_that_call_only(
    checkpoint: Checkpoint, questions: list[str], kind: JobKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = questions[0]
    room = Room(checkpoint)
    room.ask("good", text, seed=1)
    room.ask("bad", text, seed=2)
    if kind is JobKind.ENCODE:
        speech = np.random.default_rng(1).normal(0, 3000, 16_000).astype("<i2").tobytes()
        for name in ("good", "bad"):
            room.send(PushAudio(call_id=name, pcm=speech, start_sample=0, voiced=True))
    slot = room.engine.streams["bad"].slot
    _run_out_of_memory(monkeypatch, room, kind, slot)
    room.run()
    failures = [event for event in room.events if isinstance(event, StreamFailed)]
    assert [event.call_id for event in failures] == ["bad"] and "no memory left" in failures[0].reason
    assert_same(room, "good", plain.answer(checkpoint, [("system", SYSTEM), ("user", text)], 1, CONFIG))


def _run_out_of_memory(monkeypatch: pytest.MonkeyPatch, room: Room, kind: JobKind, slot: int) -> None:
    """Every pass of that kind that holds the row `slot` fails: those of the LLMs at their end, others before it."""
    runner = room.engine.runner
    modules, segments = runner.checkpoint.modules, room.engine.streams["bad"].ear.segments
    if kind in (JobKind.PREFILL, JobKind.DECODE, JobKind.VOICE):
        backbone = modules.voice_lm.trunk if kind is JobKind.VOICE else modules.llm
        is_prefill = kind is JobKind.PREFILL
        after(
            monkeypatch,
            backbone,
            "_run",
            lambda x, *a: a[-1] and slot in a[-1].slots and (x.shape[1] > 1) >= is_prefill,
        )
    elif kind is JobKind.FLOW:
        before(monkeypatch, modules.flow, "_euler_rows", lambda states, *a: any(s.slot == slot for s in states))
    else:
        before(monkeypatch, runner.hearing, "_next_chunk", lambda segment: segment in segments)


def before(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, fails: Callable[..., bool]) -> None:
    real = getattr(owner, name)

    def run(*args: object) -> object:
        if fails(*args):
            raise torch.OutOfMemoryError("no memory left")
        return real(*args)

    monkeypatch.setattr(owner, name, run)


def after(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, fails: Callable[..., bool]) -> None:
    real = getattr(owner, name)

    def run(*args: object) -> object:
        made = real(*args)
        if fails(*args):
            raise torch.OutOfMemoryError("no memory left")
        return made

    monkeypatch.setattr(owner, name, run)
