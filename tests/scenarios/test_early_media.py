"""The notice as early media: said before the call is answered, where the campaign wants that and the line can; in
virtual time."""

from __future__ import annotations

from minmo_runtime.fake import FakeLine
from telephony import leg as tel
from tests.scenarios.scene import Scene

NUMBER = FakeLine(text="my order number is 45612")
EARLY = {"early_media": "notice"}


def answer_of(scene: Scene) -> float:
    return next(at for at, command in scene.sent if isinstance(command, tel.Answer))


def test_notice_is_heard_before_the_answer_and_the_greeting_after_it_each_once() -> None:
    scene = Scene(NUMBER, campaign_keys=EARLY)
    scene.leg.ring()
    scene.run(1.0)
    assert scene.leg.state is tel.LegState.EARLY and any(scene.leg.heard) and not scene.commands(tel.Answer)
    scene.run_until(lambda: scene.commands(tel.Answer))
    (notice,) = scene.heard_turns
    assert "automated assistant" in notice
    scene.run_until(lambda: len(scene.heard_turns) == 2)
    assert "how can i help" in scene.heard_turns[1]
    assert len(scene.commands(tel.Answer)) == len(scene.commands(tel.Progress)) == 1
    assert scene.keeps("notice_finished") and len(scene.keeps("answer_call")) == 1
    scene.run(0.5).caller(1.8)
    scene.run_until(lambda: any("45612 was shipped" in text for text in scene.heard_turns))
    assert not scene.keeps("add_defect")


def test_without_the_setting_the_call_is_answered_first() -> None:
    scene = Scene().answer()
    assert not scene.commands(tel.Progress) and answer_of(scene) < 100.2


def test_line_without_early_media_is_answered_after_a_second_and_hears_the_notice_then() -> None:
    scene = Scene(campaign_keys=EARLY)
    scene.leg.has_early_media = False
    scene.leg.ring()
    scene.run_until(lambda: scene.commands(tel.Answer), 3)
    assert not any(scene.leg.heard) and answer_of(scene) < 101.5
    scene.run_until(lambda: len(scene.heard_turns) == 2)
    assert "automated assistant" in scene.heard_turns[0] and "how can i help" in scene.heard_turns[1]


def test_caller_who_gives_up_during_the_notice_has_abandoned_the_call() -> None:
    scene = Scene(campaign_keys=EARLY)
    scene.leg.ring()
    scene.run(1.0)
    scene.leg.cancel()
    scene.run(0.2)
    assert scene.is_over and scene.keeps("close_call", disposition="abandoned") and not scene.commands(tel.Answer)
    assert not scene.keeps("notice_finished")
