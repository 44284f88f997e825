"""The fake runtime is deterministic and follows its script on the caller's clock."""

from __future__ import annotations

from minmo_runtime.api import (
    AudioDelta,
    CancelReply,
    Caption,
    DuplexPrediction,
    OpenStream,
    PushAudio,
    ReplyFinished,
    ReplyTruncated,
    RuntimeEvent,
    Say,
    StartReply,
    StreamFailed,
)
from minmo_runtime.fake import FakeLine, FakeRule, FakeScript, FakeStream

PACKET = 320


def open_stream(script: FakeScript) -> FakeStream:
    return FakeStream(OpenStream(call_id="c", system_prompt="p"), script)


def push(stream: FakeStream, milliseconds: int, voiced: bool) -> list[RuntimeEvent]:
    events: list[RuntimeEvent] = []
    for _ in range(milliseconds // 20):
        events += stream.receive(
            PushAudio(call_id="c", pcm=bytes(2 * PACKET), start_sample=stream.sample, voiced=voiced)
        )
    return events


def of(events: list[RuntimeEvent], kind: type) -> list:
    return [e for e in events if isinstance(e, kind)]


def test_same_requests_give_same_events() -> None:
    def run() -> list[RuntimeEvent]:
        stream = open_stream(
            FakeScript(lines=(FakeLine(text="hello there"),), rules=(FakeRule(pattern="hello", text="hi you."),))
        )
        events = push(stream, 1000, True) + push(stream, 800, False)
        events += stream.receive(StartReply(call_id="c", turn_id="t"))
        return events + push(stream, 2000, False)

    assert run() == run()


def test_a_voiced_segment_becomes_a_final_caption_after_the_hangover() -> None:
    stream = open_stream(FakeScript(lines=(FakeLine(text="where is my order"),)))
    events = push(stream, 1000, True) + push(stream, 620, False)
    assert not [c for c in of(events, Caption) if c.is_final]
    (final,) = [c for c in of(push(stream, 40, False), Caption) if c.is_final]
    assert final.text == "where is my order" and (final.start_sample, final.end_sample) == (0, 16000)


def test_user_done_rises_only_after_a_complete_line() -> None:
    for is_complete in (True, False):
        stream = open_stream(FakeScript(lines=(FakeLine(text="four five six", is_complete=is_complete),)))
        events = push(stream, 800, True) + push(stream, 2000, False)
        assert any(p.user_done > 0.5 for p in of(events, DuplexPrediction)) is is_complete


def test_overlap_is_marked_and_told_apart() -> None:
    lines = (FakeLine(text="mm hm", kind="backchannel"), FakeLine(text="no wait"))
    stream = open_stream(FakeScript(lines=lines))
    stream.receive(Say(call_id="c", turn_id="t", text=" ".join(["word"] * 30)))
    push(stream, 400, False)
    first = push(stream, 480, True) + push(stream, 700, False)
    second = push(stream, 480, True) + push(stream, 100, False)
    assert max(p.backchannel for p in of(first, DuplexPrediction)) > 0.5
    assert max(p.interrupt for p in of(first, DuplexPrediction)) < 0.5
    assert max(p.interrupt for p in of(second, DuplexPrediction)) > 0.5
    assert all(c.during_reply for c in of(first + second, Caption))


def test_what_was_cut_is_kept_by_whole_words_and_the_overlap_opens_the_next_turn() -> None:
    stream = open_stream(FakeScript(lines=(FakeLine(text="stop please"),), word_ms=300))
    stream.receive(Say(call_id="c", turn_id="t", text="one two three four five six seven eight"))
    push(stream, 400, False)
    push(stream, 700, True)
    push(stream, 700, False)
    (cut,) = stream.receive(CancelReply(call_id="c", turn_id="t", played_samples=24 * 950))
    assert isinstance(cut, ReplyTruncated) and cut.heard_text == "one two three"
    assert stream.context[-1] == ("assistant", "one two three")
    stream.receive(StartReply(call_id="c", turn_id="u"))
    assert stream.context[-1] == ("user", "stop please")


def test_a_stall_delays_the_first_audio_and_a_failure_ends_the_stream() -> None:
    stream = open_stream(FakeScript(stalls_ms={0: 3000}, fail_at_reply=1))
    stream.receive(StartReply(call_id="c", turn_id="t"))
    assert not of(push(stream, 3000, False), AudioDelta)
    assert of(push(stream, 300, False), AudioDelta)
    push(stream, 3000, False)
    assert of(stream.receive(StartReply(call_id="c", turn_id="u")), StreamFailed)
    assert push(stream, 100, False) == []


def test_audio_length_follows_the_text() -> None:
    stream = open_stream(FakeScript(word_ms=320))
    stream.receive(Say(call_id="c", turn_id="t", text="a b c d"))
    (finished,) = of(push(stream, 4000, False), ReplyFinished)
    assert finished.num_samples == 4 * 320 * 24
