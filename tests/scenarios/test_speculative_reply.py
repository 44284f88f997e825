"""Replies written ahead of the decision to speak, in whole calls."""

from __future__ import annotations

from typing import Any

import pytest

from agent.floor import TurnTakingConfig
from minmo_runtime import api
from minmo_runtime.fake import FakeLine
from telephony import leg as tel
from tests.scenarios.scene import Scene

NUMBER = FakeLine(text="my order number is 45612")
BYE = FakeLine(text="great bye")
PAUSE = FakeLine(text="my order number is", is_complete=False)
REST = FakeLine(text="45612 please")
SLOW = {"first_audio_ms": 480, "done_after_ms": 480}


def until_answered(draft_after_ms: int) -> float:
    """Seconds from the caller's last sample to the first of the answer's."""
    scene = Scene(FakeLine(text="tell me a story"), draft_after_ms=draft_after_ms, **SLOW).answer().caller(1.5)
    return scene.run_until(lambda: scene.state == "speaking")


def figures(scene: Scene) -> dict[str, float]:
    """What the call's record says of drafts once it is over."""
    scene.leg.hang_up()
    scene.run_until(lambda: scene.is_over)
    rows = scene.keeps("add_metric", source="runtime")
    return {row["name"]: row["value"] for row in rows if row["name"].startswith("draft")}


def test_the_answer_is_heard_earlier_by_what_was_written_ahead() -> None:
    plainly, drafted = until_answered(0), until_answered(160)
    assert 0.25 <= plainly - drafted <= 0.42  # up to all of 480 ms less the 60 ms that the voice needs


def test_a_draft_for_a_pause_is_thrown_away_and_the_whole_number_is_answered() -> None:
    config = TurnTakingConfig(likely_end_s=1.5)  # a pause long enough for another segment
    scene = Scene(PAUSE, REST, config=config, draft_after_ms=160, **SLOW).answer().caller(1.4, and_silence=0.9)
    assert not scene.commands(tel.Duck) and scene.state == "listening"
    scene.caller(1.0)
    scene.run_until(lambda: "it will arrive on wednesday" in (scene.heard_turns or [""])[-1])
    counted = figures(scene)
    assert counted == {"drafted": 2, "drafts_committed": 1, "drafts_discarded": 1}


@pytest.mark.parametrize("line", [NUMBER, BYE])
def test_no_tool_is_asked_for_before_the_agent_has_the_floor(line: FakeLine, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[Any] = []
    scene = Scene(line, draft_after_ms=160, **SLOW).answer()
    assert scene.stream is not None
    real = scene.stream.receive

    def receive(request: api.RuntimeRequest) -> list[api.RuntimeEvent]:
        events = real(request)
        order.extend(type(one) for one in (request, *events) if not isinstance(one, (api.PushAudio, api.Caption)))
        return events

    monkeypatch.setattr(scene.stream, "receive", receive)
    scene.caller(1.5).run(1.0)
    wanted = [api.StartReply, api.DraftEnded, api.ToolCallRequested]
    assert [kind for kind in order if kind in wanted] == wanted


def test_a_caller_who_goes_on_before_the_answer_is_heard_costs_a_committed_draft_only() -> None:
    """A false end after the commit: the reply is cut as any other, its words come back."""
    scene = Scene(NUMBER, FakeLine(text="wait"), draft_after_ms=160, done_after_ms=320, first_audio_ms=900)
    scene.answer().caller(1.5).run_until(lambda: scene.state == "thinking")
    scene.caller(0.4).run_until(lambda: scene.state == "listening")
    assert [request.reason for request in scene.requests(api.CancelReply)] == ["false_end"]
    assert not scene.committed


def test_without_drafts_the_counters_say_so() -> None:
    scene = Scene(NUMBER).answer().caller(1.5).run(3.0)
    assert figures(scene) == {"drafted": 0, "drafts_committed": 0, "drafts_discarded": 0}
