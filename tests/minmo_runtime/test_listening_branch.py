"""The caller speaks while a reply is made: the LLM reads it on a fork, the reply never notices, and what is decided
costs nothing that was read before."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from minmo_runtime.api import (
    CancelReply,
    ContextReused,
    DiscardOverlap,
    DuplexPrediction,
    OpenStream,
    PushAudio,
    Say,
    StartReply,
)
from minmo_runtime.config import RuntimeConfig
from minmo_runtime.conversation import AudioVector
from minmo_runtime.hearing import Hearing
from minmo_runtime.listening import heard_so_far
from minmo_runtime.prefill import input_vectors
from minmo_runtime.random_checkpoint import TINY, write_random_checkpoint
from minmo_runtime.reply import ReplyPhase
from minmo_runtime.stream import Stream
from minmo_runtime.weights import Checkpoint, load_checkpoint
from tests.minmo_runtime.test_engine_plain import SYSTEM, Room
from tests.minmo_runtime.test_voice_turns import PROJECTOR, speech

CONFIG = RuntimeConfig(max_streams=2, max_reply_tokens=8, max_voice_tokens=60, draft_probability=1.0)
# A predictor on the LLM's hidden states, as in the paper.
DUPLEX = {"input_size": 128, "hidden_size": 32, "num_heads": 2, "ffn_size": 32, "step_ms": 80}
SENTENCE = "one two three four five six seven eight nine ten."


@pytest.fixture(scope="module", params=[False, True], ids=["bridge", "predictor"])
def folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    dims = {**TINY, "projector": PROJECTOR, **({"duplex": DUPLEX} if request.param else {})}
    return write_random_checkpoint(tmp_path_factory.mktemp("branch"), dims=dims)


@pytest.fixture
def checkpoint(folder: Path) -> Checkpoint:
    return loaded(folder)


def loaded(folder: Path) -> Checkpoint:
    """With an encoder that hears something in any sound."""
    checkpoint = load_checkpoint(folder)
    checkpoint.modules.encoder.ctc["ctc_lo"].bias.data[0] = -9.0
    return checkpoint


@pytest.fixture(autouse=True)
def words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights hear nothing; a segment without words would be noise."""
    monkeypatch.setattr(Hearing, "_ctc_text", lambda self, tokens: "no wait")


def opened(checkpoint: Checkpoint) -> tuple[Room, Stream]:
    room = Room(checkpoint, CONFIG)
    room.send(OpenStream(call_id="c", system_prompt=SYSTEM, seed=1))
    return room, room.engine.streams["c"]


def rest(room: Room) -> None:
    """All that can be done, in no time."""
    now = room.now
    while room.engine.has_work(now):
        room.step()
        room.now = now


