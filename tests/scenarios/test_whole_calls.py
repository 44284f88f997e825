"""Whole calls in virtual time: what the caller hears, what is kept, and what never happens."""

from __future__ import annotations

from agent.floor import TurnTakingConfig
from minmo_runtime import api
from minmo_runtime.fake import FakeLine
from telephony import leg as tel
from tests.scenarios.scene import Scene

NUMBER = FakeLine(text="my order number is 45612")
STORY = FakeLine(text="tell me a story")


def test_call_with_greeting_and_look_up() -> None:
    scene = Scene(NUMBER).answer()
    assert "automated assistant" in scene.heard_turns[0] and "how can i help" in scene.heard_turns[1]
    scene.caller(1.8)
    scene.run_until(lambda: len(scene.heard_turns) == 3)
    assert scene.heard_turns[2] == "order 45612 was shipped it will arrive on wednesday"
    assert [t["state"] for t in scene.keeps("record_tool_call", name="look_up_order")] == ["requested", "done"]
    caller = [row for row in scene.transcript if row["role"] == "caller"]
    assert [row["heard_text"] for row in caller] == ["my order number is 45612"]
    scene.leg.hang_up()
    scene.run(0.1)
    assert scene.keeps("close_call", disposition="completed", ended_by="caller") and scene.is_over


def test_J8_first_word_comes_at_once_and_is_measured_on_the_wire() -> None:
    scene = Scene().answer()
    assert scene.keeps("add_metric", name="first_word_ms")[0]["value"] <= 500


def test_voice_to_voice_is_kept_per_turn() -> None:
    scene = Scene(NUMBER).answer().caller(1.8)
    scene.run_until(lambda: scene.keeps("add_metric", name="voice_to_voice_ms"))
    assert 300 < scene.keeps("add_metric", name="voice_to_voice_ms")[0]["value"] < 1600


def test_P16_L5_notice_is_heard_in_full_although_the_caller_talks_over_it() -> None:
    scene = Scene(NUMBER)
    scene.leg.ring()
    scene.run(0.5).caller(1.5)
    scene.run_until(lambda: scene.keeps("notice_finished"))
    assert scene.heard_turns[0].startswith("you are speaking with an automated assistant")
    assert not scene.commands(tel.Duck) and not scene.commands(tel.Flush)


def test_P7_J7_barge_in_ducks_at_once_stops_and_keeps_what_was_heard() -> None:
    scene = Scene(STORY, NUMBER).answer().caller(1.5)
    scene.run_until(lambda: scene.state == "speaking")
    scene.run(2.0)
    onset = scene.now
    scene.leg.speak(b"")
    scene.caller(1.8)
    ducked = next(at for at, command in scene.sent if isinstance(command, tel.Duck))
    assert ducked - onset <= 0.2
    assert scene.keeps("add_metric", name="stop_ms")[0]["value"] <= 1000
    row = next(row for row in scene.transcript if row.get("was_interrupted"))
    assert 0 < len(row["heard_text"].split()) < len(row["generated_text"].split()) or row["cut_offset_samples"] > 0
    assert row["generated_text"].startswith(row["heard_text"]) and row["heard_text"]
    cancel = scene.requests(api.CancelReply)[0]
    assert cancel.reason == "interrupt"
    assert cancel.played_samples == row["cut_offset_samples"] * 3  # leg 8 kHz, output 24 kHz
    scene.run_until(lambda: any("45612" in text for text in scene.heard_turns))


def test_P10_L4_backchannel_does_not_stop_agent_and_it_goes_on_at_the_exact_sample() -> None:
    scene = Scene(STORY, FakeLine(text="mm hm", kind="backchannel")).answer().caller(1.5)
    scene.run_until(lambda: scene.state == "speaking")
    scene.run(1.0).caller(0.5)
    scene.run_until(lambda: any(t.endswith("word29") for t in scene.heard_turns), 15)
    assert scene.commands(tel.Duck) and scene.commands(tel.Resume)
    assert not scene.requests(api.CancelReply)
    assert scene.requests(api.DiscardOverlap)
    assert scene.keeps("append_turn", intent="backchannel")[0]["heard_text"] == "mm hm"


def counted(scene: Scene) -> tuple[float, float]:
    scene.leg.hang_up()
    scene.run(0.1)
    resumed, pauses = (scene.keeps("add_metric", name=name) for name in ("overlaps_resumed", "phantom_pauses"))
    return resumed[0]["value"], pauses[0]["value"]


def test_voice_that_was_no_bid_for_the_floor_is_counted_and_so_is_a_pause_it_made() -> None:
    for pause_after_s, num_pauses in ((1.0, 0), (0.1, 1)):
        cough = FakeLine(text="", kind="noise")
        scene = Scene(STORY, cough, config=TurnTakingConfig(pause_after_s=pause_after_s)).answer().caller(1.5)
        scene.run_until(lambda scene=scene: scene.state == "speaking")
        scene.run(1.0).caller(0.15, and_silence=2.0)
        assert len(scene.commands(tel.Pause)) == num_pauses and not scene.requests(api.CancelReply)
        assert counted(scene) == (1, num_pauses)


