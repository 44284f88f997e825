"""Duplex on a real line, in virtual time: our own echo, protected turns, and the manner of a campaign."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from minmo_runtime import api
from minmo_runtime.fake import FakeLine
from policies.duplex_manner import DuplexManner
from telephony import leg as tel
from telephony.clips import read_clip
from telephony.loopback import LoopbackLeg
from tests.scenarios.scene import Scene

STORY = FakeLine(text="tell me a story")
OPEN_END = FakeLine(text="i would like", is_complete=False)  # no end is predicted: only silence ends such a turn


CLIPS = Path(__file__).resolve().parents[2] / "agent" / "demo_assets"


@cache
def agent_voice() -> bytes:
    """24 kHz, as the runtime's."""
    names = ("hours_day", "what_can_you_do", "order_status", "number_prefix", "goodbye")
    return b"".join(read_clip(CLIPS / f"{name}.flac", 24_000) for name in names)


def caller_voice() -> bytes:
    """8 kHz, the same speaker a quarter lower."""
    clip = np.frombuffer(read_clip(CLIPS / "what_can_you_do.flac"), "<i2").astype(float)
    return np.interp(np.arange(0, len(clip) - 1, 0.8), np.arange(len(clip)), clip).astype("<i2").tobytes()


class OnALineWithEcho(Scene):
    """The agent speaks with a real voice instead of tones: an echo canceller learns nothing from a tone."""

    def __init__(self, *lines: FakeLine, delay_ms: int, gain: float) -> None:
        super().__init__(*lines)
        self.leg = LoopbackLeg("l1", echo_gain=gain, echo_delay_ms=delay_ms)
        self._position = 0

    def _carry_out(self, action: Any) -> None:
        if isinstance(action, tel.Play):
            voice, start = agent_voice(), self._position
            self._position = (start + len(action.pcm)) % len(voice)
            pcm = (voice[start:] + voice * 9)[: len(action.pcm)]
            action = msgspec.structs.replace(action, pcm=pcm)
        super()._carry_out(action)


def telling_a_story(scene: Scene) -> Scene:
    scene.answer().caller(1.5)
    scene.run_until(lambda: scene.state == "speaking")
    return scene


@pytest.mark.parametrize(
    ("delay_ms", "gain", "max_ducks"), [(40, 0.5, 0), (80, 1.0, 1), (380, 0.35, 1)]
)  # a late echo is learnt later
def test_L15_our_own_echo_never_stops_the_agent(delay_ms: int, gain: float, max_ducks: int) -> None:
    scene = telling_a_story(OnALineWithEcho(STORY, delay_ms=delay_ms, gain=gain))
    scene.run_until(lambda: any(text.endswith("word29") for text in scene.heard_turns), 15)
    assert not scene.requests(api.CancelReply) and len(scene.commands(tel.Duck)) <= max_ducks


def figures_of_the_call(scene: Scene) -> dict[str, float]:
    return {kept["name"]: kept["value"] for kept in scene.keeps("add_metric", turn_id="")}


def test_the_record_says_how_strong_the_echo_of_its_line_is_and_what_was_removed() -> None:
    scene = telling_a_story(OnALineWithEcho(STORY, delay_ms=80, gain=0.25))  # 12 dB
    scene.run_until(lambda: scene.keeps("journal_append", name="echo_measured"), 15)
    (kept,) = scene.keeps("journal_append", name="echo_measured")
    assert kept["verdict"] == "cancelled" and kept["delay_ms"] == pytest.approx(80, abs=3)
    figures = figures_of_the_call(scene)
    assert figures["echo_return_loss_db"] == pytest.approx(12, abs=2) and figures["echo_enhancement_db"] > 7
    assert not scene.keeps("add_defect")


def test_a_line_without_echo_has_no_figures_of_one() -> None:
    scene = telling_a_story(Scene(STORY))
    scene.run_until(lambda: scene.keeps("journal_append", name="echo_measured"), 15)
    assert scene.keeps("journal_append", name="echo_measured")[0]["verdict"] == "none"
    assert not [name for name in figures_of_the_call(scene) if name.startswith("echo_")]


@pytest.mark.parametrize(("verdict", "num_defects", "num_figures"), [("strong", 1, 3), ("unclear", 0, 2)])
def test_an_echo_that_is_not_cancelled_is_a_defect_with_its_figures(
    verdict: str, num_defects: int, num_figures: int
) -> None:
    scene = Scene().answer()
    scene._inbox.append(tel.EchoMeasured(
        leg_id="l1", verdict=verdict, return_loss_db=9.6, delay_ms=180, enhancement_db=4.2, left_dbov=-36.4,
    ))  # fmt: skip
    scene.run(0.1)
    defects = scene.keeps("add_defect", kind="echo_not_cancelled")
    assert len(defects) == num_defects
    assert len([name for name in figures_of_the_call(scene) if name.startswith("echo_")]) == num_figures
    if defects:
        assert defects[0]["detail"] == (
            "our voice comes back 10 dB quieter after 180 ms, 4 dB of it removed, -36 dBov left"
        )


def test_a_caller_over_our_echo_stops_the_agent() -> None:
    scene = telling_a_story(OnALineWithEcho(STORY, FakeLine(text="wait"), delay_ms=120, gain=0.25))
    scene.run(1.0)
    scene.leg.speak(caller_voice())
    scene.run_until(lambda: scene.requests(api.CancelReply), 3)
    assert scene.requests(api.CancelReply)[0].reason == "interrupt"


def test_only_what_may_be_interrupted_may_duck_by_itself() -> None:
    scene = telling_a_story(Scene(STORY))
    by_turn = {command.item_id: command.may_duck for command in scene.commands(tel.Play)}
    notice, greeting, story = (by_turn[name] for name in ("a1", "a2", "a3"))
    assert (notice, greeting, story) == (False, True, True)


def seconds_to_the_answer(manner: DuplexManner) -> float:
    scene = Scene(OPEN_END, manner=manner).answer().caller(1.2)
    return scene.run_until(lambda: scene.state in ("thinking", "speaking"), 5)


def test_L1_L2_a_patient_line_waits_out_a_pause_in_which_a_brisk_one_answers() -> None:
    patient = seconds_to_the_answer(DuplexManner(preset="patient"))
    brisk = seconds_to_the_answer(DuplexManner(preset="brisk"))
    assert brisk < 1.5 < 1.8 <= patient


def test_J5_the_journal_says_which_manner_the_call_had_with_every_value() -> None:
    scene = Scene(manner=DuplexManner(preset="noisy_line", wordless_s=2.0)).answer()
    (kept,) = scene.keeps("journal_append", name="turn_taking")
    assert kept["preset"] == "noisy_line" and kept["wordless_s"] == 2.0 and kept["burst_voiced_s"] == 0.4
    assert kept["max_call_s"] == 600.0 and "campaign sets wordless_s = 2" in kept["reasons"]


def test_a_clank_on_a_noisy_line_does_not_duck_the_agent_for_long() -> None:
    scene = telling_a_story(Scene(STORY, FakeLine(text="", kind="noise"), manner=DuplexManner(preset="noisy_line")))
    scene.run(1.0).caller(0.15)
    scene.run_until(lambda: any(text.endswith("word29") for text in scene.heard_turns), 15)
    assert not scene.requests(api.CancelReply)
