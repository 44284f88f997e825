"""The tool that presses keys on the caller's line, in virtual time: when the reply that says so was heard, not in a
loop, and kept."""

from __future__ import annotations

from minmo_runtime import api
from minmo_runtime.fake import FakeLine
from telephony import leg as tel
from tests.scenarios.scene import Scene

PRESS = FakeLine(text="please press it")


def states(scene: Scene) -> list[str]:
    return [row["state"] for row in scene.keeps("record_tool_call", name="send_keys")]


def test_keys_go_out_when_the_reply_was_heard_and_are_kept() -> None:
    scene = Scene(PRESS).answer().caller(1.2)
    scene.run_until(lambda: scene.state == "speaking")
    scene.run(0.5)
    assert scene.leg.keys_heard == "" and states(scene) == ["requested"]
    scene.run_until(lambda: scene.leg.keys_heard)
    assert scene.leg.keys_heard == "12#" and states(scene) == ["requested", "done"]
    assert scene.heard_turns[-1] == "i am pressing it for you now"
    (kept,) = scene.keeps("journal_append", name="keys_sent")
    assert kept["keys"] == "12#"


def test_keys_of_a_reply_that_was_cut_never_go_out() -> None:
    scene = Scene(PRESS, FakeLine(text="no wait stop")).answer().caller(1.2)
    scene.run_until(lambda: scene.state == "speaking")
    scene.run(0.5).caller(1.2, and_silence=6.0)
    assert scene.leg.keys_heard == "" and states(scene) == ["requested", "cancelled"]


def test_keys_right_after_keys_are_refused_and_the_model_is_told_until_the_pause_is_over() -> None:
    scene = Scene(PRESS, PRESS, PRESS).answer().caller(1.2)
    scene.run_until(lambda: scene.leg.keys_heard)
    scene.call.keys_out.cooldown_s = 6.0
    scene.call.keys_out.sent("", scene.now)
    scene.caller(1.2)
    scene.run_until(lambda: "refused" in states(scene))
    assert scene.requests(api.ToolResult)[-1].content == "error" and scene.leg.keys_heard == "12#"
    scene.run(4.0)
    scene.caller(1.2)
    scene.run_until(lambda: len(scene.leg.keys_heard) > 3)
    assert [command.digits for command in scene.commands(tel.SendDtmf)] == ["12#", "12#"]
