"""A caller who puts us on hold hears nothing: what time decides waits, what is being said goes on at its sample, what
was not heard is not in the record. In virtual time; users.md L9, J12."""

from __future__ import annotations

import pytest

from agent.floor import TurnTakingConfig
from minmo_runtime import api
from minmo_runtime.fake import FakeLine
from telephony import leg as tel
from tests.scenarios.scene import RATE_HZ, Scene, tone

NUMBER = FakeLine(text="my order number is 45612")
STORY = FakeLine(text="tell me a story")


@pytest.mark.parametrize("by", ["caller", "agent"])
def test_L9_caller_who_holds_us_for_three_minutes_is_neither_asked_nor_hung_up_on(by: str) -> None:
    scene = Scene(NUMBER).answer()
    scene.run(6.0)  # almost the reprompt
    num_turns = len(scene.transcript)
    scene.leg._set_held(True, by)
    scene.run(180.0)
    assert len(scene.transcript) == num_turns and not scene.commands(tel.Hangup) and scene.state == "listening"
    scene.leg._set_held(False, by)
    scene.run(0.5)
    assert len(scene.transcript) == num_turns  # the second that was left is left still
    scene.caller(1.8)
    scene.run_until(lambda: any("45612 was shipped" in text for text in scene.heard_turns))
    assert [keep["by"] for keep in scene.keeps("journal_append", name="hold")] == [by]
    assert scene.keeps("journal_append", name="unhold")


def test_silence_of_the_caller_counts_again_after_the_hold() -> None:
    scene = Scene().answer()
    scene.run(4.0)
    scene.leg.hold()
    scene.run(30.0)
    scene.leg.hold(False)
    took = scene.run_until(lambda: any("still there" in text for text in scene.heard_turns))
    assert 2.9 <= took <= 4.5  # 7 s of silence in which we could be heard, less those before the hold, and its words


def test_J12_sentence_stops_at_the_sample_and_goes_on_there_and_nothing_of_it_is_lost_or_counted_twice() -> None:
    def heard_story(hold_s: float) -> tuple[Scene, bytes]:
        scene = Scene(STORY).answer().caller(1.5)
        scene.run_until(lambda: scene.state == "speaking")
        scene.run(2.0)
        before = len(scene.leg.heard)
        if hold_s:
            scene.leg.hold()
            scene.run(hold_s)
            assert not any(scene.leg.heard[before:])  # nothing leaves meanwhile
            scene.leg.hold(False)
        after = len(scene.leg.heard)
        scene.run(8.0)
        return scene, scene.leg.heard[:before] + scene.leg.heard[after:]

    through, held = heard_story(0.0), heard_story(20.0)
    assert held[1][: 2 * 12 * RATE_HZ] == through[1][: 2 * 12 * RATE_HZ] and any(held[1][-2 * RATE_HZ :])
    for scene, _ in (through, held):
        scene.run_until(lambda scene=scene: any(text.endswith("word29") for text in scene.heard_turns), 15)
    assert held[0].heard_turns == through[0].heard_turns and not held[0].keeps("add_defect")
    assert not held[0].requests(api.CancelReply)


def test_what_was_not_heard_before_the_hang_up_on_hold_is_not_in_the_record() -> None:
    scene = Scene(STORY).answer().caller(1.5)
    scene.run_until(lambda: scene.state == "speaking")
    scene.run(2.0)
    scene.leg.hold()
    scene.run(30.0)
    scene.leg.hang_up()
    scene.run(0.1)
    (row,) = [row for row in scene.transcript if row.get("generated_text", "").startswith("word0")]
    assert 0 < len(row["heard_text"].split()) < 12 and scene.keeps("close_call", disposition="completed")


def test_answer_that_is_owed_gets_no_filler_on_hold_and_is_said_at_resume() -> None:
    scene = Scene(NUMBER, first_audio_ms=800).answer().caller(1.8)
    scene.run_until(lambda: scene.state == "thinking")
    scene.leg.hold()
    scene.run(20.0)
    assert scene.state == "thinking" and not scene.keeps("journal_append", name="filler")
    assert not scene.keeps("add_defect")
    scene.leg.hold(False)
    scene.run_until(lambda: any("45612 was shipped" in text for text in scene.heard_turns), 8)
    assert not scene.keeps("add_metric", name="voice_to_voice_ms")  # it would measure the hold


def test_half_a_number_on_the_keypad_waits_for_its_rest() -> None:
    scene = Scene().answer()
    scene.leg.press("456")
    scene.run(1.0)
    scene.leg.hold()
    scene.run(15.0)
    scene.leg.hold(False)
    scene.run(0.2)
    scene.leg.press("12")
    scene.run_until(lambda: any("45612 was shipped" in text for text in scene.heard_turns))


def test_music_on_hold_is_no_speech() -> None:
    scene = Scene(NUMBER, STORY).answer()
    scene.leg.hold()
    scene.caller(8.0, and_silence=3.0)
    assert scene.state == "listening" and not scene.requests(api.StartReply)
    assert not any(any(push.pcm) or push.voiced for push in pushed_on_hold(scene))


def pushed_on_hold(scene: Scene) -> list[api.PushAudio]:
    """What the runtime gets from now on; the scene itself keeps no audio."""
    pushed: list[api.PushAudio] = []
    assert scene.stream is not None
    receive = scene.stream.receive

    def watched(request: api.RuntimeRequest) -> list[api.RuntimeEvent]:
        if isinstance(request, api.PushAudio):
            pushed.append(request)
        return list(receive(request))

    scene.stream.receive = watched  # type: ignore[method-assign]
    scene.leg.speak(tone(2.0))
    scene.run(1.0)
    assert len(pushed) > 20  # its clock goes on
    return pushed


def test_the_longest_call_is_not_made_longer_by_a_hold_and_nothing_is_said_to_nobody() -> None:
    scene = Scene(config=TurnTakingConfig(max_call_s=30.0)).answer()
    scene.leg.hold()
    scene.run_until(lambda: scene.is_over, 30)
    assert scene.keeps("close_call", cause="max_length")
    assert not any("our time is over" in row.get("generated_text", "") for row in scene.transcript)


def test_holds_that_are_over_count_to_the_longest_call() -> None:
    scene = Scene(NUMBER, config=TurnTakingConfig(max_call_s=30.0)).answer()
    began = scene.now
    scene.leg.hold()
    scene.run(15.0)
    scene.leg.hold(False)
    scene.run_until(lambda: scene.is_over, 30)
    assert scene.keeps("close_call", cause="max_length") and scene.now - began < 30.0


def test_goodbye_that_is_held_waits_and_a_finished_one_ends_the_call() -> None:
    scene = Scene(FakeLine(text="bye")).answer().caller(0.8)
    scene.run_until(lambda: scene.state == "speaking")
    scene.leg.hold()
    scene.run(40.0)
    assert not scene.commands(tel.Hangup)
    scene.leg.hold(False)
    scene.run_until(lambda: scene.is_over)
    assert scene.heard_turns[-1] == "thank you for calling goodbye"
