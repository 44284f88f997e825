"""The caller's exchange hands us to somebody else in the middle of a call: whoever hears us now is told first that it
speaks with a machine and is recorded, and nothing of it is kept before. In virtual time."""

from __future__ import annotations

from typing import Any

import pytest

from minmo_runtime import api
from minmo_runtime.fake import FakeLine
from tests.scenarios.scene import Scene

STORY = FakeLine(text="tell me a story")
NUMBER = FakeLine(text="my order number is 45612")
CARD = FakeLine(text="i pay by card")


def notices(scene: Scene) -> list[str]:
    return [text for text in scene.heard_turns if text.startswith("you are speaking with an automated assistant")]


def recording(scene: Scene) -> list[tuple[str, str]]:
    names = ("pause_recording", "go_on_recording")
    return [(keep.method, keep.arguments["by"]) for _, keep in scene.kept if keep.method in names]


def telling_a_story(*lines: FakeLine) -> Scene:
    scene = Scene(STORY, *lines).answer().caller(1.5)
    scene.run_until(lambda: scene.state == "speaking")
    scene.run(2.0)
    return scene


def test_new_party_hears_the_notice_before_anything_else_and_in_full() -> None:
    scene = telling_a_story(FakeLine(text="who is there"), NUMBER)
    scene.leg.send_us_to("sip:desk@pbx")
    scene.run(0.2)
    assert scene.state == "protected" and scene.requests(api.CancelReply)[0].reason == "interrupt"
    scene.caller(1.2)  # it talks over it
    scene.run_until(lambda: len(notices(scene)) == 2)
    assert not any(text.endswith("word29") for text in scene.heard_turns)
    scene.run_until(lambda: scene.state == "listening" and any("did not get" in text for text in scene.heard_turns))
    scene.caller(1.8)
    scene.run_until(lambda: any("45612 was shipped" in text for text in scene.heard_turns))


def test_sound_is_kept_again_from_where_the_new_party_was_told() -> None:
    scene = telling_a_story()
    first_notice = scene.keeps("notice_finished")
    scene.leg.send_us_to("sip:desk@pbx")
    scene.run(0.2)
    assert recording(scene) == [("pause_recording", "new_party")]
    scene.run_until(lambda: len(notices(scene)) == 2)
    assert recording(scene) == [("pause_recording", "new_party"), ("go_on_recording", "notice")]
    assert scene.keeps("go_on_recording")[0]["sample"] > scene.keeps("pause_recording")[0]["sample"] + 8000
    assert scene.keeps("notice_finished") == first_notice  # the recording's own begin stays where it was


def test_pause_for_a_card_outlasts_the_notice_to_a_new_party() -> None:
    scene = Scene(CARD).answer().caller(1.2)
    scene.run_until(lambda: scene.keeps("pause_recording"))
    scene.run(5.0)
    scene.leg.send_us_to("sip:desk@pbx")
    scene.run_until(lambda: len(notices(scene)) == 2)
    assert recording(scene) == [("pause_recording", "agent")]


def test_party_that_does_not_take_us_leaves_the_sentence_and_the_recording_alone() -> None:
    scene = telling_a_story()
    scene.leg.send_us_to("sip:desk@pbx", 486)
    scene.run_until(lambda: any(text.endswith("word29") for text in scene.heard_turns), 20)
    assert len(notices(scene)) == 1 and not recording(scene)
    journal: list[dict[str, Any]] = scene.keeps("journal_append", name="referred")
    assert [row["sip_status"] for row in journal] == [0, 486]


@pytest.mark.parametrize("mode", ["always", "off"])
def test_where_the_recording_does_not_follow_from_the_notice_only_the_notice_is_said(mode: str) -> None:
    scene = telling_a_story()
    policy = scene.call.setup.policy
    object.__setattr__(policy, "most_recording", mode)  # this scene's own engine
    scene.leg.send_us_to("sip:desk@pbx")
    scene.run(12.0)
    assert not recording(scene)
    assert len([row for row in scene.transcript if "automated assistant" in row.get("generated_text", "")]) == 2
