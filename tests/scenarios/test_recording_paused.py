"""What is not to be kept: the recording pauses by the agent's own tool or by a supervisor, at once."""

from __future__ import annotations

from agent.events import RecordingWanted
from minmo_runtime.fake import FakeLine
from telephony import leg as tel
from tests.scenarios.scene import Scene


def test_the_agents_tool_pauses_the_recording_before_the_caller_is_asked_and_lets_it_go_on() -> None:
    scene = Scene(FakeLine(text="i pay by card"), FakeLine(text="it is paid")).answer().caller(1.2)
    scene.run_until(lambda: scene.keeps("pause_recording"))
    (paused,) = scene.keeps("pause_recording")
    assert {command.item_id for command in scene.commands(tel.Play)} == {"a1", "a2"}  # it was not asked for yet
    assert paused["by"] == "agent" and 0 <= scene.call.context.sample - paused["sample"] <= 160
    scene.run_until(lambda: any("card number" in text for text in scene.heard_turns))
    scene.caller(1.2)
    scene.run_until(lambda: scene.keeps("go_on_recording"))
    (went_on,) = scene.keeps("go_on_recording")
    assert went_on["by"] == "agent" and went_on["sample"] > paused["sample"]
    states = [(k["name"], k["state"]) for k in scene.keeps("record_tool_call")]
    assert ("pause_recording", "done") in states and ("go_on_recording", "done") in states


def test_a_supervisor_pauses_it_at_the_very_sample() -> None:
    scene = Scene().answer()
    scene.call.step(RecordingWanted(is_kept=False, by="supervisor:ann"), scene.now)
    (paused,) = [action.arguments for action in scene.call.context.actions if action.method == "pause_recording"]
    assert paused == {"sample": scene.call.context.sample, "by": "supervisor:ann"}