def test_interruption_is_no_phantom_pause() -> None:
    scene = Scene(STORY, FakeLine(text="no wait stop")).answer().caller(1.5)
    scene.run_until(lambda: scene.state == "speaking")
    scene.run(1.0).caller(1.2, and_silence=1.0)
    assert scene.requests(api.CancelReply) and counted(scene) == (0, 0)


def test_cough_does_not_stop_agent() -> None:
    scene = Scene(STORY, FakeLine(text="", kind="noise")).answer().caller(1.5)
    scene.run_until(lambda: scene.state == "speaking")
    scene.run(1.0).caller(0.15)
    scene.run_until(lambda: any(t.endswith("word29") for t in scene.heard_turns), 15)
    assert not scene.requests(api.CancelReply)


def test_false_end_discards_the_draft() -> None:
    scene = Scene(NUMBER, STORY, first_audio_ms=800).answer().caller(1.8)
    scene.run_until(lambda: scene.state == "thinking")
    scene.caller(1.0)
    assert [c.reason for c in scene.requests(api.CancelReply)] == ["false_end"]
    assert scene.keeps("journal_append", name="draft_discarded")
    scene.run_until(lambda: len(scene.heard_turns) == 3, 20)
    caller = [row for row in scene.transcript if row["role"] == "caller"]
    assert len(caller) == 1 and caller[0]["heard_text"].startswith("my order number is 45612")


def test_P12_stalled_model_gets_a_filler_after_one_and_a_half_seconds() -> None:
    scene = Scene(NUMBER, stalls_ms={0: 3000}).answer().caller(1.8)
    scene.run_until(lambda: scene.state == "thinking")
    took = scene.run_until(lambda: scene.keeps("journal_append", name="filler"))
    assert 1.4 <= took <= 1.6
    scene.run_until(lambda: any("45612" in text for text in scene.heard_turns))
    assert not scene.keeps("add_defect")


def test_dead_silent_model_is_given_up_after_four_seconds_as_a_defect() -> None:
    scene = Scene(NUMBER, stalls_ms={0: 30_000}).answer().caller(1.8)
    scene.run_until(lambda: scene.state == "thinking")
    took = scene.run_until(lambda: scene.keeps("add_defect"))
    assert 3.9 <= took <= 4.2
    scene.run_until(lambda: any("something went wrong" in text for text in scene.heard_turns))
    assert scene.requests(api.CancelReply)[0].reason in ("recover", "false_end")


def test_refused_transfer_is_said_and_a_callback_is_stored() -> None:
    scene = Scene(FakeLine(text="i want a person"), handoff_uri="sip:desk@127.0.0.1")
    scene.leg.refer_answer = tel.ReferResult(leg_id="l1", sip_status=603, reason="Decline")
    scene.answer().caller(1.3)
    scene.run_until(lambda: scene.leg.referred_to)
    assert scene.leg.referred_to == "sip:desk@127.0.0.1"
    scene.run_until(lambda: any("call you back" in text for text in scene.heard_turns))
    assert "603" in scene.keeps("request_callback")[0]["reason"]


def test_accepted_transfer_ends_the_call_as_transferred() -> None:
    scene = Scene(FakeLine(text="i want a person"), handoff_uri="sip:desk@127.0.0.1").answer().caller(1.3)
    scene.run_until(lambda: scene.is_over)
    assert scene.keeps("close_call", disposition="transferred", cause="transferred")


def test_caller_who_leaves_before_the_outcome_of_the_transfer_is_told_is_kept_as_that() -> None:
    scene = Scene(FakeLine(text="i want a person"), handoff_uri="sip:desk@127.0.0.1")
    scene.leg.refer_answer = None
    scene.answer().caller(1.3)
    scene.run_until(lambda: scene.leg.referred_to)
    scene.run(0.5)
    scene.leg.hang_up()
    scene.run(0.1)
    (closed,) = scene.keeps("close_call")
    assert (closed["disposition"], closed["cause"], closed["ended_by"]) == (
        "transferred_unknown", "transferred_unknown", "caller",
    )  # fmt: skip
    assert scene.keeps("journal_append", name="refer_result", target="sip:desk@127.0.0.1")
    assert not scene.keeps("request_callback")


def test_without_a_handoff_the_caller_is_told_and_called_back() -> None:
    scene = Scene().answer()
    scene.leg.press("0")
    scene.run_until(lambda: any("call you back" in text for text in scene.heard_turns))
    assert scene.keeps("request_callback")