def push(room: Room, seconds: float, seed: int, start: int, voiced: bool = True) -> int:
    """Voiced packets of 20 ms, all work done between them."""
    pcm = (speech(seconds, seed)[8000 : 8000 + int(seconds * 16_000)] * 32767).astype("<i2")
    for at in range(0, len(pcm) // 320 * 320, 320):
        piece = pcm[at : at + 320].tobytes()
        room.send(PushAudio(call_id="c", pcm=piece, start_sample=start + at, voiced=voiced))
        rest(room)
    return start + len(pcm) // 320 * 320


def speaking(room: Room) -> None:
    """The agent says a long sentence; its first part is on the line."""
    room.send(Say(call_id="c", turn_id="s", text=SENTENCE))
    rest(room)
    room.now += len(room.pcm("c")) / 24_000 / 2


def voices(positions: list) -> list[AudioVector]:
    return [p for p in positions if isinstance(p, AudioVector)]


def assert_read(room: Room, stream: Stream) -> None:
    """The cache holds what a pass over the whole context gives."""
    llm, cache = room.engine.runner.llm, room.engine.runner.llm_cache
    assert stream.conversation.is_current()
    again = llm.new_cache(1, 600)
    with torch.inference_mode():
        llm(embeds=input_vectors(llm, [stream.conversation.target_ids]), cache=again)
    length = len(stream.conversation.target_ids)
    assert cache.lengths[stream.slot] == length
    for kept, wanted in zip(cache.values, again.values, strict=True):
        torch.testing.assert_close(kept[stream.slot, :, :length], wanted[0, :, :length], atol=1e-4, rtol=1e-4)


def test_words_heard_are_estimated_in_proportion_to_the_sound() -> None:
    assert heard_so_far("one two three four", 50, 100) == "one two"
    assert heard_so_far("one two", 0, 100) == "" == heard_so_far("one two", 5, 0)
    assert heard_so_far("one two", 900, 100) == "one two"


def test_speech_over_the_agent_is_read_on_a_branch_and_the_reply_does_not_notice(checkpoint: Checkpoint) -> None:
    sounds = []
    for speaks_over in (False, True):
        room, stream = opened(loaded(checkpoint.folder))
        speaking(room)
        context = list(stream.conversation.messages)
        if speaks_over:
            push(room, 0.8, 1, 0)
            branch = stream.listening.branch
            assert branch is not None and branch.conversation.is_current()
            assert len(voices(branch.conversation.cached_ids)) >= 6
            said = [message.text for message in branch.conversation.messages if message.role == "assistant"]
            assert said and SENTENCE.startswith(said[0]) and said[0] != SENTENCE
        assert stream.conversation.messages == context
        room.run()
        sounds.append(room.pcm("c"))
    assert len(sounds[0]) == len(sounds[1]) and np.abs(sounds[0].astype(int) - sounds[1]).max() <= 2


def test_a_backchannel_drops_the_branch_and_leaves_no_trace(checkpoint: Checkpoint) -> None:
    room, stream = opened(checkpoint)
    speaking(room)
    push(room, 0.5, 2, 0)
    assert stream.listening.branch is not None
    room.send(DiscardOverlap(call_id="c"))
    room.run()
    assert stream.listening.branch is None and not voices(stream.conversation.target_ids)
    assert_read(room, stream)


def test_what_is_said_over_the_next_sentence_begins_behind_that_one(checkpoint: Checkpoint) -> None:
    room, stream = opened(checkpoint)
    speaking(room)
    clock = push(room, 0.5, 2, 0)
    old = stream.listening.branch
    assert old is not None
    room.now += 10.0  # nobody decided what that was
    room.send(Say(call_id="c", turn_id="s2", text="are you still there, and can you hear me?"))
    rest(room)
    room.now += 0.3
    push(room, 0.5, 3, clock)
    new = stream.listening.branch
    assert new is not None and new is not old
    said = [message.text for message in new.conversation.messages if message.role == "assistant"]
    assert said[0] == SENTENCE


@pytest.mark.parametrize("is_estimate_right", [True, False])
def test_an_interruption_goes_on_from_the_branch(checkpoint: Checkpoint, is_estimate_right: bool) -> None:
    room, stream = opened(checkpoint)
    speaking(room)
    push(room, 0.8, 3, 0)
    branch = stream.listening.branch
    assert branch is not None
    said = branch.conversation.messages[-1].text
    room.engine.runner.hearing.heard_text = lambda _: said if is_estimate_right else "one"  # type: ignore[method-assign]
    read = room.engine.runner.prefill.num_positions
    room.send(CancelReply(call_id="c", turn_id="s", played_samples=8000))
    rest(room)
    overlap = voices(stream.conversation.target_ids)
    assert overlap == voices(branch.conversation.target_ids) and stream.listening.branch is None
    assert_read(room, stream)
    fed = room.engine.runner.prefill.num_positions - read
    assert fed == 0 if is_estimate_right else fed >= len(overlap)
    taken = sum(event.num_positions for event in room.of(ContextReused, "c") if event.source == "branch")
    assert taken > len(overlap) if is_estimate_right else taken < len(overlap)


def test_a_caller_who_goes_on_before_the_first_sample_is_read_once(checkpoint: Checkpoint) -> None:
    room, stream = opened(checkpoint)
    clock = push(room, 0.8, 4, 0)
    room.send(StartReply(call_id="c", turn_id="r"))
    while not stream.replies or stream.replies[0].phase in (ReplyPhase.LISTENING, ReplyPhase.PREFILL):
        assert room.step()
    first = voices(stream.conversation.target_ids)
    pcm = (speech(0.5, 5)[8000:16_000] * 32767).astype("<i2")
    room.send(PushAudio(call_id="c", pcm=pcm.tobytes(), start_sample=clock, voiced=True))
    while stream.ear.segments and stream.ear.segments[0].num_frames_waiting() >= 16 or stream.listening.owes_reading:
        room.step()
    assert not stream.replies[0].is_sounding
    branch = stream.listening.branch
    assert branch is not None and voices(branch.conversation.cached_ids)[: len(first)] == first
    read = room.engine.runner.prefill.num_positions
    room.send(CancelReply(call_id="c", turn_id="r", played_samples=0, reason="false_end"))
    rest(room)
    assert voices(stream.conversation.target_ids) == voices(branch.conversation.target_ids) != first
    assert room.engine.runner.prefill.num_positions == read
    assert_read(room, stream)


@pytest.mark.parametrize("folder", [True], indirect=True, ids=["predictor"])
def test_a_predictor_on_hidden_states_reads_the_same_however_late_the_engine_is(checkpoint: Checkpoint) -> None:
    assert checkpoint.bridges == ()
    found = []
    for works_between in (True, False):
        room, stream = opened(loaded(checkpoint.folder))
        seen: list[torch.Tensor] = []
        predictor = room.engine.runner.predictor
        inputs = predictor._inputs

        def watched(stream: Stream, moment: object, inputs=inputs, seen=seen) -> object:  # type: ignore[no-untyped-def]
            seen.extend(stream.new_frames)
            return inputs(stream, moment)

        predictor._inputs = watched  # type: ignore[method-assign, assignment]
        pcm = (speech(0.9, 6)[8000:22_400] * 32767).astype("<i2")
        for at in range(0, len(pcm), 320):
            room.send(PushAudio(call_id="c", pcm=pcm[at : at + 320].tobytes(), start_sample=at, voiced=True))
            if works_between:
                rest(room)
        rest(room)
        llm = room.engine.runner.llm
        target = stream.conversation.target_ids
        with torch.inference_mode():
            vectors = input_vectors(llm, [target])
            hidden = llm(embeds=vectors)[0]
        places = [place for place, p in enumerate(target) if isinstance(p, AudioVector)]
        wanted = torch.cat([hidden[places], vectors[0, places]], dim=1)
        torch.testing.assert_close(torch.cat(seen), wanted, atol=1e-4, rtol=1e-4)
        found.append([dataclasses.astuple(Chances.of(event)) for event in room.of(DuplexPrediction, "c")])
    assert len(found[0]) == 11 and np.allclose(found[0], found[1], atol=1e-5)


@dataclasses.dataclass
class Chances:
    sample: int
    user_done: float
    user_continues: float

    @classmethod
    def of(cls, event: DuplexPrediction) -> Chances:
        return cls(event.sample, event.user_done, event.user_continues)
