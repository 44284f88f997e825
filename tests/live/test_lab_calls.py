"""`minmo lab` for real: SIP calls through the relay to the whole stack with the fake runtime.

No timing is asserted that a loaded machine could break; what is asserted is what was understood of the packets.
"""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from agent.lab.concealment import heard_over, speech
from agent.lab.line import LineProfile
from agent.lab.run import main

pytest.importorskip("pjsua2")
pytestmark = [pytest.mark.live, pytest.mark.slow]


def test_a_call_over_a_bad_line_is_answered_measured_and_drawn(tmp_path: Path) -> None:
    flags = ["--fake", "--scenario", "interrupt", "--line", "wifi", "--loss", "0.05", "--out", str(tmp_path)]
    assert main(flags) == 0
    (call,) = json.loads((tmp_path / "result.json").read_text())["calls"]
    assert call["answered"] and call["first_word_ms"] is not None
    assert [stimulus["label"] for stimulus in call["stimuli"]] == ["turn", "interrupt"]
    assert call["stimuli"][1]["was_speaking"]
    for direction in call["relay"].values():
        assert direction["lost"] > 0 and direction["packets"] > 200
    assert call["rtp"]["from_agent"]["lost"] == 0  # measured before the damage
    pictures = {picture.name for picture in tmp_path.glob("*.svg")}
    assert pictures == {"000-wifi+own-interrupt.svg", "summary-wifi+own.svg"}
    assert all(ElementTree.parse(tmp_path / name).getroot().tag.endswith("svg") for name in pictures)


async def test_a_receiver_hears_the_callers_words_through_loss_and_echo() -> None:
    line = LineProfile(loss=0.03, jitter_ms=5, echo_delay_ms=100, echo_return_loss_db=20, noise_dbov=-60)
    heard, counts = await heard_over(line, seed=1)
    assert counts["lost"] > 0
    assert len(heard) > len(speech()) and heard.std() > 100
