"""A reply written ahead: the same as one that is not, nothing of it leaves early, and it goes without a trace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from minmo_runtime import plain
from minmo_runtime.api import (
    AudioDelta,
    CancelReply,
    DraftEnded,
    DuplexPrediction,
    OpenStream,
    PushText,
    ReplyFinished,
    RuntimeEvent,
    Say,
    StartReply,
    TextDelta,
    ToolCallRequested,
)
from minmo_runtime.config import RuntimeConfig
from minmo_runtime.random_checkpoint import write_random_checkpoint
from minmo_runtime.reply import ReplyPhase
from minmo_runtime.scheduler import JobKind
from minmo_runtime.stream import Stream
from minmo_runtime.weights import Checkpoint, load_checkpoint
from tests.minmo_runtime.test_engine import Clock, script_tokens
from tests.minmo_runtime.test_engine_plain import SYSTEM, Room, assert_same

CONFIG = RuntimeConfig(max_streams=3, max_reply_tokens=11, max_voice_tokens=60, sound_rows=3, draft_probability=0.2)
SPOKEN = (TextDelta, AudioDelta, ToolCallRequested, ReplyFinished)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def checkpoint(folder: Path) -> Checkpoint:
    return load_checkpoint(folder)


@pytest.fixture(scope="module")
def question(folder: Path) -> str:
    """One to which random weights answer with words, not with a tool."""
    checkpoint = load_checkpoint(folder)
    words = ["how are you", "where is my order", "what are your hours", "can i pay by card", "good morning", "hello"]
    return next(text for text in words if len(answer(checkpoint, text).voice_tokens) > 10)


def answer(checkpoint: Checkpoint, text: str) -> plain.PlainReply:
    return plain.answer(checkpoint, [("system", SYSTEM), ("user", text)], 1, CONFIG)


def hears(room: Room, text: str, user_done: float = 0.3) -> Stream:
    """The open user turn is `text` so far, and may be over."""
    stream = room.engine.streams["c"]
    stream.receive(PushText(call_id="c", text=text), room.now)
    stream.predicted(
        DuplexPrediction(call_id="c", sample=0, user_done=user_done, user_continues=1 - user_done), room.now
    )
    return stream


def opened(checkpoint: Checkpoint, config: RuntimeConfig = CONFIG) -> Room:
    room = Room(checkpoint, config)
    room.send(OpenStream(call_id="c", system_prompt=SYSTEM, seed=1))
    return room


def start(room: Room, turn_id: str = "r") -> None:
    room.send(StartReply(call_id="c", turn_id=turn_id))


def outcomes(room: Room) -> list[str]:
    return [event.outcome for event in room.of(DraftEnded, "c")]


def rest(room: Room) -> None:
    """Until nothing can be done."""
    while room.engine.has_work(room.now):
        room.step()


@pytest.mark.parametrize("num_jobs", [0, 1, 2, 4, 9, 1000])
def test_a_committed_draft_is_the_reply_without_a_draft(checkpoint: Checkpoint, question: str, num_jobs: int) -> None:
    """Wherever the decision finds it: not begun, in its prefill, in the middle of its text, complete."""
    room = opened(checkpoint)
    stream = hears(room, question)
    for _ in range(num_jobs):
        room.step()
    assert not any(isinstance(event, SPOKEN) for event in room.events)
    draft = stream.drafting.reply
    assert draft is not None and draft.voice is None or not draft.voice.turn.voice_tokens
    start(room)
    room.run()
    assert_same(room, "c", answer(checkpoint, question))
    assert [(e.outcome, e.turn_id) for e in room.of(DraftEnded, "c")] == [("committed", "r")]
    assert "".join(delta.text for delta in room.of(TextDelta, "c")) == room.of(ReplyFinished, "c")[0].text
    assert [m.text for m in stream.conversation.messages[1:]] == [question, room.of(ReplyFinished, "c")[0].text.strip()]


def test_after_a_complete_draft_only_the_voice_is_left_to_do(checkpoint: Checkpoint, question: str) -> None:
    kinds: dict[bool, list[JobKind]] = {}
    for is_drafted in (False, True):
        room = opened(checkpoint)
        stream = hears(room, question, user_done=0.3 if is_drafted else 0.1)
        rest(room)
        assert (stream.drafting.reply is not None) == is_drafted
        room.engine.job_times.clear()
        start(room)
        while not room.of(AudioDelta, "c"):
            room.step()
        kinds[is_drafted] = [kind for kind, _, _ in room.engine.job_times]
    assert {JobKind.PREFILL, JobKind.DECODE} <= set(kinds[False])
    assert set(kinds[True]) == {JobKind.VOICE, JobKind.FLOW, JobKind.VOCODE}


def test_a_draft_for_other_words_is_thrown_away_and_leaves_no_trace(checkpoint: Checkpoint, question: str) -> None:
    room = opened(checkpoint)
    stream = hears(room, "good")
    rest(room)
    before = stream.drafting.reply
    hears(room, question, user_done=0.0)  # the caller goes on
    rest(room)
    assert before is not None and stream.drafting.reply is None and outcomes(room) == ["discarded"]
    assert [m.role for m in stream.conversation.messages] == ["system"] and stream.conversation.is_current()
    start(room)
    room.run()
    assert_same(room, "c", answer(checkpoint, question))


def test_the_next_pause_gets_a_draft_of_its_own(checkpoint: Checkpoint, question: str) -> None:
    room = opened(checkpoint)
    for text in ("good", "good morning how", question):
        hears(room, text)
        rest(room)
        hears(room, text)  # the same words: the same draft
        rest(room)
    start(room)
    room.run()
    assert outcomes(room) == ["discarded", "discarded", "committed"]
    assert_same(room, "c", answer(checkpoint, question))


def test_words_that_change_with_the_decision_itself_are_answered_anew(checkpoint: Checkpoint, question: str) -> None:
    room = opened(checkpoint)
    stream = hears(room, "good")
    rest(room)
    stream.receive(PushText(call_id="c", text=question), room.now)
    start(room)
    room.run()
    assert outcomes(room) == ["discarded"]
    assert_same(room, "c", answer(checkpoint, question))


def scripted(checkpoint: Checkpoint, tokens: str) -> Clock:
    clock = Clock(opened(checkpoint).engine)
    script_tokens(clock, tokens)
    return clock


@pytest.mark.parametrize("line", ["<tool_call>hang_up</tool_call>", "goodbye.<tool_call>hang_up</tool_call>"])
def test_no_tool_is_asked_for_before_the_draft_is_spoken(checkpoint: Checkpoint, line: str) -> None:
    clock = scripted(checkpoint, line)
    stream = hears(clock, "bye")  # type: ignore[arg-type]
    clock.run(lambda: not clock.engine.has_work(clock.now))
    draft = stream.drafting.reply
    assert draft is not None and draft.wanted_tool == ("hang_up", {})
    assert draft.phase is (ReplyPhase.SPEAKING if draft.text else ReplyPhase.TOOL)
    assert not clock.of(ToolCallRequested) and not clock.of(TextDelta)
    clock.send(StartReply(call_id="c", turn_id="r"))
    clock.run()
    (wanted,) = clock.of(ToolCallRequested)
    assert (wanted.turn_id, wanted.name, wanted.tool_call_id) == ("r", "hang_up", "c/r/1")


def test_a_tool_of_a_draft_that_was_thrown_away_is_never_asked_for(checkpoint: Checkpoint) -> None:
    clock = scripted(checkpoint, "<tool_call>hang_up</tool_call>")
    stream = hears(clock, "bye")  # type: ignore[arg-type]
    clock.run(lambda: not clock.engine.has_work(clock.now))
    stream.receive(PushText(call_id="c", text="bye the way where is my order"), clock.now)
    clock.run(lambda: not clock.engine.has_work(clock.now))
    assert not clock.of(ToolCallRequested) and clock.of(DraftEnded)[0].outcome == "discarded"
    assert "hang_up" not in str(stream.conversation.messages)


def say(room: Room) -> None:
    room.send(Say(call_id="c", turn_id="s", text="are you still there?"))


def cancel(room: Room) -> None:
    start(room, "early")
    room.send(CancelReply(call_id="c", turn_id="early", played_samples=0, reason="false_end"))


@pytest.mark.parametrize("disturb", [say, cancel])
def test_whatever_else_takes_the_context_ends_the_draft(
    checkpoint: Checkpoint, question: str, disturb: Callable[[Room], None]
) -> None:
    room = opened(checkpoint)
    stream = hears(room, question)
    rest(room)
    disturb(room)
    assert stream.drafting.reply is None
    room.run()
    room.events.clear()
    start(room)
    room.run()
    assert room.of(ReplyFinished, "c") and question in [m.text for m in stream.conversation.messages]
    assert [m.role for m in stream.conversation.messages].count("user") == 1


def test_a_false_end_gives_the_words_back_and_may_be_drafted_again(checkpoint: Checkpoint, question: str) -> None:
    room = opened(checkpoint)
    stream = hears(room, question)
    rest(room)
    start(room)
    room.step()
    room.send(CancelReply(call_id="c", turn_id="r", played_samples=0, reason="false_end"))
    rest(room)
    assert stream.ear.heard_so_far(overlap=False) == question
    hears(room, question)
    rest(room)
    room.events.clear()
    start(room, "again")
    room.run()
    assert outcomes(room) == ["committed"]
    assert room.of(ReplyFinished, "c")[0].text == answer(checkpoint, question).text


@pytest.mark.parametrize(
    ("probability", "user_done", "is_drafted"), [(0.2, 0.2, False), (0.2, 0.21, True), (1, 1, False)]
)
def test_the_threshold_is_a_setting(
    checkpoint: Checkpoint, probability: float, user_done: float, is_drafted: bool
) -> None:
    room = opened(checkpoint, RuntimeConfig(max_streams=1, draft_probability=probability))
    assert (hears(room, "hello", user_done).drafting.reply is not None) == is_drafted


def test_nothing_is_drafted_without_words_or_while_the_agent_speaks(checkpoint: Checkpoint) -> None:
    room = opened(checkpoint)
    assert hears(room, "").drafting.reply is None
    say(room)
    assert hears(room, "hello").drafting.reply is None
    room.run()
    room.engine.streams["c"].playback_end_s = room.now + 1.0
    assert hears(room, "hello").drafting.reply is None


def test_a_draft_makes_no_other_call_wait(checkpoint: Checkpoint, question: str) -> None:
    """Its jobs come last; another call's first words never share a prefill with it."""
    room = opened(checkpoint)
    hears(room, question)
    room.ask("b", question, seed=1)
    assert room.engine.has_work(room.now)
    job = room.engine.scheduler.pick(room.engine.streams.values(), room.now)
    assert job is not None and [s.call_id for s in job.streams] == ["b"]
    while not room.of(ReplyFinished, "b"):
        job = room.engine.scheduler.pick(room.engine.streams.values(), room.now)
        assert (
            job is None
            or job.streams[0].call_id == "b"
            or not room.engine.scheduler.ready(room.engine.streams["b"], room.now)
        )
        room.step()
    wanted = answer(checkpoint, question)
    assert_same(room, "b", wanted)


def test_what_a_draft_owes_is_delivered_although_no_job_follows(checkpoint: Checkpoint) -> None:
    clock = scripted(checkpoint, "<tool_call>hang_up</tool_call>")
    hears(clock, "bye")  # type: ignore[arg-type]
    clock.run(lambda: not clock.engine.has_work(clock.now))
    made: list[RuntimeEvent] = clock.engine.receive(StartReply(call_id="c", turn_id="r"), clock.now)
    assert clock.engine.has_work(clock.now)
    made += clock.engine.step(clock.now)
    assert [type(event) for event in made] == [DraftEnded, ToolCallRequested]