def test_order_number_by_keypad_stops_the_agent_and_is_answered() -> None:
    scene = Scene().answer()
    scene.leg.press("45612")
    scene.run_until(lambda: any("45612 was shipped" in text for text in scene.heard_turns))
    assert scene.requests(api.PushText)[0].text == "my order number is 45612"
    assert scene.keeps("append_turn", source="keypad")


def test_incomplete_number_is_asked_again() -> None:
    scene = Scene().answer()
    scene.leg.press("456#")
    scene.run_until(lambda: any("five digits" in text for text in scene.heard_turns))


def test_two_turns_not_understood_offer_the_keypad() -> None:
    mumble = FakeLine(text="brr", confidence=0.1)
    scene = Scene(mumble, mumble).answer().caller(1.0)
    scene.run_until(lambda: any("did not understand" in text for text in scene.heard_turns))
    scene.caller(1.0)
    scene.run_until(lambda: any("keypad" in text for text in scene.heard_turns))


def test_silent_caller_is_asked_twice_and_then_the_call_ends() -> None:
    scene = Scene().answer()
    took = scene.run_until(lambda: any("still there" in row.get("generated_text", "") for row in scene.transcript))
    assert 6.9 <= took <= 7.5
    scene.run_until(lambda: scene.is_over, 40)
    assert scene.keeps("close_call", cause="silence", ended_by="agent")
    assert "i can not hear you. goodbye." in scene.heard_turns


def test_longest_call_ends_with_a_goodbye() -> None:
    scene = Scene(STORY, config=TurnTakingConfig(max_call_s=12.0)).answer().caller(1.5)
    scene.run_until(lambda: scene.is_over, 20)
    assert scene.keeps("close_call", cause="max_length")
    assert "our time is over. please call again. goodbye." in scene.heard_turns


def test_bad_tool_arguments_are_refused_and_the_model_is_told() -> None:
    scene = Scene(FakeLine(text="the wrong one")).answer().caller(1.2)
    scene.run_until(lambda: scene.keeps("record_tool_call", state="refused"))
    assert scene.requests(api.ToolResult)[0].content == "status not_found"
    scene.run_until(lambda: any("can not find it" in text for text in scene.heard_turns))


def test_side_effect_waits_until_the_reply_was_heard() -> None:
    scene = Scene(FakeLine(text="move my delivery")).answer().caller(1.2)
    scene.run_until(lambda: scene.state == "speaking")
    assert not scene.committed
    scene.run_until(lambda: scene.committed)
    assert scene.state == "listening" and scene.committed[0].name == "change_delivery"


def test_P8_tool_of_a_cancelled_reply_never_runs() -> None:
    scene = Scene(FakeLine(text="move my delivery"), FakeLine(text="no wait stop")).answer().caller(1.2)
    scene.run_until(lambda: scene.state == "speaking")
    scene.run(0.5).caller(1.2, and_silence=6.0)
    assert not scene.committed
    assert scene.keeps("record_tool_call", name="change_delivery", state="cancelled")


def test_hang_up_waits_until_the_goodbye_was_heard() -> None:
    scene = Scene(FakeLine(text="bye")).answer().caller(0.8)
    scene.run_until(lambda: scene.is_over)
    assert scene.heard_turns[-1] == "thank you for calling goodbye"
    assert scene.keeps("close_call", cause="agent_goodbye", ended_by="agent")


def test_goodbye_that_the_caller_talks_over_does_not_hang_up() -> None:
    scene = Scene(FakeLine(text="bye"), STORY).answer().caller(0.8)
    scene.run_until(lambda: scene.state == "speaking")
    scene.run(0.9).caller(1.5)
    scene.run_until(lambda: any("word0" in row.get("generated_text", "") for row in scene.transcript))
    assert not scene.commands(tel.Hangup)


def test_lost_engine_leaves_the_call_up_and_the_answer_is_made_by_the_next_one() -> None:
    scene = Scene(NUMBER, fail_at_reply=0).answer().caller(1.8)
    scene.run_until(lambda: scene.keeps("add_defect", kind="engine_lost"))
    scene.run_until(lambda: scene.keeps("journal_append", name="filler"), 1.0)
    scene.script = scene.script.__class__(rules=scene.script.rules)
    scene.engine_back_in = 2.0
    scene.run_until(lambda: any("45612 was shipped" in text for text in scene.heard_turns))
    reopened = scene.requests(api.OpenStream)[1]
    assert reopened.history[0][0] == "assistant" and all("45612" not in text for _, text in reopened.history)
    assert not scene.commands(tel.Hangup)


def test_our_own_echo_does_not_stop_the_agent() -> None:
    scene = Scene(STORY)
    scene.leg = scene.leg.__class__("l1", echo_gain=0.2, echo_delay_ms=60)
    scene.answer().caller(1.5)
    scene.run_until(lambda: any(t.endswith("word29") for t in scene.heard_turns), 20)
    assert not scene.requests(api.CancelReply)
